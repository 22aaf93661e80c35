"""The routes of text-embeddings-inference (TEI), for its clients.

Errors have TEI's shape, with the path of the field and the code beside it: huggingface_hub shows `error` only if it is
a string.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, cast

import numpy as np
from fastapi import Request, Response

from deployments.api import answers
from deployments.api.http import (
    Routes,
    json_response,
    json_rows,
    parse_body,
    principal_of,
    read_body,
    timing_headers,
)
from deployments.api.openapi import TIMES, fails, takes
from deployments.embedding import outputs
from deployments.errors import HttpError, LocatedError, TooLarge, located
from deployments.requests import bodies, tei
from deployments.requests.principal import Principal
from deployments.service import Memserve

BODIES = (
    tei.EmbedBody,
    tei.RootBody,
    tei.SimilarityBody,
    tei.RankBody,
    tei.TokenizeBody,
    tei.DecodeBody,
)
# Characters to tokenize, or token ids to decode, in one request. If each character is a token, tokenizing 65,536 takes
# 60 ms, the answer has 4.3 MB, and no step of it holds an event loop for more than 30 ms.
MAX_UNITS = 65_536

routes = Routes("TEI")
_ERROR_TYPES = {429: "Overloaded", 503: "Unhealthy"}


@routes.add(
    "POST",
    "/",
    "read",
    response_model=list[list[float]] | list[float],
    responses={200: TIMES},
    openapi_extra=takes(body=tei.RootBody),
)
async def post_root(memserve: Memserve, request: Request) -> Response:
    """Embed texts or token ids as `POST /embed` does, or compare a text with others as `POST /similarity` does."""
    started = time.perf_counter()
    body = await parse_body(tei.RootBody, await read_body(request, memserve.max_body_bytes))
    who = principal_of(request)
    if isinstance(body.inputs, tei.SentencesBody):
        return await _similarity(memserve, who, body.inputs, body, started)
    return await _embed(memserve, who, body, started)


@routes.add(
    "POST",
    "/embed",
    "read",
    response_model=list[list[float]],
    responses={200: TIMES},
    openapi_extra=takes(body=tei.EmbedBody),
)
async def post_embed(memserve: Memserve, request: Request) -> Response:
    """Embed texts or token ids."""
    started = time.perf_counter()
    body = await parse_body(tei.EmbedBody, await read_body(request, memserve.max_body_bytes))
    return await _embed(memserve, principal_of(request), body, started)


async def _embed(memserve: Memserve, who: Principal, body: tei.EmbedBody, started: float) -> Response:
    options = body.options()
    with _prompt_located(body), located("inputs", in_list=not bodies.is_single(body.inputs)):
        result = await memserve.embed_prompted(
            who,
            bodies.as_list(body.inputs),
            prompt_name=options.prompt_name,
            truncate=options.truncated_end(),
            dimensions=body.dimensions,
        )
    vectors = result.vectors[:, : body.dimensions]
    if options.normalize:
        vectors = outputs.at_length_one(vectors)
    content = await json_rows(np.ascontiguousarray(vectors, np.float32))
    return json_response(content, headers=timing_headers(result.timings, started))


@routes.add(
    "POST",
    "/similarity",
    "read",
    response_model=list[float],
    responses={200: TIMES},
    openapi_extra=takes(body=tei.SimilarityBody),
)
async def post_similarity(memserve: Memserve, request: Request) -> Response:
    """Compare one text with others: the cosine similarity to each."""
    started = time.perf_counter()
    body = await parse_body(tei.SimilarityBody, await read_body(request, memserve.max_body_bytes))
    return await _similarity(memserve, principal_of(request), body.inputs, body, started)


async def _similarity(
    memserve: Memserve,
    who: Principal,
    inputs: tei.SentencesBody,
    body: tei.SimilarityBody | tei.RootBody,
    started: float,
) -> Response:
    options = body.options()
    try:
        with _prompt_located(body):
            result = await memserve.embed_prompted(
                who,
                [inputs.source_sentence, *inputs.sentences],
                prompt_name=options.prompt_name,
                truncate=options.truncated_end(),
            )
    except LocatedError as error:
        if error.position is None:
            raise
        sentence = f"sentences.{error.position - 1}" if error.position else "source_sentence"
        raise error.at(f"inputs.{sentence}") from error
    source, *others = outputs.at_length_one(result.vectors)
    return json_response(np.stack(others) @ source, headers=timing_headers(result.timings, started))


@contextmanager
def _prompt_located(body: tei.SimilarityBody | tei.EmbedBody) -> Iterator[None]:
    """A context that turns the field `prompt_name` of an error into its path."""
    try:
        yield
    except LocatedError as error:
        if error.field != "prompt_name":
            raise
        raise error.at(body.prompt_path()) from error


@routes.add(
    "POST",
    "/rerank",
    "read",
    response_model=list[answers.RankAnswer],
    responses={200: TIMES},
    openapi_extra=takes(body=tei.RankBody),
)
async def post_rerank(memserve: Memserve, request: Request) -> Response:
    """Score texts for a query by the reranker, best first. If none is served, the error's code is `no_reranker`."""
    started = time.perf_counter()
    body = await parse_body(tei.RankBody, await read_body(request, memserve.max_body_bytes))
    with located("texts"):
        found = await memserve.score(body.query, body.texts, truncate=body.truncated_end())
    scores = (found.logits if body.raw_scores else found.scores).tolist()
    ranks: list[dict[str, Any]] = [{"index": n, "score": scores[n]} for n in found.order()]
    if body.return_text:
        for rank in ranks:
            rank["text"] = body.texts[rank["index"]]
    return json_response(ranks, headers=timing_headers(found.timings, started))


