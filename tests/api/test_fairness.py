"""One caller does not shut out the others: lone requests beside bulk work wait for a bounded number of forwards.

Forwards are counted, and end one by one when the test says so. Nothing is timed.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from deployments.embedding.engine import Engine
from deployments.embedding.fake import FakeModel
from deployments.embedding.model import Tokens
from deployments.errors import DeadlineExceeded
from deployments.fair_queue import Turn
from tests.local_app import DIM, LocalApp

LONG = "word " * 200  # 1,000 characters
EMBEDDED = {"append_together", "search"}  # the calls to the store that follow an embedding


class Held(FakeModel):
    """A fake model whose forwards wait until the test lets them go.

    Attributes:
        ended: the number of forwards that have ended.
    """

    forwards_in_flight = 1

    def __init__(self) -> None:
        super().__init__(DIM)
        self.ended = 0
        self.gates: list[asyncio.Event] = []
        self.free = False

    async def forward(self, batch: Sequence[Tokens]) -> np.ndarray:
        if self.free:
            return await super().forward(batch)
        gate = asyncio.Event()
        self.gates.append(gate)
        await gate.wait()
        self.ended += 1
        return await super().forward(batch)

    def let_all_go(self) -> None:
        """End the forwards that are in progress, and all later ones."""
        self.free = True
        while self.gates:
            self.let_go()

    def let_go(self) -> None:
        """End the oldest forward that is in progress."""
        self.gates.pop(0).set()


class HeldApp(LocalApp):
    """An application whose forwards wait until the test lets them go."""

    held: Held

    def hold(self, max_batch_tokens: int) -> None:
        self.held = Held()
        self.model.model = self.held
        self.model.engine = self.model._engine = Engine(self.held, max_batch_tokens=max_batch_tokens)

    async def until_held(self) -> None:
        """Wait until a forward is in progress."""
        while not self.held.gates:
            await turns(1)

    async def forwards_until_embedded(self, asking: asyncio.Task[httpx.Response]) -> int:
        """The forwards that end before a request is answered, or reaches the store."""
        before, calls = self.held.ended, len(self.store.calls)
        while not asking.done() and not any(name in EMBEDDED for name, _ in self.store.calls[calls:]):
            await turns()
            if self.held.gates and not asking.done():
                self.held.let_go()
            await turns()
        return self.held.ended - before

    async def finish(self, tasks: Sequence["asyncio.Task[Any]"]) -> None:
        """End forwards until these requests are answered."""
        while not all(task.done() for task in tasks):
            if self.held.gates:
                self.held.let_go()
            await turns(1)


@pytest.fixture
async def app(tmp_path: Path) -> AsyncIterator[HeldApp]:
    app = await HeldApp.start(tmp_path)
    assert isinstance(app, HeldApp)
    app.hold(1_024)
    yield app
    app.held.let_all_go()
    await app.stop()


async def turns(count: int = 100) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def post(app: LocalApp, path: str, body: Any, **headers: str) -> "asyncio.Task[httpx.Response]":
    return asyncio.ensure_future(
        app.http.post(path, json=body, headers={k.replace("_", "-"): v for k, v in headers.items()})
    )


BULK = {
    "embeddings": ("/v1/embeddings", {"input": [f"{n} {LONG}" for n in range(1_000)]}),
    "add": ("/v1/users/bulk/memories", {"memories": [{"text": f"{n} {'word ' * 100}"} for n in range(1_000)]}),
}


@pytest.mark.parametrize("kind", BULK)
async def test_beside_bulk_work_each_of_45_requests_waits_for_one_forward_and_its_own(app: HeldApp, kind: str) -> None:
    bulk = post(app, *BULK[kind])
    await app.until_held()
    for number in range(15):
        for path, body, status in (
            ("/v1/embeddings", {"input": f"a text {number}"}, 200),
            (f"/v1/users/user-{number}/memories", {"text": f"a memory {number}"}, 201),
            (f"/v1/users/user-{number}/memories/search", {"query": f"a query {number}"}, 200),
        ):
            asking = post(app, path, body)
            assert await app.forwards_until_embedded(asking) <= 2
            assert (await asking).status_code == status
    assert not bulk.done()
    await app.finish([bulk])
    answer = await bulk
    assert answer.status_code in (200, 201)
    assert len(answer.json()["data" if kind == "embeddings" else "memories"]) == 1_000


async def test_beside_bulk_work_45_requests_at_once_are_all_answered(app: HeldApp) -> None:
    bulk = post(app, *BULK["embeddings"])
    await app.until_held()
    asking = [post(app, "/v1/embeddings", {"input": f"a text {number}"}) for number in range(45)]
    await turns(1_000)
    before = app.held.ended
    while not all(task.done() for task in asking):
        await turns()
        app.held.let_go()
        await turns()
    assert app.held.ended - before <= 4
    assert {(await task).status_code for task in asking} == {200}
    bulk.cancel()
    await turns()


async def test_a_text_that_is_also_in_bulk_work_does_not_wait_for_it(app: HeldApp) -> None:
    path, body = BULK["embeddings"]
    bulk = post(app, path, body)
    await app.until_held()
    for position in (4, 999):
        asking = post(app, "/v1/embeddings", {"input": body["input"][position]})
        assert await app.forwards_until_embedded(asking) <= 2
        assert (await asking).status_code == 200
    bulk.cancel()
    await turns()


async def test_ten_connections_of_one_user_have_the_share_of_one_user(app: HeldApp) -> None:
    calls, answered = app.gateway._embedder, {"ann": 0, "ben": 0}

    async def connection(user: str, number: int) -> None:
        for turn in itertools.count():
            texts = [f"{user} {number} {turn} {n} {LONG}" for n in range(4)]  # 1,008 tokens: not bulk
            await calls.embed(texts, "", "end", realm=None, turn=Turn.of_user("default", user))
            answered[user] += 1

    connections = [asyncio.ensure_future(connection("ann", number)) for number in range(10)]
    await turns()
    connections += [asyncio.ensure_future(connection("ben", number)) for number in range(3)]
    while answered["ben"] < 20:
        await turns()
        app.held.let_go()
        await turns()
    assert 18 <= answered["ann"] <= 24
    for one in connections:
        one.cancel()
    await asyncio.wait(connections)


async def test_40_documents_of_200_kb_count_as_what_the_model_reads_of_them(app: HeldApp) -> None:
    app.model.gate.clear()
    asking = post(app, "/v1/embeddings", {"input": [f"{n} {'words ' * 33_333}" for n in range(40)]})
    while len(app.model.texts) < 16:  # two calls of eight documents
        await turns(1)
    assert app.gateway._vectors.queued_tokens == 40 * 256 - 16 * 256
    assert (await app.gateway.record_autoscaling_stats())["waiting_tokens"] == 24 * 256
    app.model.gate.set()
    await app.finish([asking])
    assert (await asking).json()["usage"]["prompt_tokens"] == 10_240
    assert app.gateway._vectors.queued_tokens == 0


# Deadlines.


async def test_a_request_past_its_deadline_is_answered_504_and_the_device_never_sees_it(app: HeldApp) -> None:
    first = post(app, "/v1/embeddings", {"input": "first"})
    await app.until_held()
    for path, body in (
        ("/v1/embeddings", {"input": "too late"}),
        ("/v1/users/ann/memories", {"text": "too late"}),
        ("/v1/users/ann/memories/search", {"query": "too late"}),
    ):
        late = await post(app, path, body, x_request_timeout_ms="5")
        assert (late.status_code, late.json()["error"]["type"]) == (504, "timeout_error")
        assert late.json()["error"]["code"] == "deadline_exceeded"
        assert "retry-after" not in late.headers
    with pytest.raises(DeadlineExceeded):
        await app.gateway.embed(["too late"], timeout_s=0.005)
    await app.finish([first])
    assert (await first).status_code == 200
    stats = app.model.engine.stats()
    assert (stats.texts, stats.queued_texts, stats.queued_tokens) == (1, 0, 0)
    assert (await app.http.get("/v1/users/ann/memories")).json()["memories"] == []


@pytest.mark.parametrize(("path", "body"), [("/tokenize", {"inputs": "a text"}), ("/decode", {"ids": [7]})])
async def test_a_call_that_waits_for_the_tokenizer_past_its_deadline_is_answered_504(
    app: HeldApp, path: str, body: dict[str, Any]
) -> None:
    async with app.model.engine._splitting:
        late = await post(app, path, body, x_request_timeout_ms="5")
        assert (late.status_code, late.json()["error_type"]) == (504, "Backend")
    assert (await post(app, path, body, x_request_timeout_ms="60000")).status_code == 200


async def test_a_request_waits_for_another_with_the_same_text_until_its_deadline(app: HeldApp) -> None:
    first = post(app, "/v1/embeddings", {"input": "the same"})
    await app.until_held()
    late = await post(app, "/v1/embeddings", {"input": "the same"}, x_request_timeout_ms="5")
    assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
    await app.finish([first])
    assert (await first).status_code == 200


async def test_a_request_past_its_deadline_is_not_sent_to_an_embedder(app: HeldApp) -> None:
    app.model.gate.clear()
    sent = [post(app, "/v1/embeddings", {"input": "first"})]
    while app.model.texts != ["first"]:
        await turns(1)
    late = await post(app, "/v1/embeddings", {"input": "too late"}, x_request_timeout_ms="5")
    assert late.status_code == 504
    assert app.gateway._vectors.queued_tokens == 0
    app.model.gate.set()
    await app.finish(sent)
    assert app.model.texts == ["first"]


async def test_a_bulk_request_past_its_deadline_stops(app: HeldApp) -> None:
    path, body = BULK["embeddings"]
    bulk = post(app, path, body, x_request_timeout_ms="500")
    while not bulk.done():
        await asyncio.sleep(0)
        if app.model.engine.stats().queued_texts == 0 and app.held.gates:
            app.held.let_go()
    assert (await bulk).status_code == 504
    assert app.gateway._vectors.queued_tokens == 0


@pytest.mark.parametrize("value", ["0", "-5", "1.5", "soon"])
async def test_a_timeout_that_is_no_positive_number_is_refused(app: HeldApp, value: str) -> None:
    refused = await post(app, "/v1/embeddings", {"input": "a text"}, x_request_timeout_ms=value)
    error = refused.json()["error"]
    assert (refused.status_code, error["param"]) == (400, "x-request-timeout-ms")
    assert error["message"] == "x-request-timeout-ms: must be a whole number from 1 to 86400000"
