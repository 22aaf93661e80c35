"""The routes of the reranker, in the form that Cohere and Jina share."""

import time

from fastapi import Request, Response

from deployments.api import answers
from deployments.api.embeddings import check_served
from deployments.api.http import Routes, json_response, parse_body, read_body, timing_headers
from deployments.api.openapi import TIMES, fails, takes
from deployments.requests import bodies
from deployments.service import Memserve

BODIES = (bodies.RerankBody,)

routes = Routes("rerank")


@routes.add(
    "POST",
    "/v2/rerank",
    "read",
    response_model=answers.RerankAnswer,
    responses={200: TIMES, **fails({404: "this reranker is not served here (`model_not_found`)"})},
    openapi_extra=takes(body=bodies.RerankBody),
)
@routes.add(
    "POST",
    "/v1/rerank",
    "read",
    response_model=answers.RerankAnswer,
    responses={200: TIMES, **fails({404: "this reranker is not served here (`model_not_found`)"})},
    openapi_extra=takes(body=bodies.RerankBody),
)
async def post_rerank(memserve: Memserve, request: Request) -> Response:
    """Score documents for a query, best first. If no reranker is served, the error's code is `no_reranker`."""
    started = time.perf_counter()
    body = await parse_body(bodies.RerankBody, await read_body(request, memserve.max_body_bytes))
    info = await memserve.reranker_info()
    if body.model is not None:
        check_served(body.model, info.name, "cross-encoder")
    results, found = await memserve.rerank_body(body)
    tokens = int(found.tokens.sum())
    content = {
        "model": info.name,
        "results": results,
        "usage": {
            "prompt_tokens": tokens,
            "total_tokens": tokens,
            "truncated_inputs": int(found.truncated.sum()),
        },
    }
    return json_response(content, headers=timing_headers(found.timings, started))
