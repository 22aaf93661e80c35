"""An example of a request's body and of the answer for each operation, for the OpenAPI document.

Tests send the bodies in the order of this module, to a server without memories, and compare the answers' fields with
the examples.
"""

from typing import Any, NamedTuple


class Example(NamedTuple):
    """The body of a request, and the answer; None if there is no such body."""

    body: Any
    answer: Any


_VECTOR = [0.0413, -0.0127, 0.0695, 0.0032]  # the first values of a vector
_MODEL = "all-MiniLM-L6-v2"
_ADDED = "2026-11-28T09:30:00Z"
_UPDATED = "2026-11-28T09:45:00Z"
_MEMORY = {
    "id": "tea",
    "user_id": "anna",
    "text": "I drink green tea in the morning.",
    "metadata": {"topic": "drinks"},
    "created_at": _ADDED,
    "updated_at": _ADDED,
    "version": 1,
}
_READY = {"status": "ready", "model": _MODEL, "device": "cpu", "dtype": "bfloat16"}
_MODEL_CARD = {
    "id": _MODEL,
    "object": "model",
    "created": 1795858200,
    "owned_by": "memserve",
    "dimensions": 384,
    "max_tokens": 256,
}
_KEY: dict[str, Any] = {
    "id": "5b1c8f02a3d94e67",
    "tenant": "acme",
    "user_id": "anna",
    "scopes": ["read", "write"],
    "label": "Anna's phone",
    "created_at": _ADDED,
    "expires_at": None,
    "used_at": None,
    "revoked_at": None,
    "requests_per_minute": None,
    "tokens_per_minute": None,
}
_LINE = '{"id": "tea", "text": "I drink green tea in the morning.", "metadata": {"topic": "drinks"}}\n'
_USER = {"user_id": "anna", "memories": 1, "version": 1, "bytes": 1604}

_RERANK = Example(
    {"query": "What does she drink?", "documents": ["It rains.", "She likes tea."], "top_n": 1},
    {
        "model": "cross-encoder/ms-marco-MiniLM-L6-v2",
        "results": [{"index": 1, "relevance_score": 4.71}],
        "usage": {"prompt_tokens": 24, "total_tokens": 24, "truncated_inputs": 0},
    },
)

