"""An embedding model behind any OpenAI-compatible URL, called with the official client.

The client retries with back-off. If a call still fails, the error is UpstreamFailed with the provider's own message.
Vectors are requested as base64, so that they are bit for bit the float32 values of the provider.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import openai

from deployments.embedding.model import InputType, Model, ModelInfo, Tokens, Truncate
from deployments.errors import InvalidRequest, ModelUnavailable, UpstreamFailed

# The most inputs that OpenAI accepts in one call.
_CALL_INPUTS = 2048


class RemoteModel(Model):
    """See the module.

    The provider decides whether an input is too long: if it answers 400, the caller gets this answer. Token counts are
    estimates, because the provider's tokenizer is not available here.

    Args:
        name: the provider's name of the model.
        base_url: of its API, including `/v1`; None for OpenAI's own.
        api_key_env: the environment variable that holds the key. Only OpenAI's own API must have one.
        dim: length of a vector; None asks the provider at the start.
        max_tokens: longest input in tokens.
        timeout_s: of one attempt.
        max_retries: attempts after the first.

    Raises:
        ModelUnavailable: there is no key for OpenAI's own API, or the dimension could not be learned from the provider.
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
        key = os.environ.get(api_key_env)
        if not key and base_url is None:
            raise ModelUnavailable(f"The environment variable {api_key_env} holds no key for the model {name!r}.")
        options: dict[str, Any] = {
            "api_key": key or "none",
            "base_url": base_url,
            "timeout": timeout_s,
            "max_retries": max_retries,
        }
        self._client = openai.AsyncOpenAI(**options)
        if dim is None:
            try:
                with openai.OpenAI(**options) as client:
                    answer = client.embeddings.create(model=name, input=["dimension"], encoding_format="base64")
                    dim = _matrix(answer, 1, None).shape[1]
            except (openai.OpenAIError, ValueError, UpstreamFailed) as error:
                raise ModelUnavailable(f"The model {name!r} does not answer: {error}") from error
        self.info = ModelInfo(name, f"{base_url or 'openai'}/{name}", dim, max_tokens, 1 << 31, {}, "remote", "float32")

    async def tokenize(
        self,
        inputs: Sequence[str] | Sequence[Sequence[int]],
        prompt: str,
        truncate: Truncate,
        input_type: InputType | None = None,
    ) -> list[Tokens | int]:
        """See Model. The length of a text is an estimate: four bytes per token."""
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
            UpstreamFailed: with status 502, 503 or 504 and the provider's message.
            InvalidRequest: the provider refuses an input.
        """
        vectors = np.empty((len(batch), self.info.dim), np.float32)
        # One call may hold texts or token ids, not both.
        rows_of_texts = [row for row, tokens in enumerate(batch) if tokens.text is not None]
        rows_of_ids = [row for row, tokens in enumerate(batch) if tokens.text is None]
        for rows in (rows_of_texts, rows_of_ids):
            for start in range(0, len(rows), _CALL_INPUTS):
                part = rows[start : start + _CALL_INPUTS]
                vectors[part] = await self._call([batch[row].text or list(batch[row].ids) for row in part])
        return vectors

    async def _call(self, inputs: list[Any]) -> np.ndarray:
        try:
            answer = await self._client.embeddings.create(model=self.info.name, input=inputs, encoding_format="base64")
        except openai.APITimeoutError as error:
            raise UpstreamFailed(
                "The embedding provider did not answer in time.", None, "timeout", status=504
            ) from error
        except openai.APIConnectionError as error:
            raise UpstreamFailed(
                f"The embedding provider cannot be reached: {error.__cause__ or error}", None, None, status=503
            ) from error
        except openai.APIStatusError as error:
            if error.status_code in (400, 413, 422):
                raise InvalidRequest(_message_of(error)) from error
            raise UpstreamFailed(_message_of(error), None, None, status=_STATUS.get(error.status_code, 502)) from error
        except (openai.OpenAIError, ValueError) as error:  # ValueError: the client raises it if the answer is not JSON
            raise UpstreamFailed(f"The embedding provider's answer is malformed: {error}") from error
        return _matrix(answer, len(inputs), self.info.dim)

    async def warm_up(self, max_batch_tokens: int, forwards: int) -> None:
        """See Model. Sends nothing, because calls cost money."""

    async def close(self) -> None:
        """See Model."""
        await self._client.close()


# The provider's status -> the status of our answer. All others are 502; so are 401 and 403, which only the operator of
# this server can correct.
_STATUS = {429: 503, 503: 503, 408: 504, 504: 504}


def _message_of(error: openai.APIStatusError) -> str:
    """The provider's own message, without the text that the client puts around it."""
    body = error.body
    if isinstance(body, dict) and isinstance(body.get("error"), dict):
        body = body["error"]
    message = body.get("message") if isinstance(body, dict) else None
    return str(message or error.message)


def _matrix(answer: Any, count: int, dim: int | None) -> np.ndarray:
    """Check an answer. Returns its vectors, (count, dim) float32, in the order of the inputs.

    Raises:
        UpstreamFailed: the answer is malformed.
    """
    try:
        ordered = sorted(answer.data, key=lambda one: one.index)
        rows = [
            np.frombuffer(base64.b64decode(one.embedding), "<f4")
            if isinstance(one.embedding, str)
            else np.asarray(one.embedding, np.float32)
            for one in ordered
        ]
        matrix = np.stack(rows).astype(np.float32, copy=False)
    except (AttributeError, TypeError, ValueError) as error:
        raise UpstreamFailed(f"The embedding provider's answer is malformed: {error}") from error
    fits = matrix.ndim == 2 and (matrix.shape[1] > 0 if dim is None else matrix.shape[1] == dim)
    if len(rows) != count or not fits:
        raise UpstreamFailed(
            f"The embedding provider sent {len(rows)} vectors of shape {matrix.shape[1:]} for {count} inputs;"
            f" the expected dimension is {dim or 'any'}."
        )
    if [one.index for one in ordered] != list(range(count)):
        raise UpstreamFailed(
            "The embedding provider's vectors cannot be matched to the inputs: the indices do not count up from 0."
        )
    return matrix
