"""The client over HTTP: what it sends, and when it sends it again."""

import asyncio
import json
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import memserve
from memserve import calls
from tests.memserve.transports import Blocking

ROOT = Path(__file__).resolve().parents[2]
ADDED = {"memories": [{"id": "a", "status": "added", "version": 1}], "version": 1}

Answer = httpx.Response | Exception


class Wire:
    """A transport of httpx that answers from a list, and keeps what was sent."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.sent: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        request.read()
        return self._answer(request)

    async def later(self, request: httpx.Request) -> httpx.Response:
        await request.aread()
        return self._answer(request)

    def _answer(self, request: httpx.Request) -> httpx.Response:
        self.sent.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def blocking(wire: Wire, **options: Any) -> Any:
    return memserve.Client(http_client=httpx.Client(transport=httpx.MockTransport(wire)), **options)


def awaiting(wire: Wire, **options: Any) -> Any:
    def make() -> memserve.AsyncClient:
        transport = httpx.MockTransport(wire.later)
        return memserve.AsyncClient(http_client=httpx.AsyncClient(transport=transport), **options)

    return Blocking(make)


Connect = Callable[..., Any]


@pytest.fixture(params=[blocking, awaiting], ids=["blocking", "awaiting"])
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    """Makes a client of a wire."""
    made = []

    def connect(wire: Wire, **options: Any) -> Any:
        made.append(request.param(wire, **options))
        return made[-1]

    yield connect
    for client in made:
        client.close()


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The delays between attempts, which are not waited for."""
    delays: list[float] = []

    async def sleep(delay: float, sleep: Any = asyncio.sleep) -> None:
        delays.append(delay)
        await sleep(0)

    monkeypatch.setattr(time, "sleep", delays.append)
    monkeypatch.setattr(asyncio, "sleep", sleep)
    return delays


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEMSERVE_URL", raising=False)
    monkeypatch.delenv("MEMSERVE_API_KEY", raising=False)


def failed(status: int, retry_after: str | None = None) -> httpx.Response:
    body = {"error": {"message": "later", "type": "x", "param": None, "code": None}}
    return httpx.Response(status, json=body, headers={} if retry_after is None else {"retry-after": retry_after})


def test_the_url_and_the_key_are_arguments_or_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    def sent(*args: Any) -> tuple[str, str | None]:
        wire = Wire(httpx.Response(200, json={"memories": [], "missing": []}))
        memserve.Client(*args, http_client=httpx.Client(transport=httpx.MockTransport(wire))).get_many("a", ["b"])
        return str(wire.sent[0].url).removesuffix("/v1/users/a/memories/get"), wire.sent[0].headers.get("authorization")

    assert sent() == ("http://127.0.0.1:8000", None)
    assert sent("http://one:1/base/", "key") == ("http://one:1/base", "Bearer key")
    monkeypatch.setenv("MEMSERVE_URL", "http://two:2")
    monkeypatch.setenv("MEMSERVE_API_KEY", "ms_secret")
    assert sent() == ("http://two:2", "Bearer ms_secret")
    assert sent("http://one:1", "key") == ("http://one:1", "Bearer key")
    assert "ms_secret" not in repr(memserve.Client())


def test_a_refused_write_is_sent_again_with_the_same_key(connect: Connect, slept: list[float]) -> None:
    wire = Wire(failed(429, "2"), failed(503), httpx.ReadError("lost"), httpx.Response(201, json=ADDED))
    assert connect(wire).add("anna", ["Tea."])[0].id == "a"
    keys = [request.headers["idempotency-key"] for request in wire.sent]
    assert len(set(keys)) == 1
    assert re.fullmatch("[0-9a-f]{32}", keys[0])
    assert {request.content for request in wire.sent} == {b'{"memories":[{"text":"Tea."}]}'}
    first, second, third = slept
    assert (2.0 <= first <= 2.5, 0.2 <= second <= 0.25, 0.4 <= third <= 0.5) == (True, True, True)