EXAMPLES: dict[str, Example] = {
    "GET /health/live": Example(None, {"status": "live"}),
    "GET /health": Example(None, _READY),
    "GET /health/ready": Example(None, _READY),
    "GET /ping": Example(None, _READY),
    "GET /metrics": Example(
        None,
        "# HELP ray_memserve_queued_tokens Tokens that wait for the device.\n"
        "# TYPE ray_memserve_queued_tokens gauge\n"
        'ray_memserve_queued_tokens{application="memserve",deployment="Embedder",replica="k1x9"} 12.0\n',
    ),
    "POST /v1/embeddings": Example(
        {"input": ["I drink green tea.", "Leo practises Chopin."], "model": _MODEL},
        {
            "object": "list",
            "model": _MODEL,
            "data": [
                {"object": "embedding", "index": 0, "embedding": _VECTOR},
                {"object": "embedding", "index": 1, "embedding": [0.0021, 0.0548, -0.0216, 0.0377]},
            ],
            "usage": {"prompt_tokens": 15, "total_tokens": 15, "truncated_inputs": 0},
        },
    ),
    "GET /v1/models": Example(None, {"object": "list", "data": [_MODEL_CARD]}),
    "GET /v1/models/{model_id}": Example(None, _MODEL_CARD),
    "POST /": Example({"inputs": "I drink green tea."}, [_VECTOR]),
    "POST /embed": Example({"inputs": ["I drink green tea."], "normalize": True}, [_VECTOR]),
    "POST /similarity": Example(
        {"inputs": {"source_sentence": "I drink tea.", "sentences": ["She likes tea.", "It rains."]}}, [0.71, 0.12]
    ),
    "POST /rerank": Example(
        {"query": "What does she drink?", "texts": ["It rains.", "She likes tea."], "return_text": True},
        [{"index": 1, "score": 0.93, "text": "She likes tea."}, {"index": 0, "score": 0.02, "text": "It rains."}],
    ),
    "POST /v1/rerank": _RERANK,
    "POST /v2/rerank": _RERANK,
    "POST /tokenize": Example(
        {"inputs": "green tea"},
        [
            [
                {"id": 101, "text": "[CLS]", "special": True, "start": None, "stop": None},
                {"id": 2665, "text": "green", "special": False, "start": 0, "stop": 5},
                {"id": 5572, "text": "tea", "special": False, "start": 6, "stop": 9},
                {"id": 102, "text": "[SEP]", "special": True, "start": None, "stop": None},
            ]
        ],
    ),
    "POST /decode": Example({"ids": [101, 2665, 5572, 102]}, ["green tea"]),
    "GET /info": Example(
        None,
        {
            "model_id": _MODEL,
            "model_sha": "0f1c2d3e4a5b6978",
            "model_dtype": "bfloat16",
            "model_type": {"embedding": {"dimensions": 384}},
            "max_input_length": 256,
            "max_client_batch_size": 2048,
            "auto_truncate": False,
            "prompts": {},
            "version": "0.1.0",
        },
    ),
    "POST /v1/users/{user_id}/memories": Example(
        {"text": _MEMORY["text"], "id": "tea", "metadata": {"topic": "drinks"}},
        {"memories": [{"id": "tea", "status": "added", "version": 1}], "version": 1},
    ),
    "GET /v1/users/{user_id}/memories": Example(None, {"memories": [_MEMORY], "next_cursor": None}),
    "POST /v1/users/{user_id}/memories/search": Example(
        {"query": "What does she drink?", "top_k": 5, "filter": {"topic": "drinks"}},
        {"results": [{**_MEMORY, "score": 0.62}], "index": "exact", "version": 1},
    ),
    "POST /v1/users/{user_id}/memories/get": Example(
        {"ids": ["tea", "coffee"]}, {"memories": [_MEMORY], "missing": ["coffee"]}
    ),
    "POST /v1/users/{user_id}/memories/duplicates": Example({"score": 0.9}, {"groups": [], "next_cursor": None}),
    "GET /v1/users/{user_id}/memories/{memory_id}": Example(None, _MEMORY),
    "PATCH /v1/users/{user_id}/memories/{memory_id}": Example(
        {"text": "I drink black tea now.", "if_version": 1},
        {**_MEMORY, "text": "I drink black tea now.", "updated_at": _UPDATED, "version": 2},
    ),
    "GET /v1/users/{user_id}/memories/{memory_id}/history": Example(
        None,
        {
            "events": [
                {
                    "event": "added",
                    "at": _ADDED,
                    "version": 1,
                    "text": _MEMORY["text"],
                    "metadata": {"topic": "drinks"},
                },
                {
                    "event": "updated",
                    "at": _UPDATED,
                    "version": 2,
                    "text": "I drink black tea now.",
                    "metadata": {"topic": "drinks"},
                },
            ],
            "next_cursor": None,
        },
    ),
    "GET /v1/users": Example(None, {"users": [_USER], "next_cursor": None}),
    "GET /v1/users/{user_id}": Example(None, {**_USER, "index": "exact", "resident": True}),
    "GET /v1/users/{user_id}/export": Example(
        None,
        '{"id": "tea", "text": "I drink black tea now.", "metadata": {"topic": "drinks"}, "created_at": '
        '"2026-11-28T09:30:00Z", "updated_at": "2026-11-28T09:45:00Z", "version": 2, "vector": "...", "history": [...]}'
        "\n",
    ),
    "DELETE /v1/users/{user_id}/memories/{memory_id}": Example(None, None),
    "POST /v1/users/{user_id}/import": Example(_LINE, {"imported": 1, "unchanged": 0}),
    "DELETE /v1/users/{user_id}/memories": Example({"filter": {"topic": "drinks"}}, {"deleted": 1}),
    "POST /v1/memories": Example(
        {
            "memories": [
                {"user_id": "anna", "text": "I sing in a choir."},
                {"user_id": "leo", "text": "I practise Chopin.", "id": "piano"},
            ]
        },
        {
            "memories": [
                {"user_id": "anna", "id": "2b1f7c9e-3a54-4d0e-9d57-6a1f0c8e2b11", "status": "added", "version": 4},
                {"user_id": "leo", "id": "piano", "status": "added", "version": 1},
            ]
        },
    ),
    "POST /v1/keys": Example(
        {"user_id": "anna", "scopes": ["read", "write"], "label": "Anna's phone"},
        {**_KEY, "key": "ms_5b1c8f02a3d94e67_" + 4 * "9f86d081884c7d65"},
    ),
    "GET /v1/keys": Example(None, {"keys": [_KEY], "next_cursor": None}),
    "GET /v1/keys/self": Example(
        None, {name: _KEY[name] for name in ("id", "tenant", "user_id", "scopes", "label", "expires_at")}
    ),
    "DELETE /v1/keys/{key_id}": Example(None, {**_KEY, "revoked_at": _UPDATED}),
    "DELETE /v1/users/{user_id}": Example(None, {"deleted": 1, "version": 5}),
    "GET /v1/events": Example(
        None,
        {
            "events": [
                {
                    "at": _ADDED,
                    "action": "memories.added",
                    "key_id": "0123456789abcdef",
                    "user_id": "anna",
                    "ids": ["tea"],
                    "count": 1,
                }
            ],
            "next_cursor": "WyJldmVudHMiLDFd",
            "has_more": False,
        },
    ),
}
"""By method and path, as the document names them. No answer has a body if the example has none."""
