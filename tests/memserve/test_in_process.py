"""memserve in process: what it imports, whose files it reads, and how it begins and ends."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import memserve
from deployments.embedding import load
from deployments.embedding.fake import FakeReranker
from tests.memserve.transports import FAKE, TIMEOUT_S, Blocking, Server

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "memories"


@pytest.fixture
def threads() -> Iterator[None]:
    """Requires that a test ends all threads of memserve that it began."""
    before = set(threading.enumerate())
    yield
    assert [one for one in set(threading.enumerate()) - before if one.name == "memserve"] == []


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks for a model, and loads none: importing PyTorch would take longer than these tests."""
    monkeypatch.setattr("deployments.in_process.load_model", lambda provider, name, **_: load.resolve(name))


def python(code: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    """A fresh interpreter, in a folder."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


def test_it_needs_neither_ray_nor_http_and_ends_without_being_closed(tmp_path: Path) -> None:
    code = (
        f"import sys, memserve; client = memserve.local(settings={FAKE!r}); client.add('anna', ['Tea.']);"
        "print(client.search('anna', 'Tea.')[0]); print(*{name.partition('.')[0] for name in sys.modules})"
    )
    done = python(code, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    answer, loaded = done.stdout.splitlines()
    assert answer == "Tea."
    assert {"ray", "fastapi", "starlette", "uvicorn", "torch"} & set(loaded.split()) == set()
    assert [*tmp_path.iterdir()] == [tmp_path / "memories"]
    assert (tmp_path / "memories" / "memserve.db").exists()


def test_memories_are_there_the_next_time(folder: Path, threads: None) -> None:
    with memserve.local(folder, settings=FAKE) as client:
        client.add("anna", ["Tea."])
        assert repr(client) == f"Client('sqlite:///{folder}/memserve.db')"
    with memserve.local(str(folder), settings=FAKE) as client:
        assert [str(memory) for memory in client.list("anna")] == ["Tea."]


def test_memory_urls_keep_nothing(threads: None) -> None:
    for _ in range(2):
        with memserve.local("memory://", settings=FAKE) as client:
            assert [*client.list("anna")] == []
            client.add("anna", ["Tea."])


def test_the_log_of_a_running_server_can_be_used(tmp_path: Path, threads: None) -> None:
    server = Server(tmp_path)
    try:
        url = f"sqlite:///{tmp_path}/log.db"
        with memserve.Client(server.url) as over_http, memserve.local(url, settings=FAKE) as local:
            over_http.add("anna", [{"id": "a", "text": "Tea."}])
            local.add("anna", [{"id": "b", "text": "Coffee."}])
            for client in (over_http, local):
                assert [memory.id for memory in client.list("anna", order="created_at")] == ["a", "b"]
            assert over_http.search("anna", "Tea.") == local.search("anna", "Tea.")
            assert [*over_http.export("anna")] == [*local.export("anna")]
            assert np.array_equal(over_http.embed(["Tea."]), local.embed(["Tea."]))
    finally:
        server.stop()


@pytest.mark.parametrize("blocking", [True, False])
def test_a_model_that_cannot_be_loaded_is_reported(
    folder: Path, threads: None, without_torch: None, blocking: bool
) -> None:
    with pytest.raises(memserve.ServerError, match=r"There is no model at './nothing': it is not a folder\."):
        if blocking:
            memserve.local(folder, model="./nothing")
        else:
            client = Blocking(lambda: memserve.AsyncClient.local(folder, model="./nothing"))
            try:
                client.user("anna")
            finally:
                client.close()


def test_the_log_of_another_model_is_refused(folder: Path, threads: None) -> None:
    with memserve.local(folder, settings=FAKE) as client:
        client.add("anna", ["Tea."])
    with pytest.raises(memserve.Conflict):
        memserve.local(folder, settings={"model": {"provider": "fake", "name": "fake", "dim": 8}})


def test_a_wrong_setting_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"^model\.nmae: unknown setting$"):
        memserve.local(folder, settings={"model": {"nmae": "x"}})


def test_settings_come_from_the_environment_too(monkeypatch: pytest.MonkeyPatch, threads: None) -> None:
    monkeypatch.setenv("MEMSERVE_MODEL__PROVIDER", "fake")
    monkeypatch.setenv("MEMSERVE_MODEL__DIM", "8")
    with memserve.local("memory://") as client:
        assert client.embed(["tea"]).shape == (1, 8)


def test_an_answer_that_does_not_come_in_time_is_given_up(monkeypatch: pytest.MonkeyPatch, threads: None) -> None:
    from deployments.in_process import InProcess

    cancelled = threading.Event()

    async def user(self: InProcess, user_id: str) -> Any:
        try:
            await asyncio.sleep(TIMEOUT_S)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    monkeypatch.setattr(InProcess, "user", user)
    local = memserve.local("memory://", settings=FAKE)
    awaited = Blocking(lambda: memserve.AsyncClient.local("memory://", settings=FAKE))
    for client, inner in ((local, local), (awaited, awaited.client)):
        try:
            client.ready()  # it is loaded
            inner._timeout_s = 0.01
            with pytest.raises(memserve.TimedOut, match="No answer in time"):
                client.user("anna")
            assert cancelled.wait(TIMEOUT_S)
            cancelled.clear()
        finally:
            client.close()


def test_threads_and_tasks_share_a_client(threads: None) -> None:
    with memserve.local("memory://", settings=FAKE) as client:

        def add(number: int) -> None:
            for n in range(20):
                client.add("anna", [f"Number {number}, {n}."])

        workers = [threading.Thread(target=add, args=(number,)) for number in range(8)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert client.user("anna").version == 160


def test_it_can_be_closed_twice_and_then_refuses(threads: None) -> None:
    client = memserve.local("memory://", settings=FAKE)
    client.close()
    client.close()
    with pytest.raises(memserve.MemserveError, match="is closed"):
        client.user("anna")


def test_an_import_is_read_as_it_is_written(threads: None) -> None:
    """A generator of a million lines must not be held in memory as a whole."""
    read = 0

    def lines() -> Iterator[dict[str, Any]]:
        nonlocal read
        for n in range(1_000):
            read = n
            yield {"id": str(n), "text": f"Number {n}."} if n < 500 else {"id": str(n), "text": ""}

    with memserve.local("memory://", settings=FAKE) as client:
        with pytest.raises(memserve.BadRequest, match=r"^lines\.500\.text: "):
            client.import_("anna", lines())
        assert read < 999
        assert client.user("anna").memories == 400


def test_a_reranker_is_loaded_if_it_is_named(folder: Path, threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.in_process.load_reranker", lambda model, **_: FakeReranker(name=model))
    with memserve.local(folder, settings={**FAKE, "reranker": {"model": "ranks"}}) as client:
        ranking = client.rerank("the dog", ["it rains", "the dog", "a dog"])
        assert [one.index for one in ranking] == [1, 2, 0]
        client.add("anna", ["it rains", "a dog"])
        assert [str(memory) for memory in client.search("anna", "the dog", rerank=True, top_k=1)] == ["a dog"]
    with memserve.local(folder, settings=FAKE) as client, pytest.raises(memserve.BadRequest, match=r"reranker\.model"):
        client.rerank("the dog", ["it rains"])


@pytest.mark.parametrize(
    ("missing", "code"),
    [
        ("sqlalchemy", "memserve.local('memory://')"),
        ("sqlalchemy", "memserve.Memory.builder().build()"),
        ("ray", "memserve.Client.in_cluster()"),
    ],
)
def test_a_missing_server_is_named(tmp_path: Path, missing: str, code: str) -> None:
    done = python(f"import sys; sys.modules[{missing!r}] = None; import memserve; {code}", tmp_path)
    assert done.stderr.splitlines()[-1] == (
        f'ModuleNotFoundError: {missing} is not installed; this needs the server: pip install "memserve[server]"'
    )


@pytest.mark.slow
def test_the_default_model_is_loaded_without_a_word(tmp_path: Path) -> None:
    code = (
        "import sys, memserve; client = memserve.local(); client.add('anna', ['She plays the cello.', 'It rains.']);"
        "print(client.search('anna', 'an instrument that she plays', mode='vector')[0]);"
        "print(client.embed(['a']).shape, 'ray' in sys.modules)"
    )
    done = python(code, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "She plays the cello.\n(1, 384) False\n", "")
