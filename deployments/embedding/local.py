"""A sentence-transformers model on this machine's CPU or GPU.

The vectors are `SentenceTransformer.encode`'s: the model's own modules run, only the loop around them is ours.
Nothing is fetched from a hub unless it is asked for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deployments.embedding.model import Model, ModelInfo, TextToken, Tokens, Truncate
from deployments.errors import ModelUnavailable

if TYPE_CHECKING:
    import torch


def choose_device(device: str) -> str:
    """`auto` is the first GPU, or the CPU where there is none."""
    import torch

    if device != "auto":
        return device
    return "cuda:0" if torch.cuda.is_available() else "cpu"


def choose_dtype(dtype: str, device: str) -> torch.dtype:
    """`auto` is bfloat16 where it is fast (CUDA; CPUs with avx512_bf16 or AMX), float32 elsewhere."""
    import torch

    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    if device.startswith("cuda"):
        return torch.bfloat16
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


class LocalModel(Model):
    """See the module.

    Args:
        path: a folder that sentence-transformers can load, or a hub name with `allow_download` or in the local cache.
        name: what it is called in answers.
        device: `cpu`, `cuda`, `cuda:N` or `auto`.
        dtype: `float32`, `bfloat16`, `float16` or `auto`.
        num_threads: intra-op threads of the process on CPU; None leaves torch's choice.
        allow_download: fetch from the hub what is not on disk.

    Raises:
        ModelUnavailable: it cannot be loaded; one line for an operator.
    """

    def __init__(
        self,
        path: str,
        *,
        name: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        num_threads: int | None = None,
        allow_download: bool = False,
    ) -> None:
        import torch
        from sentence_transformers import SentenceTransformer

        device = choose_device(device)
        weights = choose_dtype(dtype, device)
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        try:
            network = SentenceTransformer(
                path, device=device, local_files_only=not allow_download, model_kwargs={"dtype": weights}
            )
        except Exception as error:
            first_line = (str(error).splitlines() or [type(error).__name__])[0]
            raise ModelUnavailable(f"The model {path!r} cannot be loaded: {first_line}") from error
        self._network = network.to(weights).eval()
        self._device = torch.device(device)
        self._tokenisers = _tokenisers(network)
        self._special = set(network.tokenizer.all_special_ids)
        self._pad_id = network.tokenizer.pad_token_id or 0
        self._splits_prompts = any(getattr(module, "include_prompt", True) is False for module in network)
        prompts = dict(network.prompts or {})
        default = prompts.get(network.default_prompt_name or "", "")
        dim = network.get_embedding_dimension()
        self.info = ModelInfo(
            name or Path(path).name,
            f"{name or Path(path).name}-{str(weights).removeprefix('torch.')}",
            int(dim),
            int(network.max_seq_length),
            len(network.tokenizer),
            prompts,
            device,
            str(weights).removeprefix("torch."),
            default,
        )
        cuda = device.startswith("cuda")
        self.max_batch_tokens = 65_536 if cuda else 1024
        self.forwards_in_flight = 2 if cuda else 1
        self._tokenise_thread = ThreadPoolExecutor(1, "tokenise")
        self._forward_threads = ThreadPoolExecutor(self.forwards_in_flight, "forward")

    async def tokenise(
        self, inputs: Sequence[str] | Sequence[Sequence[int]], prompt: str, truncate: Truncate
    ) -> list[Tokens | int]:
        """See Model."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._tokenise_thread, self._tokenise, inputs, prompt, truncate)

    def _tokenise(
        self, inputs: Sequence[str] | Sequence[Sequence[int]], prompt: str, truncate: Truncate
    ) -> list[Tokens | int]:
        limit = self.info.max_tokens
        answer: list[Tokens | int] = []
        texts = [prompt + given for given in inputs if isinstance(given, str)]
        prompt_tokens = self._prompt_tokens(prompt) if prompt and self._splits_prompts else 0
        tokeniser = self._tokenisers[truncate]
        encodings = iter(tokeniser.encode_batch_fast(texts)) if texts else iter(())
        for given in inputs:
            if isinstance(given, str):
                encoding = next(encodings)
                ids = encoding.ids
                if len(ids) > limit:
                    answer.append(len(ids))
                else:
                    answer.append(Tokens(ids, prompt_tokens, len(ids) == limit and bool(encoding.overflowing)))
            elif len(given) > limit and truncate == "none":
                answer.append(len(given))
            else:
                answer.append(Tokens(given[-limit:] if truncate == "start" else given[:limit], 0, len(given) > limit))
        return answer

    def _prompt_tokens(self, prompt: str) -> int:
        ids = self._tokenisers["end"].encode(prompt).ids
        return len(ids) - 1 if ids[-1] in self._special else len(ids)

    async def forward(self, batch: Sequence[Tokens]) -> np.ndarray:
        """See Model."""
        return await asyncio.get_running_loop().run_in_executor(self._forward_threads, self._forward, batch)

    def _forward(self, batch: Sequence[Tokens]) -> np.ndarray:
        import torch

        longest = max(len(tokens) for tokens in batch)
        ids = np.full((len(batch), longest), self._pad_id, np.int64)  # (batch, seq)
        mask = np.zeros((len(batch), longest), np.int64)  # (batch, seq)
        for row, tokens in enumerate(batch):
            ids[row, : len(tokens)] = tokens.ids
            mask[row, : len(tokens)] = 1
        features = {
            "input_ids": torch.from_numpy(ids).to(self._device),
            "attention_mask": torch.from_numpy(mask).to(self._device),
        }
        with torch.inference_mode():
            vectors = self._network(features)["sentence_embedding"]
            return np.ascontiguousarray(vectors.float().cpu().numpy())

    async def split(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[TextToken]]:
        """See Model."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._tokenise_thread, self._split, list(texts), add_special_tokens)

    def _split(self, texts: list[str], add_special_tokens: bool) -> list[list[TextToken]]:
        encodings = self._tokenisers["none"].encode_batch(texts, add_special_tokens=add_special_tokens)
        return [
            [
                TextToken(token, text, bool(special), None if special else start, None if special else stop)
                for token, text, special, (start, stop) in zip(
                    encoding.ids, encoding.tokens, encoding.special_tokens_mask, encoding.offsets, strict=True
                )
            ]
            for encoding in encodings
        ]

    async def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """See Model."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._tokenise_thread, self._tokenisers["none"].decode_batch, [list(sequence) for sequence in ids]
        )

    async def close(self) -> None:
        """See Model."""
        self._tokenise_thread.shutdown(wait=False)
        self._forward_threads.shutdown(wait=False)


def _tokenisers(network: Any) -> dict[str, Any]:
    """One tokeniser a way of truncation: the setting is state of the object, and threads share it."""
    from tokenizers import Tokenizer

    own = network.tokenizer.backend_tokenizer.to_str()
    made = {"none": Tokenizer.from_str(own), "end": Tokenizer.from_str(own), "start": Tokenizer.from_str(own)}
    for truncate, tokeniser in made.items():
        tokeniser.no_padding()
        tokeniser.no_truncation()
        if truncate != "none":
            direction = "right" if truncate == "end" else "left"
            tokeniser.enable_truncation(network.max_seq_length, direction=direction)
    return made
