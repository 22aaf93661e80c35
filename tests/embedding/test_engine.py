"""The engine with the fake model: exact vectors, exact batches."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from deployments.embedding.engine import BatchStats, EmbedRequest, EmbedResult, Engine
from deployments.embedding.fake import FakeModel
from deployments.embedding.model import InputType, Model, TextToken, Tokens, Truncate
from deployments.errors import (
    DeadlineExceeded,
    EmbeddingFailed,
    InvalidRequest,
    Overloaded,
    Unavailable,
    UpstreamFailed,
)


class Held(FakeModel):
    """A fake model whose forwards wait until the test lets them go."""

    forwards_in_flight = 1

    def __init__(self) -> None:
        super().__init__()
        self.held: list[asyncio.Event] = []
        self.tokenized = 0

    async def tokenize(
        self,
        inputs: Sequence[str] | Sequence[Sequence[int]],
        prompt: str,
        truncate: Truncate,
        input_type: InputType | None = None,
    ) -> list[Tokens | int]:
        self.tokenized += len(inputs)
        return await super().tokenize(inputs, prompt, truncate, input_type)

    async def forward(self, batch: Sequence[Tokens]) -> np.ndarray:
        gate = asyncio.Event()
        self.held.append(gate)
        await gate.wait()
        return await super().forward(batch)

    async def let_go(self) -> None:
        await turns()
        self.held.pop(0).set()
        await turns()


async def turns() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def expected(model: FakeModel, texts: list[str], prompt: str = "") -> np.ndarray:
    tokens = await model.tokenize(texts, prompt, "end")
    return np.stack([model._vector(one.ids) for one in tokens if isinstance(one, Tokens)])


def result(answer: EmbedResult | Exception) -> EmbedResult:
    assert isinstance(answer, EmbedResult), answer
    return answer


@pytest.mark.parametrize(
    ("own_limit", "calls"),
    [(None, [["a b c", "a b d"]]), (2, [["a b c"], ["a b d"]])],
    ids=["one limit", "queries have their own limit"],
)
async def test_queries_and_documents_share_a_call_of_the_tokenizer_unless_their_limits_differ(
    own_limit: int | None, calls: list[list[str]]
) -> None:
    model = FakeModel()
    if own_limit is not None:
        model.info = replace(model.info, max_tokens_of={"query": own_limit})
    tokenize, seen = model.tokenize, []

    async def noted(inputs: Sequence[str], *how: Any) -> list[Tokens | int]:
        seen.append(list(inputs))
        return await tokenize(inputs, *how)

    model.tokenize = noted  # type: ignore[assignment, method-assign]
    requests = [EmbedRequest(["a b c"], input_type="query"), EmbedRequest(["a b d"], input_type="document")]
    query, document = map(result, await Engine(model).embed(requests))
    assert seen == calls
    assert (query.tokens.tolist(), document.tokens.tolist()) == ([own_limit or 3], [3])


async def test_warm_up_runs_the_longest_inputs_a_full_batch_of_short_texts_and_a_short_text() -> None:
    class Warmed(FakeModel):
        warm_up = Model.warm_up

    model = Warmed(max_tokens=64)
    model.info = replace(model.info, max_tokens_of={"document": 100})
    await Engine(model, max_batch_tokens=320, forwards_in_flight=2).warm_up()
    assert model.batches == 2 * [[100] * 3] + 2 * [[16] * 20] + 2 * [[16]]


async def test_vectors_are_in_the_order_of_the_inputs_over_many_forwards() -> None:
    model = FakeModel()
    engine = Engine(model, max_batch_tokens=16)
    texts = [" ".join(f"w{number}" for number in range(1 + index * 7 % 11)) for index in range(40)]
    answer = await engine.embed_one(EmbedRequest(texts))
    assert np.array_equal(answer.vectors, await expected(model, texts))
    assert answer.vectors.dtype == np.float32 and answer.vectors.flags["C_CONTIGUOUS"]
    assert answer.tokens.tolist() == [len(text.split()) for text in texts] and answer.tokens.dtype == np.int32
    assert answer.truncated.tolist() == [False] * 40
    assert len(model.batches) > 1
    assert all(len(batch) == 1 or len(batch) * max(batch) <= 16 for batch in model.batches)


async def test_many_requests_share_forwards_and_keep_their_own_vectors() -> None:
    model = FakeModel()
    engine = Engine(model, max_batch_tokens=1024)
    requests = [EmbedRequest([f"a{index}", f"b{index}"], prompt="query: " if index % 2 else "") for index in range(30)]
    answers = await engine.embed(requests)
    for request, answer in zip(requests, answers, strict=True):
        assert np.array_equal(
            result(answer).vectors, await expected(model, list(map(str, request.inputs)), request.prompt)
        )
    assert [len(batch) for batch in model.batches] == [60]


async def test_only_the_poisoned_text_in_a_batch_of_64_fails() -> None:
    model = FakeModel()
    engine = Engine(model, max_batch_tokens=1024)
    texts = [f"text {index}" if index != 41 else "poison here" for index in range(64)]
    answers = await engine.embed([EmbedRequest([text]) for text in texts])
    assert [index for index, answer in enumerate(answers) if isinstance(answer, Exception)] == [41]
    failed = answers[41]
    assert isinstance(failed, EmbeddingFailed) and failed.position == 0
    assert failed.message == "the model failed on this input: the fake model was told to fail on this text"
    assert np.array_equal(result(answers[40]).vectors, await expected(model, [texts[40]]))
    assert len(model.batches[0]) == 64
    assert engine.stats().failed_texts == 1


@pytest.mark.parametrize(("queue_enabled", "failed"), [(True, 2), (False, 4)])
async def test_failed_texts_are_counted(queue_enabled: bool, failed: int) -> None:
    """Without the queue, a request is a batch, and it fails as a whole."""
    engine = Engine(FakeModel(), queue_enabled=queue_enabled)
    with pytest.raises(EmbeddingFailed) as error:
        await engine.embed_one(EmbedRequest(["fine", "poison a", "fine too", "poison b"]))
    assert error.value.position == (1 if queue_enabled else 0)
    assert engine.stats().failed_texts == failed


async def test_out_of_memory_halves_the_batch_until_only_a_text_that_fails_alone_fails() -> None:
    model = FakeModel(oom_above_tokens=40)
    engine = Engine(model, max_batch_tokens=256)
    texts = ["one two three"] * 30 + [" ".join(["long"] * 41)]
    answers = await engine.embed([EmbedRequest([text]) for text in texts])
    assert [index for index, answer in enumerate(answers) if isinstance(answer, EmbeddingFailed)] == [30]
    assert np.array_equal(result(answers[0]).vectors, await expected(model, texts[:1]))
    assert max(len(batch) * max(batch) for batch in model.batches) > 40


async def test_a_vector_that_is_not_finite_is_an_error_of_its_request() -> None:
    engine = Engine(FakeModel())
    good, bad = await engine.embed([EmbedRequest(["fine"]), EmbedRequest(["fine", "notanumber"])])
    assert isinstance(bad, EmbeddingFailed) and bad.position == 1
    assert np.isfinite(result(good).vectors).all()


@pytest.mark.parametrize(
    ("request_", "position", "field", "message"),
    [
        (EmbedRequest([]), None, "input", "must not be empty"),
        (EmbedRequest(["a", ""]), 1, None, "must not be empty"),
        (EmbedRequest([[1], []]), 1, None, "must not be empty"),
        (
            EmbedRequest([[1, 2, 1 << 20]]),
            0,
            None,
            f"holds the token id {1 << 20}, which is outside the vocabulary of {1 << 20} tokens",
        ),
        (
            EmbedRequest([[-1]]),
            0,
            None,
            f"holds the token id -1, which is outside the vocabulary of {1 << 20} tokens",
        ),
        (
            EmbedRequest(["a", "b " * 300], truncate="none"),
            1,
            None,
            "has at least 300 tokens; the model reads at most 256",
        ),
        (EmbedRequest([[7] * 257], truncate="none"), 0, None, "has at least 257 tokens; the model reads at most 256"),
        (EmbedRequest(["a", "\ud800"]), 1, None, "is not valid Unicode: it holds half of a surrogate pair"),
        (EmbedRequest([" "]), 0, None, "holds nothing to embed"),
    ],
)
async def test_bad_input_is_refused_before_it_joins_a_batch(
    request_: EmbedRequest, position: int | None, field: str | None, message: str
) -> None:
    model = FakeModel()
    good, bad = await Engine(model).embed([EmbedRequest(["fine"]), request_])
    assert isinstance(bad, InvalidRequest)
    assert (bad.position, bad.field, bad.message) == (position, field, message)
    assert isinstance(good, EmbedResult)
    assert model.batches == [[1]]


@pytest.mark.parametrize(("truncate", "kept"), [("end", slice(0, 256)), ("start", slice(44, 300))])
async def test_inputs_that_are_too_long_are_cut_at_the_requested_end(truncate: Truncate, kept: slice) -> None:
    model = FakeModel()
    words = [f"w{index}" for index in range(300)]
    answer = await Engine(model).embed_one(EmbedRequest([" ".join(words), "short"], truncate=truncate))
    assert np.array_equal(answer.vectors, await expected(model, [" ".join(words[kept]), "short"]))
    assert (answer.tokens.tolist(), answer.truncated.tolist()) == ([256, 1], [True, False])


async def test_token_ids_are_used_verbatim_beside_texts() -> None:
    model = FakeModel()
    texts, ids = await Engine(model).embed([EmbedRequest(["x y"], "query: "), EmbedRequest([[5, 6, 5]], "query: ")])
    assert np.array_equal(result(texts).vectors, await expected(model, ["query: x y"]))
    assert np.array_equal(result(ids).vectors[0], model._vector([5, 6, 5]))


async def test_a_cancelled_request_leaves_the_queue_before_the_forward() -> None:
    model = Held()
    engine = Engine(model)
    first = asyncio.create_task(engine.embed_one(EmbedRequest(["first"])))
    await turns()
    gone = asyncio.create_task(engine.embed([EmbedRequest(["gone away"] * 5)]))
    stays = asyncio.create_task(engine.embed_one(EmbedRequest(["stays"])))
    await turns()
    assert engine.stats().queued_texts == 6
    gone.cancel()
    await turns()
    assert (engine.stats().queued_texts, engine.stats().queued_tokens) == (1, 1)
    await model.let_go()
    await model.let_go()
    assert np.array_equal((await stays).vectors, await expected(model, ["stays"]))
    assert (await first).vectors.shape == (1, 32)
    assert model.batches == [[1], [1]]


async def test_the_next_batch_is_tokenized_while_a_forward_runs() -> None:
    model = Held()
    engine = Engine(model)
    tasks = [asyncio.create_task(engine.embed_one(EmbedRequest(["a"])))]
    await turns()
    assert len(model.held) == 1
    tasks += [asyncio.create_task(engine.embed_one(EmbedRequest(["b"]))) for _ in range(9)]
    await turns()
    assert (model.tokenized, engine.stats().queued_texts) == (10, 9)
    await model.let_go()
    await model.let_go()
    await asyncio.gather(*tasks)
    assert model.batches == [[1], [1] * 9]


async def test_short_texts_do_not_wait_for_a_long_one_to_be_tokenized() -> None:
    model, read = FakeModel(), asyncio.Event()
    tokenize = model.tokenize

    async def tokenize_slowly(inputs: Any, *options: Any) -> Any:
        if len(inputs[0]) > 65_536:
            await read.wait()
        return await tokenize(inputs, *options)

    model.tokenize = tokenize_slowly  # type: ignore[method-assign]
    engine = Engine(model)
    long, given_up = (asyncio.create_task(engine.embed_one(EmbedRequest(["word " * 20_000]))) for _ in range(2))
    await turns()
    assert engine.stats().queued_tokens == 256  # of the second long text: an input counts at most what is read of it
    short = await engine.embed_one(EmbedRequest(["short"]))
    assert np.array_equal(short.vectors, await expected(model, ["short"]))
    assert not long.done()
    given_up.cancel()
    await turns()
    assert engine.stats().queued_tokens == 0
    read.set()
    assert (await long).tokens.tolist() == [256]


async def test_requests_over_the_limit_are_refused_before_they_are_tokenized() -> None:
    model = Held()
    engine = Engine(model, max_queued_tokens=10)
    tasks = [asyncio.create_task(engine.embed_one(EmbedRequest(["a"])))]
    await turns()
    tasks += [asyncio.create_task(engine.embed_one(EmbedRequest(["b c d e f"] * 2, caller="a")))]
    await turns()
    tokenized = model.tokenized
    for caller, many in (("a", 1), ("a", 500), ("b", 11)):
        with pytest.raises(Overloaded):
            await engine.embed_one(EmbedRequest(["x"] * many, caller=caller))
    assert model.tokenized == tokenized
    await model.let_go()
    await model.let_go()
    await asyncio.gather(*tasks)
    assert engine.stats().queued_tokens == 0


async def test_without_the_queue_each_request_is_a_forward_of_its_own() -> None:
    model = FakeModel()
    engine = Engine(model, queue_enabled=False, max_batch_tokens=4)
    answers = await engine.embed([EmbedRequest(["a", "b c d e f"]), EmbedRequest(["g"]), EmbedRequest(["poison"])])
    assert np.array_equal(result(answers[0]).vectors, await expected(model, ["a", "b c d e f"]))
    assert isinstance(answers[2], EmbeddingFailed)
    assert model.batches == [[1, 5], [1], [1]]


async def test_without_the_queue_requests_run_in_the_order_of_arrival_and_cancelled_ones_do_not() -> None:
    model = Held()
    engine = Engine(model, queue_enabled=False)
    tasks = [asyncio.create_task(engine.embed_one(EmbedRequest(["a"] * texts))) for texts in (1, 2, 3, 4)]
    await turns()
    assert (engine.stats().running_forwards, engine.stats().queued_texts, engine.stats().queued_tokens) == (1, 9, 9)
    tasks.pop(1).cancel()
    await turns()
    assert (engine.stats().queued_texts, engine.stats().queued_tokens) == (7, 7)
    for _ in tasks:
        await model.let_go()
    assert [len((await task).vectors) for task in tasks] == [1, 3, 4]
    assert model.batches == [[1], [1] * 3, [1] * 4]


async def test_without_the_queue_a_request_over_the_limit_is_refused_too() -> None:
    model = Held()
    engine = Engine(model, queue_enabled=False, max_queued_tokens=3)
    tasks = [asyncio.create_task(engine.embed_one(EmbedRequest(["a"] * texts))) for texts in (1, 2)]
    await turns()
    with pytest.raises(Overloaded):
        await engine.embed_one(EmbedRequest(["a"] * 2))
    for _ in tasks:
        await model.let_go()
    await asyncio.gather(*tasks)


async def test_a_batch_that_fails_upstream_is_not_retried_in_halves() -> None:
    class Down(FakeModel):
        calls = 0

        async def forward(self, batch: Sequence[Tokens]) -> np.ndarray:
            self.calls += 1
            raise UpstreamFailed("no")

    model = Down()
    answers = await Engine(model).embed([EmbedRequest(["a"]) for _ in range(8)])
    assert [type(answer) for answer in answers] == [UpstreamFailed] * 8
    assert model.calls == 1


async def test_batches_and_timings_are_reported() -> None:
    now = [0.0]

    class Slow(FakeModel):
        async def forward(self, batch: Sequence[Tokens]) -> np.ndarray:
            now[0] += 2.0
            return await super().forward(batch)

    told: list[BatchStats] = []
    engine = Engine(Slow(), max_batch_tokens=6, on_batch=told.append, clock=lambda: now[0])
    answer = await engine.embed_one(EmbedRequest(["a b c", "d", "e f g"]))
    assert told == [BatchStats(2, 6, 6, 2.0), BatchStats(1, 1, 1, 2.0)]
    assert (answer.timings.queue_s, answer.timings.tokenize_s, answer.timings.forward_s) == (2.0, 0.0, 2.0)
    stats = engine.stats()
    assert (stats.forwards, stats.texts, stats.tokens, stats.padded_tokens, stats.forward_s) == (2, 3, 7, 7, 4.0)


async def test_limits_of_a_running_engine_can_be_changed() -> None:
    model = FakeModel()
    engine = Engine(model, max_batch_tokens=2)
    engine.reconfigure(max_batch_tokens=3)
    await engine.embed_one(EmbedRequest(["a"] * 4))
    assert model.batches == [[1, 1, 1], [1]]


async def test_a_lost_device_is_unhealthy() -> None:
    model = FakeModel()
    engine = Engine(model)
    engine.check_health()
    model.lost = "an illegal memory access was encountered"
    with pytest.raises(Unavailable, match="illegal memory access"):
        engine.check_health()


async def test_after_close_requests_are_unavailable() -> None:
    engine = Engine(FakeModel())
    await engine.close()
    with pytest.raises(Unavailable):
        await engine.embed_one(EmbedRequest(["late"]))


async def test_a_lone_request_goes_before_the_bulk_that_waits_and_shares_no_forward_with_it() -> None:
    model = Held()
    engine = Engine(model, max_batch_tokens=4)
    bulk = asyncio.create_task(engine.embed_one(EmbedRequest(["a b"] * 8, caller="bulk", bulk=True)))
    await turns()
    lone = asyncio.create_task(engine.embed_one(EmbedRequest(["c"])))
    await model.let_go()
    await model.let_go()
    assert np.array_equal((await lone).vectors, await expected(model, ["c"]))
    assert model.batches == [[2, 2], [1]]
    for _ in range(3):
        await model.let_go()
    assert np.array_equal((await bulk).vectors, await expected(model, ["a b"] * 8))
    assert model.batches == [[2, 2], [1], [2, 2], [2, 2], [2, 2]]


async def test_callers_take_turns_at_the_device() -> None:
    model = Held()
    engine = Engine(model, max_batch_tokens=4)
    first = asyncio.create_task(engine.embed_one(EmbedRequest(["x"])))
    await turns()
    many = [asyncio.create_task(engine.embed_one(EmbedRequest(["a b"] * 2, caller="many"))) for _ in range(5)]
    few = asyncio.create_task(engine.embed_one(EmbedRequest(["c d"] * 2, caller="few")))
    for _ in range(3):
        await model.let_go()
    assert few.done()
    assert [task.done() for task in many] == [True, False, False, False, False]
    for _ in range(4):
        await model.let_go()
    await asyncio.gather(first, *many)


async def test_a_text_past_its_deadline_does_not_reach_the_device() -> None:
    model = Held()
    engine = Engine(model, max_batch_tokens=4)
    first = asyncio.create_task(engine.embed_one(EmbedRequest(["a"])))
    await turns()
    with pytest.raises(DeadlineExceeded):
        await engine.embed_one(EmbedRequest(["b"], timeout_s=0.001))
    tokenized = model.tokenized
    with pytest.raises(DeadlineExceeded):  # has no time left: is not even tokenized
        await engine.embed_one(EmbedRequest(["b"], timeout_s=0.0))
    assert (model.tokenized, engine.stats().queued_texts) == (tokenized, 0)
    await model.let_go()
    assert (await first).tokens.tolist() == [1]
    assert model.batches == [[1]]


async def test_a_text_that_waits_longer_than_the_limit_does_not_reach_the_device() -> None:
    now = [0.0]
    model = Held()
    engine = Engine(model, max_wait_s=30.0, clock=lambda: now[0])
    first = asyncio.create_task(engine.embed_one(EmbedRequest(["a"])))
    await turns()
    waits = asyncio.create_task(engine.embed_one(EmbedRequest(["b"])))
    await turns()
    now[0] = 31.0
    engine.reconfigure(max_wait_s=60.0)
    later = asyncio.create_task(engine.embed_one(EmbedRequest(["c"])))
    await model.let_go()
    assert isinstance(waits.exception(), DeadlineExceeded)
    await model.let_go()
    assert [len((await task).vectors) for task in (first, later)] == [1, 1]
    assert model.batches == [[1], [1]]


async def test_later_parts_of_a_request_are_not_refused() -> None:
    model = Held()
    engine = Engine(model, max_queued_tokens=4)
    request = EmbedRequest(["a b c d"], caller="ann")
    parts = [asyncio.ensure_future(engine.embed_one(request))]
    await turns()
    for part in (request, replace(request, begun=True)):
        parts.append(asyncio.ensure_future(engine.embed_one(part)))
        await turns()
    with pytest.raises(Overloaded):
        await engine.embed_one(request)
    while not all(part.done() for part in parts):
        await model.let_go()
    assert [len(part.result().vectors) for part in parts] == [1, 1, 1]


async def test_a_call_that_splits_or_decodes_waits_for_its_turn_until_its_deadline() -> None:
    engine = Engine(FakeModel())
    long = ["a " * 8_192] * 2  # two parts
    async with engine._splitting:
        for call in (
            engine.split(["a"], timeout_s=0.001),
            engine.decode([[5]], timeout_s=0.001),
            engine.split(["a"], timeout_s=0.0),
        ):
            with pytest.raises(DeadlineExceeded):
                await call
        engine.reconfigure(max_wait_s=0.001)
        with pytest.raises(DeadlineExceeded):
            await engine.split(["a"], timeout_s=60.0)
        engine.reconfigure(max_wait_s=60.0)
        waiting = asyncio.create_task(engine.split(long, timeout_s=60.0))
        await turns()
    assert [len(tokens) for tokens in await waiting] == [8_192, 8_192]


async def test_no_part_is_split_after_the_deadline() -> None:
    now, parts = [0.0], []

    class Slow(FakeModel):
        async def split(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[TextToken]]:
            parts.append(list(texts))
            now[0] += 1.0
            return await super().split(texts, add_special_tokens=add_special_tokens)

    engine = Engine(Slow(), clock=lambda: now[0])
    texts = [letter * 8_192 for letter in "abc"]
    with pytest.raises(DeadlineExceeded):
        await engine.split(texts, timeout_s=2.0)
    assert parts == [texts[:1], texts[1:2]]


@pytest.mark.parametrize("pads", [True, False])
async def test_a_batch_holds_at_most_as_many_texts_as_are_allowed(pads: bool) -> None:
    batches: list[BatchStats] = []
    model = FakeModel()
    model.pads = pads
    engine = Engine(model, max_batch_texts=32, on_batch=batches.append)
    texts = [" ".join(["word"] * (1 + n % 7)) for n in range(100)]
    result = await engine.embed_one(EmbedRequest(texts))
    assert [batch.texts for batch in batches] == [32, 32, 32, 4]
    assert np.array_equal(result.vectors, (await Engine(FakeModel()).embed_one(EmbedRequest(texts))).vectors)
    await engine.close()