@routes.add(
    "POST",
    "/tokenize",
    "read",
    response_model=list[list[answers.TextTokenAnswer]],
    responses=fails({413: f"there are more than {MAX_UNITS:,} characters together (`too_many_inputs`)"}),
    openapi_extra=takes(body=tei.TokenizeBody),
)
async def post_tokenize(memserve: Memserve, request: Request) -> Response:
    """Split texts into tokens, with the place of each in characters. Long texts are not cut."""
    body = await parse_body(tei.TokenizeBody, await read_body(request, memserve.max_body_bytes))
    texts = cast(list[str], bodies.as_list(body.inputs))
    _check_size(sum(map(len, texts)), "characters", "inputs")
    with located("inputs", in_list=not bodies.is_single(body.inputs)):
        return json_response(await memserve.tokenize(texts, body.add_special_tokens))


@routes.add(
    "POST",
    "/decode",
    "read",
    response_model=list[str],
    responses=fails({413: f"there are more than {MAX_UNITS:,} ids together (`too_many_inputs`)"}),
    openapi_extra=takes(body=tei.DecodeBody),
)
async def post_decode(memserve: Memserve, request: Request) -> Response:
    """Join token ids into texts."""
    body = await parse_body(tei.DecodeBody, await read_body(request, memserve.max_body_bytes))
    lists = cast(list[list[int]], bodies.as_list(body.ids))
    _check_size(sum(map(len, lists)), "token ids", "ids")
    with located("ids", in_list=not bodies.is_single(body.ids)):
        return json_response(await memserve.decode(lists, body.skip_special_tokens))


@routes.add("GET", "/info", "read", response_model=answers.InfoAnswer)
async def get_info(memserve: Memserve, _: Request) -> Response:
    """Describe the model that is served."""
    info = await memserve.model_info()
    content: dict[str, Any] = {
        "model_id": info.name,
        "model_sha": info.revision,
        "model_dtype": info.dtype,
        "model_type": {"embedding": {"dimensions": info.dim}},
        "max_input_length": info.max_tokens,
        "max_client_batch_size": bodies.MAX_INPUTS,
        "auto_truncate": False,
        "prompts": info.prompts,
        "version": version("memserve"),
    }
    return json_response(content)


def error_body(error: HttpError) -> dict[str, str | None]:
    """An error in TEI's shape."""
    detail = error.body()["error"]
    kind = _ERROR_TYPES.get(error.status, "Backend" if error.status >= 500 else "Validation")
    return {"error": detail["message"], "error_type": kind, "param": detail["param"], "code": detail["code"]}


def _check_size(size: int, unit: str, name: str) -> None:
    if size > MAX_UNITS:
        raise TooLarge(f"must hold at most {MAX_UNITS} {unit}, not {size}", name, "too_many_inputs")
