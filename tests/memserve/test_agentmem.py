"""AgentMem's interface, in process and on a server, blocking and with await."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import memserve
from deployments.embedding import load
from deployments.embedding.engine import Engine
from memserve.agentmem import AsyncMemoryStore, MemoryStore
from tests.memserve.transports import Loop, Server, finish


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.stop()


class Blocked:
    """An `AsyncMemoryStore` whose methods block."""

    def __init__(self, builder: Any) -> None:
        self._loop = Loop()
        self._store: AsyncMemoryStore = self._loop.run(builder.build_async())

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **options: self._loop.run(finish(getattr(self._store, name), args, options))

    def close(self) -> None:
        self._loop.run(self._store.close())
        self._loop.stop()


def in_process(_: Server) -> Any:
    return memserve.Memory.builder().with_storage("memory://").with_embedder("fake", "fake")


def on_a_server(server: Server) -> Any:
    return memserve.Memory.builder().with_server(server.url)


@pytest.fixture(params=[in_process, on_a_server])
def builder(request: pytest.FixtureRequest, server: Server) -> Any:
    return request.param(server)


@pytest.fixture(params=["build", "build_async"])
def memory(request: pytest.FixtureRequest, builder: Any) -> Iterator[Any]:
    store = builder.build() if request.param == "build" else Blocked(builder)
    store.delete_all()
    store.delete_all(user_id="anna")
    yield store
    store.close()


def test_every_method(memory: Any) -> None:
    added = memory.add_for_user("Anna plays the cello.", "anna", metadata={"n": 1})
    assert added.status == "added"
    assert [one.status for one in memory.add_batch_optimized(["Tea.", "Coffee."], user_id="anna")] == ["added"] * 2
    (found,) = memory.search("Anna plays the cello.", user_id="anna", limit=1)
    assert (found.id, str(found), found.metadata) == (added.id, "Anna plays the cello.", {"n": 1})
    assert [str(one) for one in memory.get_all(user_id="anna")] == ["Coffee.", "Tea.", "Anna plays the cello."]
    assert len(memory.get_all(user_id="anna", limit=2)) == 2
    assert memory.update(added.id, "Anna plays chess.", user_id="anna").text == "Anna plays chess."
    assert memory.get(added.id, user_id="anna").text == "Anna plays chess."
    assert memory.delete(added.id, user_id="anna") is None
    with pytest.raises(memserve.NotFound):
        memory.delete(added.id, user_id="anna")
    assert memory.delete_all(user_id="anna") == 2
    assert memory.get_all(user_id="anna") == []


def test_memories_without_a_user_belong_to_the_default_one(memory: Any) -> None:
    added = memory.add("Tea.")
    memory.add_batch_optimized(["Coffee."])
    assert {str(one) for one in memory.search("Tea.")} == {"Tea.", "Coffee."}
    assert [one.user_id for one in memory.get_all()] == ["default", "default"]
    assert memory.update(added.id, "Green tea.").text == "Green tea."
    memory.delete(added.id)
    assert memory.delete_all() == 1


def test_get_all_goes_through_all_pages(memory: Any) -> None:
    memory.add_batch_optimized([{"id": str(n), "text": f"Number {n}."} for n in range(7)])
    assert [one.id for one in memory.get_all(order="created_at", limit=5)] == ["0", "1", "2", "3", "4"]
    assert memory.delete_all() == 7


class Engines:
    """The arguments of the engines that were made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[dict[str, Any]] = []
        original = Engine.__init__

        def init(engine: Engine, *args: Any, **options: Any) -> None:
            self.made.append(options)
            original(engine, *args, **options)

        monkeypatch.setattr(Engine, "__init__", init)


def test_the_queue_bounds_the_texts_in_a_run(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    engines = Engines(monkeypatch)
    for builder in (
        in_process(server),
        in_process(server).enable_embedding_queue(),
        in_process(server).enable_embedding_queue(8, 5),
        in_process(server).disable_embedding_queue(),
    ):
        with builder.build() as memory:
            memory.add("Tea.")
    assert [(one["queue_enabled"], one["max_batch_texts"]) for one in engines.made] == [
        (True, None),
        (True, 32),
        (True, 8),
        (False, None),
    ]


def test_it_is_stored_in_a_folder(tmp_path: Path) -> None:
    builder = memserve.Memory.builder().with_storage(tmp_path).with_embedder("fake", "fake")
    with builder.build() as memory:
        assert isinstance(memory, MemoryStore)
        memory.add("Tea.")
    with builder.build() as memory:
        assert [str(one) for one in memory.get_all()] == ["Tea."]
        assert memory.client.user("default").memories == 1


def test_an_embedder_with_the_api_of_openai(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "unused")
    builder = memserve.Memory.builder().with_storage("memory://")
    with builder.with_embedder("openai", "fake", base_url=f"{server.url}/v1").build() as memory:
        memory.add("Tea.")
        with memserve.Client(server.url) as client:
            assert np.array_equal(memory.client.embed(["Tea."]), client.embed(["Tea."]))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda builder: builder.with_embedder("word2vec", "x"), "There is no provider 'word2vec'"),
        (lambda builder: builder.enable_embedding_queue(0, 10), "max_batch_size must be at least 1"),
        (lambda builder: builder.enable_embedding_queue(1, -1), "max_wait_ms at least 0"),
    ],
)
def test_what_cannot_be_built_is_refused(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(memserve.Memory.builder())


def test_a_model_that_is_missing_is_reported_when_it_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.in_process.load_model", lambda provider, name, **_: load.resolve(name))
    builder = memserve.Memory.builder().with_storage(tmp_path).with_embedder("sentence-transformers", "./nothing")
    with pytest.raises(memserve.ServerError, match="There is no model at"):
        builder.build()
    with pytest.raises(memserve.ServerError, match="There is no model at"):
        asyncio.run(builder.build_async())