def test_two_writes_have_two_keys_and_a_read_has_none(connect: Connect) -> None:
    wire = Wire(*(httpx.Response(201, json=ADDED) for _ in range(2)), httpx.Response(200, json={"results": []}))
    client = connect(wire)
    client.add("anna", ["Tea."])
    client.add("anna", ["Tea."])
    client.search("anna", "Tea.")
    one, other, none = (request.headers.get("idempotency-key") for request in wire.sent)
    assert one != other
    assert none is None


def test_a_key_is_not_made_twice(connect: Connect, slept: list[float]) -> None:
    for refused in (failed(503), httpx.ReadError("lost")):
        wire = Wire(refused)
        with pytest.raises(memserve.MemserveError):
            connect(wire).create_key()
        assert len(wire.sent) == 1
    assert slept == []


def test_the_last_error_is_raised_when_the_time_is_up(connect: Connect, slept: list[float]) -> None:
    with pytest.raises(memserve.RateLimited) as caught:
        connect(Wire(failed(429, "2")), timeout=1.0).search("anna", "Tea.")
    assert (caught.value.status, caught.value.retry_after_s, slept) == (429, 2.0, [])


def test_other_errors_are_not_sent_again(connect: Connect, slept: list[float]) -> None:
    with pytest.raises(memserve.Unauthorized, match="later"):
        connect(Wire(failed(401))).user("anna")
    with pytest.raises(memserve.TimedOut, match="did not answer in time"):
        connect(Wire(httpx.ReadTimeout("slow"))).user("anna")
    assert slept == []


def test_a_server_that_is_away_is_given_up(connect: Connect, slept: list[float]) -> None:
    wire = Wire(*(httpx.ConnectError("[Errno 111] Connection refused") for _ in range(5)))
    with pytest.raises(memserve.NotReached, match=r"cannot be reached: .*Connection refused"):
        connect(wire).user("anna")
    assert (len(wire.sent), len(slept)) == (5, 4)


def test_an_answer_that_is_not_json_is_told_by_its_status(connect: Connect) -> None:
    with pytest.raises(memserve.ServerError, match=r"The server answered with status 502\."):
        connect(Wire(httpx.Response(502, text="<html>"))).user("anna")


def test_the_server_is_told_how_long_the_client_waits(connect: Connect) -> None:
    wire = Wire(*(httpx.Response(200, json={"results": []}) for _ in range(2)))
    connect(wire, timeout=2.0).search("anna", "Tea.")
    connect(wire, timeout=None).search("anna", "Tea.")
    assert 1900 <= int(wire.sent[0].headers["x-request-timeout-ms"]) <= 2000
    assert "x-request-timeout-ms" not in wire.sent[1].headers


def test_embed_asks_for_base64_unless_told_otherwise(connect: Connect) -> None:
    base64 = httpx.Response(200, json={"data": [{"embedding": "AACAPwAAAEA="}]})
    numbers = httpx.Response(200, json={"data": [{"embedding": [1.0, 2.0]}]})
    wire = Wire(base64, numbers)
    client = connect(wire)
    assert client.embed(["a"]).tolist() == [[1.0, 2.0]]
    assert client.embed(["a"], encoding_format="float").tolist() == [[1.0, 2.0]]
    assert [json.loads(request.content)["encoding_format"] for request in wire.sent] == ["base64", "float"]


def test_options_of_newer_servers_are_sent_and_their_answers_are_attributes(connect: Connect) -> None:
    memory = {"id": "a", "user_id": "anna", "text": "Tea.", "metadata": {}, "version": 1, "colour": "red"}
    times = {"created_at": "2026-11-22T12:00:00Z", "updated_at": "2026-11-22T12:00:00Z"}
    wire = Wire(httpx.Response(200, json={"results": [{**memory, **times}]}))
    (found,) = connect(wire).search("anna", "Tea.", mode="words", top_k=None)
    assert found.colour == "red"
    assert json.loads(wire.sent[0].content) == {"query": "Tea.", "mode": "words"}


