"""The scores of texts for a query, by the Reranker deployment.

Nothing of a query or text is kept, so an erasure leaves no copy of a memory here.
"""

from collections.abc import Sequence

from deployments.calls.embedder import EmbedderCalls
from deployments.embedding.model import ModelInfo, Truncate
from deployments.embedding.outputs import Scores
from deployments.errors import InvalidRequest
from deployments.fair_queue import Turn


class Reranking:
    """The reranker, as the service uses it.

    Args:
        calls: the calls to the deployment; None if there is none.
    """

    def __init__(self, calls: EmbedderCalls | None) -> None:
        self._calls = calls

    @property
    def queued_tokens(self) -> int:
        """Estimated tokens that wait for a call to the reranker, whole bulk requests included."""
        return 0 if self._calls is None else self._calls.queued_tokens

    def calls(self) -> EmbedderCalls:
        """The calls to the deployment. Raises InvalidRequest if there is none."""
        if self._calls is None:
            message = "No reranker is served here: set reranker.model to a cross-encoder."
            raise InvalidRequest(message, None, "no_reranker")
        return self._calls

    async def info(self) -> ModelInfo:
        """The model. Starts a replica if none runs. Raises InvalidRequest if there is no reranker."""
        return await self.calls().info()

    async def scores(self, query: str, texts: Sequence[str], *, truncate: Truncate = "end", turn: Turn) -> Scores:
        """The score of each text for the query, in their order.

        Args:
            truncate: the end at which a pair is cut that is longer than the model reads; `none` refuses it.

        Raises:
            InvalidRequest: there is no reranker; or the pair of the text at `position` is too long.
            Overloaded, DeadlineExceeded: as of EmbedderCalls.embed.
        """
        result = await self.calls().embed(list(texts), query, truncate, realm=None, turn=turn)
        scores, logits = result.vectors.T
        return Scores(scores, logits, result.tokens, result.truncated, result.timings)
