"""Vectors of the texts that callers send: inputs of embedding requests, queries, and texts of memories.

The vectors of inputs and queries are cached under a hash, without the text, for callers of the same realm. The vectors
of memories are never cached, so that an erasure leaves no copy of them here.
"""

from collections.abc import Sequence

import numpy as np

from deployments.calls.embedder import EmbedderCalls, Inputs
from deployments.embedding import token_ids
from deployments.embedding.model import InputType, ModelInfo, Truncate
from deployments.embedding.outputs import EmbedResult
from deployments.errors import InvalidRequest, renumbered
from deployments.fair_queue import Turn

_SPECIAL_TOKENS = 8  # at most, of one text


class Vectors:
    """The embedder, as the service uses it. An error about an item has the item's position in the list given.

    Args:
        embedder: the calls to the embedder.
        accepted: the token ids that are accepted in place of texts.
    """

    def __init__(self, embedder: EmbedderCalls, accepted: token_ids.Accepted) -> None:
        self._embedder = embedder
        self._accepted = accepted

    @property
    def queued_tokens(self) -> int:
        """Estimated tokens that wait for a call to the embedder, whole bulk requests included."""
        return self._embedder.queued_tokens

    async def of_inputs(
        self,
        inputs: Inputs,
        *,
        input_type: InputType | None = None,
        truncate: Truncate = "end",
        dimensions: int | None = None,
        realm: str,
        turn: Turn,
    ) -> EmbedResult:
        """Full vectors of all inputs, in order. Raises InvalidRequest if the model has fewer `dimensions`."""
        _check_dimensions(dimensions, await self._embedder.info())
        return await self._embed(inputs, input_type, truncate, realm=realm, turn=turn)

    async def of_prompted(
        self,
        inputs: Inputs,
        *,
        prompt_name: str | None,
        truncate: Truncate,
        dimensions: int | None = None,
        realm: str,
        turn: Turn,
    ) -> EmbedResult:
        """Full vectors of all inputs, in order, with the model's prompt of that name in front of each text.

        Raises:
            InvalidRequest: the model has no such prompt, or fewer `dimensions`.
        """
        info = await self._embedder.info()
        _check_dimensions(dimensions, info)
        if prompt_name is not None and prompt_name not in info.prompts:
            known = ", ".join(map(repr, sorted(info.prompts))) or "none"
            raise InvalidRequest(f"is {prompt_name!r}; the model's prompts are {known}", "prompt_name")
        prompt = info.default_prompt if prompt_name is None else info.prompts[prompt_name]
        return await self._embed_prompted(inputs, prompt, None, truncate, realm=realm, turn=turn)

    async def of_query(self, text: str, realm: str, turn: Turn) -> EmbedResult:
        """The vector of the text of a search. A text that is too long is cut at its end."""
        return await self._embed([text], "query", "end", realm=realm, turn=turn)

    async def of_texts(self, texts: list[str], turn: Turn) -> EmbedResult:
        """The vectors of texts of memories. Texts that are too long are cut at their end."""
        return await self._embed(texts, "document", "end", realm=None, turn=turn)

    async def of_memories(
        self, texts: Sequence[str], given: Sequence[list[float] | None], turn: Turn
    ) -> tuple[list[np.ndarray], list[bool]]:
        """(dim,) float32 for each memory, and whether its text was cut for it.

        It is the vector that was given with the memory, else the vector of its text.
        """
        info = await self._embedder.info()
        found = {n: _checked(vector, info, n) for n, vector in enumerate(given) if vector is not None}
        truncated = [False] * len(texts)
        missing = [n for n in range(len(texts)) if n not in found]
        if missing:
            with renumbered(missing, "text"):
                embedded = await self.of_texts([texts[n] for n in missing], turn)
            found.update(zip(missing, embedded.vectors, strict=True))
            for n, cut in zip(missing, embedded.truncated.tolist(), strict=True):
                truncated[n] = cut
        return [found[n] for n in range(len(texts))], truncated

    async def is_cut(self, text: str, turn: Turn) -> bool:
        """Whether `of_texts` cuts a text. A text is embedded to learn it, unless it has too few bytes to be cut."""
        info = await self._embedder.info()
        at_most = len((_prompt(info, "document") + text).encode()) + _SPECIAL_TOKENS
        return at_most > info.limit("document") and bool((await self.of_texts([text], turn)).truncated[0])

    async def checked(self, vector: list[float]) -> np.ndarray:
        """A caller's vector as (dim,) float32. Raises InvalidRequest."""
        return _checked(vector, await self._embedder.info())

    async def _embed(
        self, inputs: Inputs, input_type: InputType | None, truncate: Truncate, *, realm: str | None, turn: Turn
    ) -> EmbedResult:
        prompt = _prompt(await self._embedder.info(), input_type)
        return await self._embed_prompted(inputs, prompt, input_type, truncate, realm=realm, turn=turn)

    async def _embed_prompted(
        self,
        inputs: Inputs,
        prompt: str,
        input_type: InputType | None,
        truncate: Truncate,
        *,
        realm: str | None,
        turn: Turn,
    ) -> EmbedResult:
        token_ids.check(inputs, await self._embedder.info(), self._accepted)
        return await self._embedder.embed(inputs, prompt, truncate, realm=realm, turn=turn, input_type=input_type)


def _check_dimensions(dimensions: int | None, info: ModelInfo) -> None:
    if dimensions is not None and dimensions > info.dim:
        raise InvalidRequest(f"must be at most {info.dim}, the dimensions of the model", "dimensions")


def _prompt(info: ModelInfo, input_type: InputType | None) -> str:
    """The model's prompt for an input type; sentence-transformers looks for these names in this order."""
    if input_type is None:
        return info.default_prompt
    names = ("query",) if input_type == "query" else ("document", "passage", "corpus")
    return next((info.prompts[name] for name in names if name in info.prompts), info.default_prompt)


def _checked(values: list[float], info: ModelInfo, position: int | None = None) -> np.ndarray:
    if len(values) != info.dim:
        message = f"has {len(values)} dimensions; the model has {info.dim}"
        raise InvalidRequest(message, "vector", "wrong_dimension", position)
    with np.errstate(over="ignore"):
        vector = np.asarray(values, dtype=np.float32)
    if not np.isfinite(vector).all() or not vector.any():
        raise InvalidRequest("must be finite in float32 and not all zero", "vector", "invalid_vector", position)
    return vector
