"""The limits of the service's calls that follow from the settings."""

from typing import TypedDict

from deployments.settings import EmbedderSettings, Settings


class EmbedderLimits(TypedDict):
    """Arguments of `EmbedderCalls`."""

    in_flight: int
    call_tokens: int
    max_queued_tokens: int
    max_wait_s: float
    cache_bytes: int


class StoreLimits(TypedDict):
    """Arguments of `StoreCalls`."""

    append_in_flight: int
    append_memories: int
    max_wait_s: float


def embedder_limits(settings: Settings) -> EmbedderLimits:
    """The limits of the calls to embedders."""
    options = settings.gateway
    return {
        "in_flight": options.embed_calls_in_flight or _calls_in_flight(settings.embedder),
        "call_tokens": options.embed_call_tokens,
        "max_queued_tokens": options.max_queued_tokens,
        "max_wait_s": settings.queue.max_wait_s,
        "cache_bytes": settings.cache.max_bytes,
    }


def reranker_limits(settings: Settings) -> EmbedderLimits:
    """The limits of the calls to rerankers: those of the calls to embedders, and nothing is cached."""
    return {**embedder_limits(settings), "in_flight": _calls_in_flight(settings.reranker), "cache_bytes": 0}


def store_limits(settings: Settings) -> StoreLimits:
    """The limits of the calls to stores."""
    options = settings.gateway
    return {
        "append_in_flight": options.append_calls_in_flight,
        "append_memories": options.append_call_memories,
        "max_wait_s": settings.queue.max_wait_s,
    }


def _calls_in_flight(embedder: EmbedderSettings) -> int:
    """The calls that keep every replica busy.

    On a CPU one call for each replica makes the fullest batches if the requests are small, since the cores have other
    work while an answer is being returned; a backlog that is large enough for a batch is sent earlier. A GPU would be
    idle while an answer is being returned, so it gets two calls.
    """
    return (embedder.max_replicas or 1) * (2 if embedder.num_gpus else 1)
