"""An embedding model behind any OpenAI-compatible URL, through the official client.

Retries with back-off are the client's; a failure that is left is UpstreamFailed with the upstream's own message.
Vectors come as base64, so that they are the provider's float32 bit for bit.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from deployments.embedding.model import Model, ModelInfo, Tokens, Truncate
from deployments.errors import InvalidRequest, ModelUnavailable, UpstreamFailed


class RemoteModel(Model):
    """See the module.

    Args:
        name: what the provider calls the model.
        base_url: of its API, `/v1` included; None for OpenAI's own.
        api_key_env: the environment variable that holds the key.
        dim: length of a vector; None asks the provider at the start.
        max_tokens: longest input in tokens.
        timeout_s: of one attempt.
        max_retries: attempts after the first.

    Raises:
        ModelUnavailable: there is no key, or the provider cannot be asked for the dimension.
    """

    max_batch_tokens = 32_768
    forwards_in_flight = 4
    pads = False

    def __init__(
        self,
        name: str,
        *,
        base_url: str | None,
        api_key_env: str = "OPENAI_API_KEY",
        dim: int | None = None,
        max_tokens: int = 8192,
        timeout_s: float = 60.0,
        max_retries: int = 3,
    ) -> None:
        import openai

        key = os.environ.get(api_key_env)
        if not key:
            raise ModelUnavailable(f"The environment variable {api_key_env} holds no key for the model {name!r}.")
        self._client = openai.AsyncOpenAI(api_key=key, base_url=base_url, timeout=timeout_s, max_retries=max_retries)
        if dim is None:
            with openai.OpenAI(api_key=key, base_url=base_url, timeout=timeout_s, max_retries=max_retries) as client:
                try:
                    answer = client.embeddings.create(model=name, input=["dimension"], encoding_format="base64")
                except openai.OpenAIError as error:
                    raise ModelUnavailable(f"The model {name!r} does not answer: {error}") from error
                dim = len(_rows(answer.data)[0])
        self.info = ModelInfo(name, f"{base_url or 'openai'}/{name}", dim, max_tokens, 1 << 31, {}, "remote", "float32")

    async def tokenise(
        self, inputs: Sequence[str] | Sequence[Sequence[int]], prompt: str, truncate: Truncate
    ) -> list[Tokens | int]:
        """See Model. The provider's tokeniser is not here: lengths of texts are estimated at four bytes a token."""
        answer: list[Tokens | int] = []
        for given in inputs:
            if isinstance(given, str):
                text = prompt + given
                answer.append(Tokens(range(max(1, len(text.encode()) // 4)), text=text))
            else:
                answer.append(Tokens(given))
        return answer

    async def forward(self, batch: Sequence[Tokens]) -> np.ndarray:
        """See Model.

        Raises:
            UpstreamFailed: with status 502, 503 or 504 and the upstream's message.
        """
        import openai

        given = [tokens.text if tokens.text is not None else list(tokens.ids) for tokens in batch]
        try:
            answer = await self._client.embeddings.create(
                model=self.info.name,
                input=given,  # type: ignore[arg-type]
                encoding_format="base64",
            )
        except openai.APITimeoutError as error:
            raise UpstreamFailed(f"The embedding provider did not answer in time: {error}", None, None, 504) from error
        except openai.APIConnectionError as error:
            raise UpstreamFailed(f"The embedding provider is away: {error}", None, None, 503) from error
        except openai.BadRequestError as error:
            raise InvalidRequest(error.message) from error
        except openai.APIStatusError as error:
            status = 503 if error.status_code in (429, 503) else 504 if error.status_code == 504 else 502
            raise UpstreamFailed(error.message, None, None, status) from error
        return np.stack(_rows(sorted(answer.data, key=lambda one: one.index)))

    async def warm_up(self, max_batch_tokens: int) -> None:
        """See Model. Nothing is sent: calls cost money."""

    async def close(self) -> None:
        """See Model."""
        await self._client.close()


def _rows(data: Sequence[Any]) -> list[np.ndarray]:
    rows = []
    for one in data:
        embedding = one.embedding
        if isinstance(embedding, str):
            rows.append(np.frombuffer(base64.b64decode(embedding), "<f4"))
        else:
            rows.append(np.asarray(embedding, np.float32))
    return rows
