"""The gateway's calls: batched while one is in progress, cut into pieces, refused beyond the limit, cached, resent."""

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import ray.exceptions
from ray.serve.exceptions import BackPressureError, RayServeException

import deployments.calls.resilient
from deployments.calls.embedder import EmbedderCalls
from deployments.calls.resilient import ATTEMPTS, UnbatchedCalls, resilient
from deployments.embedding.engine import MOST_CHARACTERS_PER_TOKEN, EmbedRequest, Engine
from deployments.embedding.fake import FakeModel
from deployments.embedding.model import Tokens
from deployments.errors import (
    DeadlineExceeded,
    EmbeddingFailed,
    InvalidRequest,
    Overloaded,
    ShuttingDown,
    Unavailable,
)
from deployments.fair_queue import Turn
from deployments.rate_limits import Ask, Lease, LeasedBucket, SharedBuckets, tokens_from
from store.errors import OUTCOME_UNKNOWN


class Remote:
    """A method of a handle: `.remote(...)` returns an awaitable."""

    def __init__(self, function: Any) -> None:
        self.remote = function


class Slow(FakeModel):
    """A fake model whose forwards wait for `go`."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.go = asyncio.Event()

    async def forward(self, batch: Sequence[Tokens]) -> np.ndarray:
        await self.go.wait()
        return await super().forward(batch)


class EmbedderHandle:
    """The Embedder deployment, in this process. Calls wait for `gate`; `calls` counts their texts."""

    def options(self, **_: str) -> "EmbedderHandle":
        return self

    def __init__(self) -> None:
        self.engine = Engine(FakeModel(dim=8, max_tokens=16))
        self.gate = asyncio.Event()
        self.gate.set()
        self.calls: list[list[int]] = []
        self.embed = Remote(self._embed)
        self.info = Remote(self._info)

    async def _embed(self, requests: Sequence[EmbedRequest]) -> Any:
        self.calls.append([len(request.inputs) for request in requests])
        await self.gate.wait()
        return await self.engine.embed(requests)

    async def _info(self) -> Any:
        return self.engine.info


def calls_over(handle: Any, **options: Any) -> EmbedderCalls:
    limits = {
        "in_flight": 1,
        "call_tokens": 256,
        "max_queued_tokens": 1000,
        "max_wait_s": None,
        "cache_bytes": 0,
        **options,
    }
    return EmbedderCalls(handle, **limits)


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_requests_that_arrive_during_a_call_share_the_next_one() -> None:
    handle = EmbedderHandle()
    calls = calls_over(handle)
    handle.gate.clear()
    first = asyncio.create_task(calls.embed(["first"], "", "end", realm="r"))
    await turns()
    rest = [asyncio.create_task(calls.embed([f"text {n}"], "", "end", realm="r")) for n in range(10)]
    await turns()
    handle.gate.set()
    results = await asyncio.gather(first, *rest)
    assert handle.calls == [[1], [1] * 10]
    alone = await calls_over(EmbedderHandle()).embed(["text 3"], "", "end", realm="r")
    assert np.array_equal(results[4].vectors, alone.vectors)


async def test_a_large_request_is_cut_and_put_together_in_order() -> None:
    handle = EmbedderHandle()
    texts = [f"text {n}" for n in range(100)]
    whole = await calls_over(handle, call_tokens=30, in_flight=3).embed(texts, "", "end", realm="r")
    assert sum(sum(call) for call in handle.calls) == 100
    assert all(sum(call) <= 10 for call in handle.calls)
    for n in (0, 37, 99):
        alone = await calls_over(EmbedderHandle()).embed([texts[n]], "", "end", realm="r")
        assert np.array_equal(whole.vectors[n], alone.vectors[0])
    assert whole.tokens.tolist() == [2] * 100


async def test_an_error_has_the_position_in_the_whole_request() -> None:
    calls = calls_over(EmbedderHandle(), call_tokens=30)
    texts = [f"text {n}" for n in range(40)]
    texts[33] = "a poison text"
    with pytest.raises(EmbeddingFailed) as failed:
        await calls.embed(texts, "", "end", realm="r")
    assert failed.value.position == 33
    texts[33] = "word " * 17
    with pytest.raises(InvalidRequest) as refused:
        await calls.embed(texts, "", "none", realm="r")
    assert refused.value.position == 33
    assert str(refused.value) == "33: has at least 17 tokens; the model reads at most 16"


async def test_an_input_counts_at_most_the_tokens_that_the_model_reads() -> None:
    handle = EmbedderHandle()
    handle.engine = Engine(FakeModel(dim=8, max_tokens=256))
    calls = calls_over(handle, in_flight=1, max_queued_tokens=100_000)
    handle.gate.clear()
    on_its_way = asyncio.create_task(calls.embed(["on its way"], "", "end", realm="r"))
    await turns()
    documents = asyncio.create_task(calls.embed(["words " * 33_333] * 40, "", "end", realm="r"))
    ids = asyncio.create_task(calls.embed([[7] * 1_000, [7] * 100], "", "end", realm="r"))
    await turns()
    sent = sum(sum(call) for call in handle.calls) - 1  # two calls of documents, and beside them all of the ids
    assert (sent, calls.queued_tokens) == (4, 38 * 256)
    handle.gate.set()
    assert (await documents).tokens.tolist() == [256] * 40
    await asyncio.gather(on_its_way, ids)


def limit_of(tokens: int) -> LeasedBucket:
    """A bucket that does not fill up while the test runs."""
    shared = SharedBuckets(lambda: 0.0)

    async def ask(one: Ask) -> Lease:
        return shared.lease(one)

    return LeasedBucket("key", tokens, ask, gateway="one", unit="tokens", clock=lambda: 0.0)


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
async def test_a_request_that_is_cancelled_is_charged_for_the_pieces_that_were_sent(cache_bytes: int) -> None:
    handle = EmbedderHandle()
    calls, limit = calls_over(handle, call_tokens=30, cache_bytes=cache_bytes), limit_of(1000)
    handle.gate.clear()
    with tokens_from(limit):
        asking = asyncio.create_task(calls.embed([f"text {n}" for n in range(100)], "", "end", realm="r"))
        waiting = asyncio.create_task(calls.embed(["other"], "", "end", realm="r"))
        await turns()
        assert sum(sum(call) for call in handle.calls) == 20
        asking.cancel()
        waiting.cancel()
        await asyncio.wait([asking, waiting])
    assert limit.remaining == 1000 - 20 * 3  # an estimate
    handle.gate.set()


async def test_a_request_that_was_cancelled_before_it_was_sent_is_not_charged() -> None:
    handle = EmbedderHandle()
    calls, limit = calls_over(handle), limit_of(1000)
    handle.gate.clear()
    before = [asyncio.create_task(calls.embed([f"{n}"], "", "end", realm="r")) for n in range(2)]
    await turns()
    with tokens_from(limit):
        asking = asyncio.create_task(calls.embed(["text"], "", "end", realm="r"))
        await turns()
        assert limit.remaining == 997
        asking.cancel()
        await asyncio.wait([asking])
    assert (limit.remaining, handle.calls) == (1000, [[1, 1]])
    handle.gate.set()
    await asyncio.gather(*before)


@pytest.mark.parametrize(("bad", "charged"), [("word " * 17, 0), ("a poison text", 5)])
async def test_a_request_that_fails_is_charged_for_the_pieces_that_were_read(bad: str, charged: int) -> None:
    """Of a piece that the embedder refuses it has read nothing; one that it fails on is charged by an estimate."""
    calls, limit = calls_over(EmbedderHandle(), call_tokens=30), limit_of(1000)
    with tokens_from(limit), pytest.raises((InvalidRequest, EmbeddingFailed)):
        await calls.embed([*(f"text {n}" for n in range(20)), bad], "", "none", realm="r")
    assert limit.remaining == 1000 - 20 * 2 - charged


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
async def test_of_token_ids_only_those_that_the_model_reads_are_sent(cache_bytes: int) -> None:
    handle = EmbedderHandle()
    sent: list[Any] = []

    async def embed(requests: Sequence[EmbedRequest]) -> Any:
        sent.extend(requests)
        return await handle._embed(requests)

    handle.embed = Remote(embed)
    calls = calls_over(handle, cache_bytes=cache_bytes)
    ids = [list(range(16)), list(range(1_000))]
    for truncate, kept in (("end", ids[1][:17]), ("start", ids[1][-17:])):
        result = await calls.embed(ids, "", truncate, realm="r")  # type: ignore[arg-type]
        whole = await handle.engine.embed_one(EmbedRequest(ids, "", truncate))  # type: ignore[arg-type]
        assert np.array_equal(result.vectors, whole.vectors)
        assert (result.tokens.tolist(), result.truncated.tolist()) == ([16, 16], [False, True])
        assert sent.pop().inputs == [ids[0], kept]
    with pytest.raises(InvalidRequest) as refused:
        await calls.embed(ids, "", "none", realm="r")
    assert str(refused.value) == "1: has at least 17 tokens; the model reads at most 16"


async def test_texts_past_the_limit_are_refused_at_once() -> None:
    handle = EmbedderHandle()
    calls = calls_over(handle, max_queued_tokens=30)  # each request is a caller: up to twice the limit
    handle.gate.clear()
    waiting = [asyncio.create_task(calls.embed(["on its way"], "", "end", realm="r"))]
    await turns()
    waiting += [asyncio.create_task(calls.embed([f"text {n}"], "", "end", realm="r")) for n in range(20)]
    await turns()

    async def is_refused(texts: list[str]) -> None:
        sent = len(handle.calls)
        refused = asyncio.create_task(calls.embed(texts, "", "end", realm="r"))
        await turns(6)
        assert refused.done()  # without waiting, and without a call
        error = refused.exception()
        assert isinstance(error, Overloaded)
        assert error.retry_after_s > 0
        assert len(handle.calls) == sent

    await is_refused(["one text"])
    bulk = [f"text {n}" for n in range(2000)]
    for _ in range(2):  # two pieces run, two wait
        waiting.append(asyncio.create_task(calls.embed(bulk, "", "end", realm="r")))
        await turns()
    await is_refused(bulk)
    handle.gate.set()
    await asyncio.gather(*waiting)
    await calls.embed(["one text"], "", "end", realm="r")


async def test_a_cached_text_needs_no_call_and_has_the_same_bits() -> None:
    handle = EmbedderHandle()
    calls = calls_over(handle, cache_bytes=1 << 20)
    miss = await calls.embed(["a text", "another"], "", "end", realm="r")
    hit = await calls.embed(["another", "a text"], "", "end", realm="r")
    assert handle.calls == [[2]]
    assert miss.vectors[::-1].tobytes() == hit.vectors.tobytes()
    assert hit.tokens.tolist() == [1, 2]
    await calls.embed(["a text"], "query: ", "end", realm="r")
    assert len(handle.calls) == 2
    assert (calls.cache.hits, calls.cache.misses) == (2, 3)


async def test_a_text_that_is_cut_to_another_length_is_not_answered_from_the_cache() -> None:
    handle = EmbedderHandle()
    handle.engine.model.info = replace(handle.engine.info, max_tokens_of={"query": 2})
    calls = calls_over(handle, cache_bytes=1 << 20)
    whole = await calls.embed(["one two three"], "", "end", realm="r")
    query = await calls.embed(["one two three"], "", "end", realm="r", input_type="query")
    document = await calls.embed(["one two three"], "", "end", realm="r", input_type="document")
    two = await calls.embed(["one two"], "", "end", realm="r")
    assert [one.tokens.tolist() for one in (whole, query, document)] == [[3], [2], [3]]
    assert np.array_equal(query.vectors, two.vectors) and not np.array_equal(query.vectors, whole.vectors)
    assert handle.calls == [[1], [1], [1]]  # the document is read as far as the first input: a cache hit


async def test_concurrent_requests_for_one_text_compute_it_once() -> None:
    handle = EmbedderHandle()
    calls = calls_over(handle, cache_bytes=1 << 20)
    results = await asyncio.gather(*(calls.embed(["same"], "", "end", realm="r") for _ in range(50)))
    assert handle.engine.stats().texts == 1
    assert len({result.vectors.tobytes() for result in results}) == 1


async def test_requests_that_a_stopping_embedder_did_not_begin_go_to_another() -> None:
    handle = EmbedderHandle()
    ends = handle.engine = Engine(Slow(dim=8), max_batch_tokens=1)
    calls = calls_over(handle)
    asking = asyncio.create_task(calls.embed(["one", "two", "three"], "", "end", realm="r"))
    both = asyncio.create_task(calls.embed(["four", "five"], "", "end", realm="r"))
    await turns()
    assert ends.stats().running_forwards == 1
    closing = asyncio.create_task(ends.close())
    handle.engine = Engine(FakeModel(dim=8))
    await turns()
    ends.model.go.set()  # type: ignore[attr-defined]
    await closing
    whole, other = await asyncio.gather(asking, both)
    expected = (await handle.engine.embed_one(EmbedRequest(["one", "two", "three", "four", "five"]))).vectors
    assert np.array_equal(np.concatenate([whole.vectors, other.vectors]), expected)
    assert handle.calls == [[3, 2], [3, 2]]


async def test_requests_are_resent_once_after_a_stopping_embedder() -> None:
    handle = EmbedderHandle()
    await handle.engine.close()
    with pytest.raises(ShuttingDown):
        await calls_over(handle).embed(["one"], "", "end", realm="r")
    assert handle.calls == [[1], [1]]


async def test_a_write_whose_replica_was_lost_is_not_denied_by_a_later_error() -> None:
    answers: list[Exception] = [ray.exceptions.WorkerCrashedError(), BackPressureError(1, 1)]

    async def lost() -> str:
        raise answers.pop(0)

    with pytest.raises(Unavailable) as unknown:
        await resilient(lost, "store", writes=True)
    assert unknown.value.code == OUTCOME_UNKNOWN
    answers = [BackPressureError(1, 1)]
    with pytest.raises(Overloaded):
        await resilient(lost, "store", writes=True)
    assert answers == []


async def test_a_write_that_was_dropped_from_the_queue_was_not_made_unless_an_earlier_replica_was_lost() -> None:
    late = DeadlineExceeded("The request waited in the queue until its deadline passed.")
    answers: list[Any] = [late, ray.exceptions.WorkerCrashedError(), late, ray.exceptions.WorkerCrashedError(), late]

    async def write() -> Any:
        answer = answers.pop(0)
        if isinstance(answer, DeadlineExceeded):
            return answer
        raise answer

    assert await resilient(write, "store", writes=True) is late
    with pytest.raises(Unavailable) as unknown:
        await resilient(write, "store", writes=True)
    assert unknown.value.code == OUTCOME_UNKNOWN
    assert await resilient(write, "store") is late
    assert answers == []


def test_a_caller_has_as_many_unbatched_calls_as_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployments.calls.resilient, "MAX_UNBATCHED_CALLS", 4)
    calls = UnbatchedCalls("store")
    ann, bob = Turn("ann"), Turn("bob")
    with ExitStack() as held:
        for turn in (ann, ann, ann, ann, bob, bob):
            held.enter_context(calls.admit(turn))
        for turn in (ann, bob):
            with pytest.raises(Overloaded):
                held.enter_context(calls.admit(turn))
        held.enter_context(calls.admit(ann.after_begin()))
        held.enter_context(calls.admit(Turn("carl")))
        with pytest.raises(Overloaded):  # nine would be more than twice the limit
            held.enter_context(calls.admit(Turn("dora")))
    with ExitStack() as held:
        for _ in range(4):
            held.enter_context(calls.admit(ann))


def test_bulk_calls_take_no_room_from_urgent_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployments.calls.resilient, "MAX_UNBATCHED_CALLS", 4)
    calls = UnbatchedCalls("store")
    with ExitStack() as held:
        for number in range(8):
            held.enter_context(calls.admit(Turn(f"bulk {number}", bulk=True)))
        with pytest.raises(Overloaded):
            held.enter_context(calls.admit(Turn("ann", bulk=True)))
        for _ in range(4):
            held.enter_context(calls.admit(Turn("ann")))
        with pytest.raises(Overloaded):
            held.enter_context(calls.admit(Turn("ann")))


async def test_a_call_whose_replica_died_is_sent_again() -> None:
    died = 0

    async def dies(times: int) -> str:
        nonlocal died
        if died < times:
            died += 1
            raise ray.exceptions.WorkerCrashedError
        return "answer"

    assert await resilient(lambda: dies(ATTEMPTS - 1), "embedder") == "answer"
    died = 0
    with pytest.raises(Unavailable) as lost:
        await resilient(lambda: dies(ATTEMPTS), "embedder")
    assert lost.value.code == "embedder_unavailable"


# Bulk requests, which are sent piece by piece.

BULK = [f"text {n}" for n in range(600)]  # about 2,200 tokens, as estimated: nine calls


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
async def test_a_bulk_request_is_sent_piece_by_piece(cache_bytes: int) -> None:
    handle = EmbedderHandle()
    calls = calls_over(handle, cache_bytes=cache_bytes)
    handle.gate.clear()
    bulk = asyncio.create_task(calls.embed(BULK, "", "end", realm="r"))
    await turns()
    assert (len(handle.calls), calls.batcher.queued) == (2, 0)  # one call, and one ahead
    whole = sum(len(text) // 4 + 2 for text in BULK)
    sent = sum(len(text) // 4 + 2 for text in BULK[: sum(map(sum, handle.calls))])
    assert calls.queued_tokens == whole - sent
    handle.gate.set()
    result = await bulk
    assert calls.queued_tokens == 0
    assert sum(map(sum, handle.calls)) == len(BULK)
    assert np.array_equal(result.vectors, (await handle.engine.embed_one(EmbedRequest(BULK))).vectors)


async def test_urgent_requests_are_sent_while_bulk_calls_are_in_progress() -> None:
    handle = EmbedderHandle()
    calls = calls_over(handle)
    handle.gate.clear()
    bulk = asyncio.create_task(calls.embed(BULK, "", "end", realm="r"))
    await turns()
    single = asyncio.create_task(calls.embed(["a single text"], "", "end", realm="r"))
    small = asyncio.create_task(calls.embed(["a", "small", "request"], "", "end", realm="r"))
    await turns()
    assert handle.calls[2:] == [[1, 3]]
    handle.gate.set()
    await asyncio.gather(bulk, single, small)


async def test_after_an_error_no_further_piece_is_sent_and_the_first_error_is_raised() -> None:
    handle = EmbedderHandle()
    calls = calls_over(handle)
    texts = list(BULK)
    texts[80], texts[10] = "a poison text", "another poison text"  # in the second piece and in the first
    with pytest.raises(EmbeddingFailed) as failed:
        await calls.embed(texts, "", "end", realm="r")
    assert failed.value.position == 10
    assert len(handle.calls) == 2
    assert (calls.queued_tokens, calls.batcher.queued) == (0, 0)


async def test_a_cancelled_bulk_request_leaves_nothing_behind() -> None:
    handle = EmbedderHandle()
    calls = calls_over(handle)
    handle.gate.clear()
    first = asyncio.create_task(calls.embed(BULK, "", "end", realm="r"))
    await turns()
    second = asyncio.create_task(calls.embed(BULK, "", "end", realm="r"))
    await turns()
    assert calls.batcher.queued == 2
    for task in (first, second):
        task.cancel()
    await turns()
    assert (calls.queued_tokens, calls.batcher.queued, len(handle.calls)) == (0, 0, 2)
    handle.gate.set()
    await turns()
    assert len(handle.calls) == 2


async def test_the_deadline_is_sent_as_the_time_that_remains() -> None:
    now = [100.0]
    handle = EmbedderHandle()
    received: list[EmbedRequest] = []

    async def embed(requests: Sequence[EmbedRequest]) -> Any:
        received.extend(requests)
        return await handle._embed(requests)

    handle.embed = Remote(embed)
    calls = calls_over(handle, max_wait_s=30.0, clock=lambda: now[0])
    handle.gate.clear()
    first = asyncio.create_task(calls.embed(["first"], "", "end", realm="r", turn=Turn("a", deadline=None)))
    await turns()
    waiting = [
        asyncio.create_task(calls.embed([text], "", "end", realm="r", turn=Turn("b", deadline=deadline)))
        for text, deadline in (("in time", 107.0), ("too late", 101.0))
    ]
    await turns()
    now[0] = 102.5
    handle.gate.set()
    await first
    await waiting[0]
    with pytest.raises(DeadlineExceeded):
        await waiting[1]
    assert [(one.inputs, one.caller, one.bulk, one.timeout_s) for one in received] == [
        (["first"], "a", False, None),
        (["in time"], "b", False, 4.5),
    ]


async def test_a_text_of_megabytes_counts_by_its_memory() -> None:
    handle = EmbedderHandle()
    calls = calls_over(handle, max_queued_tokens=4000)
    handle.gate.clear()
    long = "word " * 800_000  # four million characters, of which the model reads 16 tokens
    first = asyncio.create_task(calls.embed(["first"], "", "end", realm="r"))
    await turns()
    waiting = [asyncio.create_task(calls.embed([long + str(n)], "", "end", realm="r")) for n in range(8)]
    await turns()
    each = (len(long) + 1) // MOST_CHARACTERS_PER_TOKEN
    assert (each, calls.queued_tokens) == (976, 7 * 976)  # one is sent
    waiting.append(asyncio.create_task(calls.embed([long + "8"], "", "end", realm="r")))
    await turns()
    with pytest.raises(Overloaded):  # nine texts would count more than twice the limit
        await calls.embed([long], "", "end", realm="r")
    for task in [first, *waiting]:
        task.cancel()
    await asyncio.gather(first, *waiting, return_exceptions=True)
    handle.gate.set()


async def test_a_prompt_counts_with_each_text() -> None:
    """The prompt of a reranker is the query, which it reads with each text: 42 + 6 characters are 14 tokens."""
    handle = EmbedderHandle()
    calls = calls_over(handle, call_tokens=28)
    await calls.embed([f"text {n}" for n in range(8)], "what was it that my sister told me on phon", "end", realm="r")
    assert [inputs for call in handle.calls for inputs in call] == [2] * 4


async def test_errors_name_the_deployment_that_is_called() -> None:
    class Lost(EmbedderHandle):
        async def _info(self) -> Any:
            raise RayServeException

    calls = calls_over(Lost(), deployment="reranker")
    with pytest.raises(Unavailable, match=r"^The reranker is not available; try again\.$") as caught:
        await calls.embed(["a"], "", "end", realm="r")
    assert caught.value.code == "reranker_unavailable"
