"""A remote model, against a scripted server on the loopback interface."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from deployments.embedding.engine import EmbedRequest, Engine
from deployments.embedding.load import load_model
from deployments.embedding.outputs import EmbedResult
from deployments.embedding.remote import RemoteModel
from deployments.errors import InvalidRequest, ModelUnavailable, UpstreamFailed

DIM = 6


def vector(given: Any) -> np.ndarray:
    seed = int.from_bytes(json.dumps(given).encode(), "little") % (1 << 32)
    return np.random.default_rng(seed).standard_normal(DIM).astype(np.float32)


class Provider:
    """An OpenAI-compatible server. It first gives the answers in `failures`, which are pairs of status and body."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.failures: list[tuple[int, Any]] = []
        self.refuse: str | None = None
        self.broken: Any = None
        provider = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                provider.requests.append(body)
                provider.keys.append(self.headers["authorization"])
                status, answer = provider.answer(body)
                payload = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(payload)))
                self.send_header("retry-after-ms", "1")
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, format: str, *args: Any) -> None:
                """Quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, body: dict[str, Any]) -> tuple[int, Any]:
        if self.failures:
            return self.failures.pop(0)
        if self.broken is not None:
            return 200, self.broken
        if self.refuse is not None and self.refuse in body["input"]:
            return 400, {"error": {"message": "this input is too long", "type": "invalid_request_error"}}
        data = [
            {"object": "embedding", "index": index, "embedding": base64.b64encode(vector(given).tobytes()).decode()}
            for index, given in enumerate(body["input"])
        ]
        usage = {"prompt_tokens": 1, "total_tokens": 1}
        return 200, {"object": "list", "model": body["model"], "data": data[::-1], "usage": usage}


@pytest.fixture
def provider() -> Iterator[Provider]:
    made = Provider()
    yield made
    made.server.shutdown()
    made.server.server_close()


def remote(provider: Provider, **options: Any) -> RemoteModel:
    model = load_model("openai", "their-model", base_url=provider.url, **{"dim": DIM, "max_retries": 2, **options})
    assert isinstance(model, RemoteModel)
    return model


async def test_vectors_are_the_providers_bit_for_bit_and_in_order(
    provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THEIR_KEY", "secret")
    engine = Engine(remote(provider, api_key_env="THEIR_KEY"))
    texts, ids = await engine.embed([EmbedRequest(["a", "b", "c"], "query: "), EmbedRequest([[5, 6]])])
    assert isinstance(texts, EmbedResult) and isinstance(ids, EmbedResult)
    assert np.array_equal(texts.vectors, np.stack([vector(f"query: {text}") for text in "abc"]))
    assert np.array_equal(ids.vectors, vector([5, 6])[None])
    # One call holds texts or token ids, not both. Apart from that, all inputs share a call.
    assert [request["input"] for request in provider.requests] == [["query: a", "query: b", "query: c"], [[5, 6]]]
    assert provider.requests[0]["model"] == "their-model" and set(provider.keys) == {"Bearer secret"}
    await engine.close()


async def test_the_provider_is_asked_for_the_dimension_if_it_is_not_given(provider: Provider) -> None:
    model = remote(provider, dim=None)
    assert (model.info.dim, model.info.name, model.info.device) == (DIM, "their-model", "remote")
    await model.close()


async def test_a_call_to_a_busy_provider_is_retried(provider: Provider) -> None:
    provider.failures = [(429, {"error": {"message": "slow down"}}), (500, {})]
    engine = Engine(remote(provider))
    assert (await engine.embed_one(EmbedRequest(["a"]))).vectors.shape == (1, DIM)
    assert len(provider.requests) == 3
    await engine.close()


@pytest.mark.parametrize(("upstream", "status"), [(429, 503), (503, 503), (504, 504), (500, 502), (401, 502)])
async def test_the_providers_failures_carry_its_message(provider: Provider, upstream: int, status: int) -> None:
    provider.failures = [(upstream, {"error": {"message": "what the upstream said"}})] * 9
    engine = Engine(remote(provider))
    answers = await engine.embed([EmbedRequest(["a"]), EmbedRequest(["b"])])
    for answer in answers:
        assert isinstance(answer, UpstreamFailed)
        assert (answer.status, str(answer)) == (status, "what the upstream said")
    # The call is retried as often as allowed, but not in halves. A refused key is not retried.
    assert len(provider.requests) == (1 if upstream == 401 else 3)
    await engine.close()


async def test_a_400_of_the_provider_fails_only_the_bad_input(provider: Provider) -> None:
    provider.refuse = "far too long"
    engine = Engine(remote(provider))
    good, bad, fine = await engine.embed([EmbedRequest([text]) for text in ("a", "far too long", "b")])
    assert isinstance(bad, InvalidRequest) and bad.message == "this input is too long"
    assert isinstance(good, EmbedResult) and isinstance(fine, EmbedResult)
    (listed,) = await engine.embed([EmbedRequest(["a", "far too long", "b"])])
    assert isinstance(listed, InvalidRequest)
    assert (bad.position, bad.field, listed.position, listed.field) == (0, None, 1, None)
    await engine.close()


@pytest.mark.parametrize(
    "broken",
    [
        {"object": "list", "data": []},
        {"object": "list", "data": [{"index": 0, "embedding": "AAAA"}]},
        {"object": "list", "data": [{"index": 0, "embedding": [1.0, 2.0]}]},
        {"object": "list", "data": None},
        {"hello": "world"},
        {"object": "list", "data": [{"index": 0, "embedding": 1.0}]},
        {"object": "list", "data": [{"index": 0, "embedding": [[1.0] * DIM]}]},
        b"{",
        b"",
    ],
)
async def test_a_malformed_answer_is_a_502(provider: Provider, broken: Any) -> None:
    provider.broken = broken
    engine = Engine(remote(provider))
    (answer,) = await engine.embed([EmbedRequest(["a"])])
    assert isinstance(answer, UpstreamFailed) and answer.status == 502
    await engine.close()


@pytest.mark.parametrize(
    "broken", [b"{", {"data": [{"index": 0, "embedding": 1.0}]}, {"data": [{"index": 0, "embedding": []}]}]
)
def test_a_malformed_answer_at_the_start_is_refused_in_one_line(provider: Provider, broken: Any) -> None:
    provider.broken = broken
    with pytest.raises(ModelUnavailable, match="does not answer"):
        remote(provider, dim=None)


@pytest.mark.parametrize("indices", [[0, 0, 1], [1, 2, 3], [0, 2, 2], ["0", "1", "2"], [None, None, None]])
async def test_vectors_that_cannot_be_matched_to_the_inputs_are_refused(provider: Provider, indices: list[Any]) -> None:
    provider.broken = {"data": [{"index": index, "embedding": [1.0] * DIM} for index in indices]}
    engine = Engine(remote(provider))
    answers = await engine.embed([EmbedRequest([text]) for text in "abc"])
    assert [type(answer) for answer in answers] == [UpstreamFailed] * 3
    assert len(provider.requests) == 1
    await engine.close()


async def test_an_unreachable_provider_is_a_503_and_at_the_start_one_line(provider: Provider) -> None:
    engine = Engine(remote(provider, max_retries=0))
    provider.server.shutdown()
    provider.server.server_close()
    (answer,) = await engine.embed([EmbedRequest(["a"])])
    assert isinstance(answer, UpstreamFailed) and answer.status == 503
    with pytest.raises(ModelUnavailable, match="does not answer"):
        remote(provider, dim=None, max_retries=0)
    await engine.close()


async def test_a_provider_that_is_silent_is_a_504() -> None:
    silent = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)  # accepts, and never reads
    url = f"http://127.0.0.1:{silent.server_address[1]}/v1"
    engine = Engine(load_model("openai", "m", base_url=url, dim=DIM, timeout_s=0.05, max_retries=0))
    (answer,) = await engine.embed([EmbedRequest(["a"])])
    assert isinstance(answer, UpstreamFailed) and answer.status == 504
    await engine.close()
    silent.server_close()


def test_the_api_of_openai_needs_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ModelUnavailable, match="OPENAI_API_KEY holds no key"):
        load_model("openai", "text-embedding-3-small")
