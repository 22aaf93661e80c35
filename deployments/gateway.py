"""The Gateway deployment: the HTTP ingress and the handle API. Validates, coalesces, calls.

Bad input is refused here, before it joins a batch with anybody else's. Nothing is acknowledged before the log has
committed it. The routes (deployments/routes.py) and the handle API are two ways into the same few methods, so that both
have the same validation and the same errors.
"""

import asyncio
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
from fastapi import FastAPI
from ray.serve.handle import DeploymentHandle

from deployments import metrics, schemas
from deployments.calls import EmbedderCalls, Inputs, StoreCalls
from deployments.embedding import outputs
from deployments.embedding.engine import EmbedResult
from deployments.embedding.model import ModelInfo, Truncate
from deployments.errors import InvalidRequest, MemserveError, Unavailable
from deployments.routes import build_api
from deployments.settings import EmbedderSettings, Settings
from store import Append, AppendResult, Search, SearchResult, StoreError
from store import NewMemory as StoredMemory

TENANT = "default"
READY_TIMEOUT_S = 5.0

PathOf = Callable[[int], str]


class Gateway:
    """One replica of the ingress."""

    def __init__(self, settings: Settings, embedder: DeploymentHandle, store: DeploymentHandle) -> None:
        options = settings.gateway
        self.max_body_bytes = options.max_body_bytes
        self._embedder = EmbedderCalls(
            embedder,
            in_flight=options.embed_calls_in_flight or _calls_in_flight(settings.embedder),
            call_tokens=options.embed_call_tokens,
            max_queued_tokens=options.max_queued_tokens,
            cache_bytes=settings.cache.max_bytes,
        )
        self._store = StoreCalls(
            store,
            partitions=settings.store.partitions,
            append_in_flight=options.append_calls_in_flight,
            append_memories=options.append_call_memories,
        )
        self._metrics = metrics.GatewayMetrics(self._embedder.cache)

    # Serve calls this after the constructor and serves what it returns (ray.serve.ingress without an app).
    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self, on_error=metrics.count_error)

    # The handle API.

    async def embed(
        self,
        texts: Sequence[str],
        *,
        input_type: Literal["query", "document"] | None = None,
        truncate: Truncate = "end",
        dimensions: int | None = None,
    ) -> np.ndarray:
        """Embed texts.

        Returns:
            (n, dim) float32, or (n, dimensions), in the order of `texts`.

        Raises:
            InvalidRequest: an empty text, too many texts, an unknown option; `param` names it.
        """
        values = {"input": list(texts), "input_type": input_type, "truncate": truncate, "dimensions": dimensions}
        body = schemas.check(schemas.EmbeddingsRequest, values)
        result = await self.embed_inputs(body, lambda n: f"input.{n}")
        return outputs.cut(result.vectors, body.dimensions)

    async def add(
        self,
        user_id: str,
        memories: Sequence[str | Mapping[str, Any]],
        *,
        on_duplicate: Literal["add", "skip"] = "add",
        upsert: bool = False,
    ) -> list[dict[str, Any]]:
        """Add memories (texts, or mappings with text, id, metadata, expires_at, vector) to one user.

        Returns:
            `{id, status, version}` of each, in order, once they are committed.

        Raises:
            InvalidRequest: `param` names the field. store.Conflict: an id is taken by other content.
        """
        items = [{"text": item} if isinstance(item, str) else dict(item) for item in memories]
        body = schemas.check(schemas.AddRequest, {"memories": items, "on_duplicate": on_duplicate, "upsert": upsert})
        path = schemas.check(schemas.UserPath, {"user_id": user_id})
        (result,) = await self.append([(path.user_id, body.items())], body, lambda n: f"memories.{n}")
        return [schemas.appended(entry) for entry in result.memories]

    async def search(self, user_id: str, query: str | None = None, **options: Any) -> list[dict[str, Any]]:
        """Search one user's memories by text, or by `vector=`; the other options are those of SearchRequest.

        Returns:
            memories with their score (cosine similarity), best first.
        """
        body = schemas.check(schemas.SearchRequest, {"query": query, **options})
        path = schemas.check(schemas.UserPath, {"user_id": user_id})
        return [schemas.memory(found) for found in (await self.find(path.user_id, body)).results]

    async def delete(self, user_id: str, memory_id: str) -> None:
        """Delete one memory of one user. Raises store.NotFound."""
        path = schemas.check(schemas.MemoryPath, {"user_id": user_id, "memory_id": memory_id})
        await self.forget(path.user_id, path.memory_id)

    # What the routes and the handle API share. Arguments are validated.

    async def model_info(self) -> ModelInfo:
        """What the model is."""
        return await self._embedder.info()

    async def embed_inputs(self, body: schemas.EmbeddingsRequest, path_of: PathOf) -> EmbedResult:
        """Full vectors of all inputs, in order; `path_of(n)` names the n-th input in an error."""
        info = await self._embedder.info()
        if body.dimensions is not None and body.dimensions > info.dim:
            raise InvalidRequest(f"dimensions is {body.dimensions}; the model has {info.dim}.", "dimensions")
        return await self._embed(body.inputs(), body.input_type, body.truncate, path_of)

    async def append(
        self,
        groups: Sequence[tuple[str, Sequence[schemas.NewMemory]]],
        options: schemas.AddRequest | schemas.AddManyRequest,
        path_of: PathOf,
    ) -> list[AppendResult]:
        """Embed what has no vector yet, then commit one group a user; `path_of(n)` names the n-th memory."""
        issued_at = datetime.now(UTC)
        items = [item for _, group in groups for item in group]
        vectors = iter(await self._vectors_of(items, path_of))
        appends = [
            Append(
                tenant=TENANT,
                user_id=user_id,
                memories=tuple(
                    StoredMemory(
                        # The gateway makes the id: an append that is sent again is then taken only once.
                        id=item.id or str(uuid.uuid4()),
                        text=item.text,
                        vector=next(vectors),
                        metadata=item.metadata,
                        expires_at=item.expires_at,
                    )
                    for item in group
                ),
                on_duplicate=options.on_duplicate,
                upsert=options.upsert,
                issued_at=issued_at,
            )
            for user_id, group in groups
        ]
        return list(await asyncio.gather(*(self._store.append(append) for append in appends)))

    async def find(self, user_id: str, body: schemas.SearchRequest) -> SearchResult:
        """The nearest memories of one user."""
        if body.vector is not None:
            vector = _own_vector(body.vector, await self._embedder.info(), "vector")
        else:
            assert body.query is not None
            vector = (await self._embed([body.query], "query", "end", lambda _: "query")).vectors[0]
        return await self._store.search(
            Search(
                tenant=TENANT,
                user_id=user_id,
                vector=vector,
                top_k=body.top_k,
                filter=body.filter,
                min_score=body.min_score,
                include_vectors=body.include_vectors,
            )
        )

    async def forget(self, user_id: str, memory_id: str) -> None:
        """Delete one memory. Raises store.NotFound."""
        await self._store.delete(TENANT, user_id, memory_id)

    async def check_ready(self) -> None:
        """Embed a text and read the log. Raises Unavailable with what is missing."""
        missing = []
        for name, check in (("embedder", self._embedder.probe), ("store", self._store.ping)):
            try:
                await asyncio.wait_for(check(), READY_TIMEOUT_S)
            except TimeoutError:
                missing.append(f"{name}: no answer within {READY_TIMEOUT_S:g} s")
            except (MemserveError, StoreError) as error:
                missing.append(f"{name}: {error}")
        if missing:
            raise Unavailable(f"Not ready. {'; '.join(missing)}", None, "not_ready")

    async def _embed(
        self, inputs: Inputs, input_type: Literal["query", "document"] | None, truncate: Truncate, path_of: PathOf
    ) -> EmbedResult:
        info = await self._embedder.info()
        try:
            return await self._embedder.embed(inputs, _prompt(info, input_type), truncate, path_of)
        finally:
            self._metrics.embed(self._embedder.batcher.queued_cost)

    async def _vectors_of(self, items: Sequence[schemas.NewMemory], path_of: PathOf) -> list[np.ndarray]:
        """(dim,) float32 for each memory: the caller's own where it gave one, else the text's embedding."""
        info = await self._embedder.info()
        own = {
            n: _own_vector(item.vector, info, _join(path_of(n), "vector"))
            for n, item in enumerate(items)
            if item.vector is not None
        }
        bare = [n for n in range(len(items)) if n not in own]
        if bare:
            texts = [items[n].text for n in bare]
            embedded = await self._embed(texts, "document", "end", lambda n: _join(path_of(bare[n]), "text"))
            own.update(zip(bare, embedded.vectors, strict=True))
        return [own[n] for n in range(len(items))]