def test_options_of_a_get_are_in_the_query(connect: Connect) -> None:
    pages = [{"memories": [], "next_cursor": cursor} for cursor in ("x", None)]
    wire = Wire(*(httpx.Response(200, json=page) for page in pages))
    assert [*connect(wire).list("anna", filter={"n": 1}, limit=3, colour=True)] == []
    first, second = (dict(request.url.params) for request in wire.sent)
    assert first == {"filter": '{"n": 1}', "limit": "3", "colour": "true"}
    assert second == {**first, "cursor": "x"}


def test_an_import_is_sent_again_from_a_file_or_a_list_only(
    connect: Connect, slept: list[float], tmp_path: Path
) -> None:
    file = tmp_path / "anna.ndjson"
    file.write_bytes(b'{"text":"Tea."}\n')
    done = {"imported": 1, "unchanged": 0}
    for source in (file, ['{"text":"Tea."}']):
        wire = Wire(failed(503), httpx.Response(200, json=done))
        assert connect(wire).import_("anna", source).imported == 1
        assert [request.content for request in wire.sent] == [b'{"text":"Tea."}\n'] * 2
    with pytest.raises(memserve.Unavailable):
        connect(Wire(failed(503))).import_("anna", iter(['{"text":"Tea."}']))
    assert len(slept) == 2


def test_an_export_is_begun_again_but_not_continued(connect: Connect, slept: list[float]) -> None:
    wire = Wire(failed(503), httpx.Response(200, content=b'{"id":"a"}\n{"id":"b"}'))
    assert [*connect(wire).export("anna")] == [b'{"id":"a"}\n', b'{"id":"b"}\n']
    assert len(slept) == 1

    class Broken(httpx.SyncByteStream, httpx.AsyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            yield b'{"id":"a"}\n'
            raise httpx.ReadError("lost")

        async def __aiter__(self) -> AsyncIterator[bytes]:
            for chunk in self:
                yield chunk

    with pytest.raises(memserve.NotReached, match="lost"):
        [*connect(Wire(httpx.Response(200, stream=Broken()))).export("anna")]


def test_the_first_error_of_a_batch_stops_it(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "MAX_ITEMS", 1)
    monkeypatch.setattr(calls, "PIECE_ITEMS", 1)
    body = {"error": {"message": "input.0: no", "type": "x", "param": "input.0", "code": None}}
    wire = Wire(*(httpx.Response(400, json=body) for _ in range(100)))
    with pytest.raises(memserve.BadRequest) as caught:
        connect(wire).embed(["a"] * 100)
    assert re.fullmatch(r"input\.[0-9]", str(caught.value.param))
    assert len(wire.sent) < 20


def test_bars_are_shown_for_long_work_only(connect: Connect, capsys: pytest.CaptureFixture[str]) -> None:
    def answers(number: int) -> Wire:
        return Wire(*(httpx.Response(201, json=ADDED) for _ in range(number)))

    connect(answers(1), show_progress=True).add("anna", ["Tea."])
    connect(answers(9)).add("anna", ["Tea."] * 4_097)
    assert capsys.readouterr().err == ""  # not a terminal
    connect(answers(9), show_progress=True).add("anna", ["Tea."] * 4_097)
    assert "adding" in (shown := capsys.readouterr().err)
    assert "4.10k" in shown or "4097" in shown


def test_the_client_imports_neither_the_server_nor_ray_nor_torch() -> None:
    code = "import sys, memserve; memserve.Client(); memserve.AsyncClient(); memserve.Memory; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert {"httpx", "numpy", "pydantic", "tqdm"} <= loaded
    assert loaded & {"deployments", "fastapi", "orjson", "ray", "sqlalchemy", "store", "torch", "yaml"} == set()


def test_the_package_offers_what_it_lists() -> None:
    for name in memserve.__all__:
        assert getattr(memserve, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = memserve.nothing
