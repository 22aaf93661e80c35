"""Vectors of what callers send: inputs of /v1/embeddings, queries, and texts of memories.

The texts of memories never enter the cache, so that there is no copy here to erase with them. Inputs and queries do,
under a hash, with neither text nor user.
"""

from collections.abc import Callable, Sequence

import numpy as np

from deployments.calls.embedder import EmbedderCalls, Inputs
from deployments.embedding.model import InputType, ModelInfo, Truncate
from deployments.embedding.outputs import EmbedResult
from deployments.errors import InvalidRequest
from deployments.metrics import GatewayMetrics
from deployments.requests import bodies
from deployments.requests.tei import PromptBody

PathOf = Callable[[int], str]


class Vectors:
    """The model, as the gateway uses it. `path_of(n)` names the n-th input or memory in an error."""

    def __init__(self, embedder: EmbedderCalls, metrics: GatewayMetrics) -> None:
        self._embedder = embedder
        self._metrics = metrics

    @property
    def queued_tokens(self) -> int:
        """Tokens (estimated) that wait for a call to the embedder."""
        return self._embedder.batcher.queued_cost

    async def of_inputs(self, body: bodies.EmbeddingsBody, path_of: PathOf) -> EmbedResult:
        """Full vectors of all inputs, in order."""
        _check_dimensions(body.dimensions, await self._embedder.info())
        return await self._embed(bodies.as_list(body.input), body.input_type, body.truncate, path_of)

    async def of_prompted(
        self, inputs: Inputs, how: PromptBody, path_of: PathOf, dimensions: int | None = None
    ) -> EmbedResult:
        """Full vectors of all inputs, in order, under the prompt of a name."""
        info = await self._embedder.info()
        _check_dimensions(dimensions, info)
        name = how.prompt_name
        if name is not None and name not in info.prompts:
            known = ", ".join(map(repr, sorted(info.prompts))) or "none"
            raise InvalidRequest(f"The model has no prompt {name!r}; it has {known}.", "prompt_name")
        prompt = info.default_prompt if name is None else info.prompts[name]
        return await self._embed_prompted(inputs, prompt, None, how.truncated_end(), path_of)

    async def of_search(self, body: bodies.SearchBody) -> np.ndarray:
        """(dim,) float32: the caller's own, or the query's."""
        if body.vector is not None:
            return _own_vector(body.vector, await self._embedder.info(), "vector")
        assert body.query is not None
        vector: np.ndarray = (await self._embed([body.query], "query", "end", lambda _: "query")).vectors[0]
        return vector

    async def of_texts(self, texts: list[str], path_of: PathOf) -> np.ndarray:
        """(n, dim) float32 of texts that are to be remembered."""
        return (await self._embed(texts, "document", "end", path_of, cached=False)).vectors

    async def of_memories(self, items: Sequence[bodies.NewMemoryBody], path_of: PathOf) -> list[np.ndarray]:
        """(dim,) float32 for each memory: the caller's own where it gave one, else its text's."""
        info = await self._embedder.info()
        own = {
            n: _own_vector(item.vector, info, join(path_of(n), "vector"))
            for n, item in enumerate(items)
            if item.vector is not None
        }
        bare = [n for n in range(len(items)) if n not in own]
        if bare:
            embedded = await self.of_texts([items[n].text for n in bare], lambda n: join(path_of(bare[n]), "text"))
            own.update(zip(bare, embedded, strict=True))
        return [own[n] for n in range(len(items))]

    async def _embed(
        self, inputs: Inputs, input_type: InputType | None, truncate: Truncate, path_of: PathOf, *, cached: bool = True
    ) -> EmbedResult:
        prompt = _prompt(await self._embedder.info(), input_type)
        return await self._embed_prompted(inputs, prompt, input_type, truncate, path_of, cached=cached)

    async def _embed_prompted(
        self,
        inputs: Inputs,
        prompt: str,
        input_type: InputType | None,
        truncate: Truncate,
        path_of: PathOf,
        *,
        cached: bool = True,
    ) -> EmbedResult:
        try:
            return await self._embedder.embed(inputs, prompt, truncate, path_of, input_type=input_type, cached=cached)
        finally:
            self._metrics.embed(self.queued_tokens)


def _check_dimensions(dimensions: int | None, info: ModelInfo) -> None:
    if dimensions is not None and dimensions > info.dim:
        raise InvalidRequest(f"dimensions is {dimensions}; the model has {info.dim}.", "dimensions")


def join(path: str, field: str) -> str:
    """The path of a field below a path, which may be the root."""
    return f"{path}.{field}" if path else field


def _prompt(info: ModelInfo, input_type: InputType | None) -> str:
    """The model's own prompt for an input type; sentence-transformers looks for these names in this order."""
    if input_type is None:
        return info.default_prompt
    names = ("query",) if input_type == "query" else ("document", "passage", "corpus")
    return next((info.prompts[name] for name in names if name in info.prompts), info.default_prompt)


def _own_vector(values: list[float], info: ModelInfo, path: str) -> np.ndarray:
    """A caller's vector as (dim,) float32. Raises InvalidRequest naming `path`."""
    if len(values) != info.dim:
        raise InvalidRequest(f"{path} has {len(values)} dimensions; the model has {info.dim}.", path, "wrong_dimension")
    with np.errstate(over="ignore"):
        vector = np.asarray(values, dtype=np.float32)
    if not np.isfinite(vector).all() or not vector.any():
        raise InvalidRequest(f"{path} must be finite in float32 and not all zero.", path, "invalid_vector")
    return vector
