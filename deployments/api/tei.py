"""The routes of text-embeddings-inference (TEI), for its clients; errors are what they are everywhere here."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from fastapi import FastAPI, Request, Response

from deployments.api import answers
from deployments.api.http import json_response, read_body, timing_headers
from deployments.api.openapi import TIMES, takes
from deployments.embedding import outputs
from deployments.errors import InvalidRequest, TooLarge
from deployments.requests import bodies, tei

if TYPE_CHECKING:
    from deployments.gateway import Gateway

BODIES = (
    tei.EmbedBody,
    tei.SimilarityBody,
    tei.TokenizeBody,
    tei.DecodeBody,
)
MAX_UNITS = 1 << 20  # characters to be split, or token ids to be joined, in one request: each costs a hundred bytes


def add_tei(api: FastAPI, gateway: Gateway) -> None:
    """Add the routes that TEI has beside OpenAI's."""

    @api.post(
        "/embed",
        response_model=list[list[float]],
        responses={200: TIMES},
        openapi_extra=takes(body=tei.EmbedBody),
        tags=["TEI"],
    )
    async def post_embed(request: Request) -> Response:
        """Embed texts or token ids."""
        started = time.perf_counter()
        body = bodies.parse(tei.EmbedBody, await read_body(request, gateway.max_body_bytes))
        inputs, path_of = bodies.as_list(body.inputs), _paths("inputs", body.inputs)
        result = await gateway.vectors.of_prompted(inputs, body, path_of, body.dimensions)
        vectors = result.vectors[:, : body.dimensions]
        if body.normalize:
            vectors = outputs.at_length_one(vectors)
        content = np.ascontiguousarray(vectors, np.float32)
        return json_response(content, headers=timing_headers(result.timings, started))

    @api.post(
        "/similarity",
        response_model=list[float],
        responses={200: TIMES},
        openapi_extra=takes(body=tei.SimilarityBody),
        tags=["TEI"],
    )
    async def post_similarity(request: Request) -> Response:
        """The cosine similarity of one text to others."""
        started = time.perf_counter()
        body = bodies.parse(tei.SimilarityBody, await read_body(request, gateway.max_body_bytes))
        texts = [body.inputs.source_sentence, *body.inputs.sentences]
        try:
            result = await gateway.vectors.of_prompted(texts, body.parameters or tei.PromptBody(), _sentence)
        except InvalidRequest as error:
            if error.param != "prompt_name":
                raise
            raise InvalidRequest(error.message, "parameters.prompt_name", error.code) from error
        source, *others = outputs.at_length_one(result.vectors)
        return json_response(np.stack(others) @ source, headers=timing_headers(result.timings, started))

    @api.post(
        "/tokenize",
        response_model=list[list[answers.TextTokenAnswer]],
        openapi_extra=takes(body=tei.TokenizeBody),
        tags=["TEI"],
    )
    async def post_tokenize(request: Request) -> Response:
        """The tokens of each text, with their places in it in characters; nothing is cut."""
        body = bodies.parse(tei.TokenizeBody, await read_body(request, gateway.max_body_bytes))
        texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
        _check_size(sum(map(len, texts)), "characters", "inputs")
        return json_response(await gateway.split(texts, body.add_special_tokens, _paths("inputs", body.inputs)))

    @api.post("/decode", response_model=list[str], openapi_extra=takes(body=tei.DecodeBody), tags=["TEI"])
    async def post_decode(request: Request) -> Response:
        """The text of token ids, special tokens left out."""
        body = bodies.parse(tei.DecodeBody, await read_body(request, gateway.max_body_bytes))
        lists = cast(list[list[int]], bodies.as_list(body.ids))
        _check_size(sum(map(len, lists)), "token ids", "ids")
        return json_response(await gateway.decode(lists, _paths("ids", body.ids)))

    @api.get("/info", response_model=answers.InfoAnswer, tags=["TEI"])
    async def get_info() -> Response:
        """What is served."""
        info = await gateway.model_info()
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


def _sentence(number: int) -> str:
    return f"inputs.sentences.{number - 1}" if number else "inputs.source_sentence"


def _check_size(size: int, unit: str, param: str) -> None:
    if size > MAX_UNITS:
        raise TooLarge(f"{param} has {size} {unit}; at most {MAX_UNITS} are taken.", param, "too_many_inputs")


def _paths(name: str, given: bodies.Inputs) -> Callable[[int], str]:
    """The paths of what is given, alone or in a list."""
    single = bodies.is_single(given)
    return lambda n: name if single else f"{name}.{n}"