def _calls_in_flight(embedder: EmbedderSettings) -> int:
    """Calls that keep every replica busy.

    On a CPU one each fills its batches best: the cores have other work while an answer travels. A GPU would stand idle
    meanwhile: two.
    """
    return embedder.max_replicas * (2 if embedder.num_gpus > 0 else 1)


def _prompt(info: ModelInfo, input_type: Literal["query", "document"] | None) -> str:
    """The model's own prompt for an input type; sentence-transformers looks for these names in this order."""
    if input_type is None:
        return info.default_prompt
    names = ("query",) if input_type == "query" else ("document", "passage", "corpus")
    return next((info.prompts[name] for name in names if name in info.prompts), info.default_prompt)


def _join(path: str, field: str) -> str:
    return f"{path}.{field}" if path else field


def _own_vector(values: list[float], info: ModelInfo, path: str) -> np.ndarray:
    """A caller's vector as (dim,) float32. Raises InvalidRequest naming `path`."""
    if len(values) != info.dim:
        raise InvalidRequest(f"{path} has {len(values)} dimensions; the model has {info.dim}.", path, "wrong_dimension")
    with np.errstate(over="ignore"):
        vector = np.asarray(values, dtype=np.float32)
    if not np.isfinite(vector).all() or not vector.any():
        raise InvalidRequest(f"{path} must be finite in float32 and not all zero.", path, "invalid_vector")
    return vector
