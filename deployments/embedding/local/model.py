"""A sentence-transformers model on this machine's CPU or GPU.

The vectors are those of `SentenceTransformer.encode`: the model's own tokenizer and modules run, and only the loop
around them is ours. spec.py loads the model and reads its requirements, tokenizers.py tokenizes, forward.py runs it.
reranker.py changes this for cross-encoders.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from deployments.embedding.local.forward import Forward, is_out_of_memory
from deployments.embedding.local.spec import Spec, choose_device, choose_dtype, first_line, load_network, spec_of
from deployments.embedding.local.threads import Threads
from deployments.embedding.local.tokenizers import Tokenizers
from deployments.embedding.model import InputType, Model, TextToken, Tokens, Truncate
from deployments.errors import ModelUnavailable

SAMPLES = ["Peanuts give me hives.", "My flight leaves at six, and Rex the spaniel fears thunder."]
"""A model is served only if it gives these texts the vectors that `encode` gives them."""

_SWITCH_S = 0.0002


class LocalModel(Model):
    """See the module.

    Args:
        path: a folder that sentence-transformers can load, or a hub name.
        name: what answers call it; by default the last part of `path`.
        device: `cpu`, `cuda`, `cuda:N` or `auto`.
        dtype: `float32`, `bfloat16`, `float16` or `auto`.
        num_threads: intra-op threads of the process on CPU; None leaves torch's choice.
        max_tokens: an upper limit of all input lengths, in tokens; None for the model's own.
        allow_download: fetch from the hub what is not on disk.

    Raises:
        ModelUnavailable: it cannot be loaded, or its vectors would differ from those of `encode`; one line for an
            operator.
    """

    def __init__(
        self,
        path: str,
        *,
        name: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        num_threads: int | None = None,
        max_tokens: int | None = None,
        allow_download: bool = False,
    ) -> None:
        device = choose_device(device)
        weights = choose_dtype(dtype, device)
        network = self._load(path, name=name or path, device=device, dtype=weights, allow_download=allow_download)
        called = name or Path(path).name
        spec = spec_of(network, path, name=called, device=device, dtype=weights, max_tokens=max_tokens)
        network.max_seq_length = spec.info.max_tokens
        self.info = spec.info
        on_gpu = spec.device.type == "cuda"
        self.max_batch_tokens = 65_536 if on_gpu else 1024
        self.forwards_in_flight = 2 if on_gpu else 1
        self._tokenizers = self._tokenizers_of(network.tokenizer.backend_tokenizer, spec)
        tokens = self._tokenizers.tokenize(SAMPLES, self._sample_prompt(spec), "end")
        samples = [one for one in tokens if isinstance(one, Tokens)]
        try:
            expected = self._results_of_samples(network)
        except Exception as error:
            raise ModelUnavailable(f"The model {called!r} cannot run: {first_line(error)}") from error
        # The engine tokenizes short texts, long texts and texts to split, one job of each at a time.
        self._tokenize_threads = ThreadPoolExecutor(3, "tokenize")
        self._forward_threads = Threads("forward", torch.set_num_threads, num_threads or torch.get_num_threads())
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        # A forward that is not recorded takes the interpreter's lock between its kernels. By default it could wait 5 ms
        # for it each time, while the event loop is busy with answers.
        sys.setswitchinterval(_SWITCH_S)
        self._forward = Forward(network, spec, samples, expected)
        self.pads = self._forward.pads

    # Kinds of models differ in the following.

    def _load(self, path: str, **options: Any) -> Any:
        return load_network(path, **options)

    def _tokenizers_of(self, tokenizer: Tokenizer, spec: Spec) -> Tokenizers:
        return Tokenizers(tokenizer, spec)

    def _sample_prompt(self, spec: Spec) -> str:
        return spec.info.default_prompt

    def _results_of_samples(self, network: Any) -> np.ndarray:
        """Those of sentence-transformers, (samples, dim) float32, one by one so that padding plays no part."""
        vectors = network.encode(SAMPLES, batch_size=1, show_progress_bar=False, convert_to_tensor=True)
        return np.asarray(vectors.float().cpu().numpy())

    async def tokenize(
        self,
        inputs: Sequence[str] | Sequence[Sequence[int]],
        prompt: str,
        truncate: Truncate,
        input_type: InputType | None = None,
    ) -> list[Tokens | int]:
        """See Model."""
        loop = asyncio.get_running_loop()
        job = self._tokenizers.tokenize
        return await loop.run_in_executor(self._tokenize_threads, job, inputs, prompt, truncate, input_type)

    async def forward(self, batch: Sequence[Tokens]) -> np.ndarray:
        """See Model."""
        try:
            return await self._forward_threads.run(self._forward.run, batch)
        except torch.AcceleratorError as error:
            if not is_out_of_memory(error):  # the CUDA context is lost, and every later call would fail as well
                self.lost = str(error).splitlines()[0]
            raise

    async def warm_up(self, max_batch_tokens: int, forwards: int) -> None:
        """See Model. On CUDA this also captures the graphs of small batches."""
        await self._forward_threads.run(self._forward.capture_graphs, forwards, max_batch_tokens)
        await super().warm_up(max_batch_tokens, forwards)

    async def split(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[TextToken]]:
        """See Model."""
        loop = asyncio.get_running_loop()
        job = self._tokenizers.split
        return await loop.run_in_executor(self._tokenize_threads, job, list(texts), add_special_tokens)

    async def decode(self, ids: Sequence[Sequence[int]], *, skip_special_tokens: bool = True) -> list[str]:
        """See Model."""
        lists = [list(sequence) for sequence in ids]
        loop = asyncio.get_running_loop()
        job = self._tokenizers.decode
        return await loop.run_in_executor(self._tokenize_threads, job, lists, skip_special_tokens)

    async def close(self) -> None:
        """See Model."""
        self._tokenize_threads.shutdown(wait=False)
        self._forward_threads.close()
