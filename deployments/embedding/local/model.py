"""A sentence-transformers model on this machine's CPU or GPU.

The vectors are `SentenceTransformer.encode`'s: the model's own modules run, and its own tokenizer; only the loop
around them is ours. Batches are not padded where the model can do without (unpadded.py). On CPU half-precision weights
are laid out once (packed.py) and the forward is recorded (recorded.py); on CUDA transfers overlap compute and small
batches are CUDA graphs (cuda.py).
"""

from __future__ import annotations

import asyncio
import logging
import sys
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Transformer

from deployments.embedding.local import packed, tiling, unpadded
from deployments.embedding.local.recorded import NotRecordable, Recorded
from deployments.embedding.local.revision import revision_of
from deployments.embedding.local.tokenizers import longest_inputs, tokenizer
from deployments.embedding.model import InputType, Model, ModelInfo, TextToken, Tokens, Truncate
from deployments.embedding.threads import Threads
from deployments.errors import ModelUnavailable

logger = logging.getLogger("memserve.embedding")

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# How far the two ways of running a batch may differ, as 1 - cosine: rounding is far below, a wrong position far above.
_SAME = {torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-3}

# What a model must give the same vectors as `encode` does before it is served. Ten times as far apart is still no other
# vector: packed layers round once less.
_SAMPLES = ["Peanuts give me hives.", "My flight leaves at six, and Rex the spaniel fears thunder."]
_TOLERANCE = 10

_SWITCH_S = 0.0002


def choose_device(device: str) -> str:
    """`auto` is the first GPU, or the CPU where there is none."""
    if device == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    return "cuda:0" if device == "cuda" else device


def choose_dtype(dtype: str, device: str) -> torch.dtype:
    """`auto` is bfloat16 where it is fast (CUDA from Ampere on; CPUs with avx512_bf16 or AMX), float32 elsewhere."""
    if dtype != "auto":
        return _DTYPES[dtype]
    if device.startswith("cuda"):
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


class LocalModel(Model):
    """See the module.

    Args:
        path: a folder that sentence-transformers can load, or a hub name.
        name: what it is called in answers.
        device: `cpu`, `cuda`, `cuda:N` or `auto`.
        dtype: `float32`, `bfloat16`, `float16` or `auto`.
        num_threads: intra-op threads of the process on CPU; None leaves torch's choice.
        max_tokens: read no more of an input than so many tokens, where the model would.
        allow_download: fetch from the hub what is not on disk.

    Raises:
        ModelUnavailable: it cannot be loaded, or its vectors would not be `encode`'s; one line for an operator.
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
        network = _load(path, name or path, device, weights, allow_download)
        self._network = network
        self._transformer = network[0]
        self._device = torch.device(device)
        self._dtype = weights
        limits = {which: min(limit, max_tokens or limit) for which, limit in longest_inputs(network).items()}
        tokenizes = network.tokenizer.backend_tokenizer
        self._whole = tokenizer(tokenizes)
        ways: tuple[Truncate, ...] = ("end", "start")
        self._cut = {(way, limit): tokenizer(tokenizes, way, limit) for way in ways for limit in set(limits.values())}
        self._special = frozenset(network.tokenizer.all_special_ids)
        self._pad_id = network.tokenizer.pad_token_id or 0
        self._pools_without_prompt = any(getattr(module, "include_prompt", True) is False for module in network)
        prompts = {key: prompt or "" for key, prompt in (network.prompts or {}).items()}
        dtype_name = str(weights).removeprefix("torch.")
        self.info = ModelInfo(
            name=name or Path(path).name,
            revision=f"{revision_of(path, network)}-{dtype_name}",
            dim=int(network.get_embedding_dimension()),
            max_tokens=limits[None],
            vocab_size=int(network[0].model.get_input_embeddings().num_embeddings),
            prompts=prompts,
            device=device,
            dtype=dtype_name,
            default_prompt=prompts.get(network.default_prompt_name or "", ""),
            max_tokens_of={one: limit for one, limit in limits.items() if one and limit != limits[None]},
        )
        network.max_seq_length = self.info.max_tokens
        encoded = _encoded(network, self.info.name)
        on_gpu = self._device.type == "cuda"
        self.max_batch_tokens = 65_536 if on_gpu else 1024
        self.forwards_in_flight = 2 if on_gpu else 1
        self._tokenize_thread = ThreadPoolExecutor(1, "tokenize")
        self._forward_threads = Threads("forward", torch.set_num_threads, num_threads or torch.get_num_threads())
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        # A forward that is not recorded takes the interpreter's lock between its kernels; the event loop, busy with
        # answers, would let it wait for the default of 5 ms each time.
        sys.setswitchinterval(_SWITCH_S)
        self._first_position = unpadded.first_position(self._transformer.model)
        self._recorded: Recorded | None = None
        # Flash attention on CUDA has no float32.
        half = weights != torch.float32
        unpaddable = (half or not on_gpu) and unpadded.install(self._transformer.model)
        self.pads = not (unpaddable and self._agrees_without_padding())
        linears = packed.pack_linears(network) if not on_gpu and packed.available(weights) else []
        self._rounds_up = bool(linears)
        if not on_gpu and not self.pads:
            self._recorded = self._record(linears)
        self._gpu = None
        self._check_alike(encoded, _TOLERANCE * _SAME[weights])
        if on_gpu and not self.pads:
            from deployments.embedding.local.cuda import Gpu

            self._gpu = Gpu(self._vectors, self._device)

    def _agrees_without_padding(self) -> bool:
        """Run a few texts padded and unpadded, and compare."""
        probe = self._probe(3, 17, 9, 17, 300)  # 300 is behind most windows
        try:
            with torch.inference_mode():
                flat = unpadded.flatten(probe, self._first_position)
                ours = self._vectors(unpadded.features(flat, self._device, self._dtype))
                ours = self._to_host(ours)[flat.place]
                theirs = self._to_host(self._vectors(self._padded(probe)))
        except Exception as error:  # noqa: BLE001 - whatever a foreign model raises, it can be run padded
            logger.info("%s is run with padding: %s", self.info.name, error)
            return False
        apart = _apart(ours, theirs)
        if not apart <= _SAME[self._dtype]:
            logger.info("%s is run with padding: without it vectors differ by %g", self.info.name, apart)
            return False
        return True

    def _probe(self, *lengths: int) -> list[Tokens]:
        """Texts of random words, of so many tokens; none longer than the model reads."""
        random = np.random.default_rng(0)
        words = np.setdiff1d(np.arange(self.info.vocab_size), list(self._special))
        return [Tokens(random.choice(words, min(length, self.info.max_tokens)).tolist()) for length in lengths]

    def _record(self, linears: list[packed.PackedLinear]) -> Recorded | None:
        """The forward without padding as a recording; None where it cannot be one."""
        self._network.requires_grad_(False)
        probes = (self._probe(3, 40, 9, 17), self._probe(1), self._probe(16), self._probe(*range(5, 15), 300, 33))
        try:
            with torch.inference_mode():
                batches = [unpadded.flatten(probe, self._first_position) for probe in probes]
                samples = [unpadded.features(flat, self._device, self._dtype) for flat in batches]
                return Recorded(self._run_modules, linears, samples)
        except NotRecordable as error:
            logger.info("%s is run without a recording: %s", self.info.name, error)
            return None

    def _check_alike(self, encoded: np.ndarray, limit: float) -> None:
        """Refuse a model that `encode` gives what it is not given here, as the segments of tokens."""
        samples = [one for one in self._tokenize(_SAMPLES, self.info.default_prompt, "end") if isinstance(one, Tokens)]
        apart = _apart(np.concatenate([self._run([one]) for one in samples]), encoded)
        if not apart <= limit:
            raise ModelUnavailable(
                f"The model {self.info.name!r} gives other vectors here than by encode (1 - cosine is {apart:.2g});"
                " it is not served."
            )

    async def tokenize(
        self,
        inputs: Sequence[str] | Sequence[Sequence[int]],
        prompt: str,
        truncate: Truncate,
        input_type: InputType | None = None,
    ) -> list[Tokens | int]:
        """See Model."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._tokenize_thread, self._tokenize, inputs, prompt, truncate, input_type)

    def _tokenize(
        self,
        inputs: Sequence[str] | Sequence[Sequence[int]],
        prompt: str,
        truncate: Truncate,
        input_type: InputType | None = None,
    ) -> list[Tokens | int]:
        limit = self.info.limit(input_type)
        texts = [prompt + given for given in inputs if isinstance(given, str)]
        tokenizes = self._whole if truncate == "none" else self._cut[truncate, limit]
        encodings = iter(tokenizes.encode_batch_fast(texts) if texts else ())
        prompt_tokens = self._prompt_tokens(prompt, limit) if prompt and self._pools_without_prompt else 0
        answer: list[Tokens | int] = []
        for given in inputs:
            if isinstance(given, str):
                encoding = next(encodings)
                ids, too_long = encoding.ids, len(encoding) >= limit and bool(encoding.overflowing)
            else:
                ids, too_long = list(given), len(given) > limit
            if len(ids) > limit and truncate == "none":
                answer.append(len(ids))
                continue
            cut = ids[-limit:] if truncate == "start" else ids[:limit]
            leading = prompt_tokens if isinstance(given, str) else 0
            if isinstance(given, str) and leading and too_long and truncate == "start":
                # The prompt was the first to go; what is in front of it, as [CLS], was not.
                dropped = len(self._whole.encode(prompt + given)) - limit
                leading = max(int(ids[0] in self._special), leading - dropped)
            answer.append(Tokens(cut, leading, too_long))
        return answer

    def _prompt_tokens(self, prompt: str, limit: int) -> int:
        # As sentence-transformers counts them: a special token at the end belongs to the text.
        ids = self._cut["end", limit].encode(prompt).ids
        return len(ids) - 1 if ids and ids[-1] in self._special else len(ids)

    async def forward(self, batch: Sequence[Tokens]) -> np.ndarray:
        """See Model."""
        try:
            return await self._forward_threads.run(self._forward, batch)
        except torch.AcceleratorError as error:
            if not _is_out_of_memory(error):  # sticky: the CUDA context is gone
                self.lost = str(error).splitlines()[0]
            raise

    def _forward(self, batch: Sequence[Tokens]) -> np.ndarray:
        try:
            return self._run(batch)
        except RuntimeError as error:
            if _is_out_of_memory(error):
                # Its frames hold what the forward had made so far, for as long as halves of the batch are tried.
                traceback.clear_frames(error.__traceback__)
                torch.cuda.empty_cache()
            raise

    def _run(self, batch: Sequence[Tokens]) -> np.ndarray:
        if self._pools_without_prompt and len({tokens.prompt_tokens for tokens in batch}) > 1:
            # Pooling takes one prompt length for a whole batch.
            vectors = np.empty((len(batch), self.info.dim), np.float32)
            for length in {tokens.prompt_tokens for tokens in batch}:
                rows = [row for row, tokens in enumerate(batch) if tokens.prompt_tokens == length]
                vectors[rows] = self._run([batch[row] for row in rows])
            return vectors
        prompt_tokens = batch[0].prompt_tokens if self._pools_without_prompt else 0
        with torch.inference_mode():
            if self.pads:
                return self._to_host(self._vectors(self._padded(batch), prompt_tokens))
            flat = unpadded.flatten(batch, self._first_position)
            if self._gpu is not None and not prompt_tokens:
                return self._gpu.run(flat)
            if self._rounds_up:
                flat = unpadded.round_up(flat)
            features = unpadded.features(flat, self._device, self._dtype)
            vectors = self._to_host(self._vectors(features, prompt_tokens))[flat.place]
        if len(batch) > 1:  # one that overflows spoils those that share its row (tiling.py): alone they are themselves
            for row in np.flatnonzero(~np.isfinite(vectors).all(axis=1)).tolist():
                if len(batch[row]) <= tiling.SHARED:
                    vectors[row] = self._run([batch[row]])[0]
        return vectors

    def _vectors(self, features: dict[str, Any], prompt_tokens: int = 0) -> torch.Tensor:
        """Run the model. Returns (texts, dim) on the device, in the dtype of the weights or, normalised, in float32."""
        if self._recorded is not None and not prompt_tokens:
            return self._recorded(features)
        return self._run_modules(features, prompt_tokens)

    def _run_modules(self, features: dict[str, Any], prompt_tokens: int = 0) -> torch.Tensor:
        if prompt_tokens:
            features["prompt_length"] = prompt_tokens
        for module in self._network:
            if module is self._network[-1] and isinstance(module, Normalize):
                # In half precision lengths would be 1 to three digits only, and dot products are taken of them.
                features["sentence_embedding"] = features["sentence_embedding"].float()
            features = module(features)
        return features["sentence_embedding"]

    def _padded(self, batch: Sequence[Tokens]) -> dict[str, Any]:
        longest = max(len(tokens) for tokens in batch)
        ids = np.full((len(batch), longest), self._pad_id, np.int64)  # (batch, seq)
        mask = np.zeros((len(batch), longest), np.int64)  # (batch, seq)
        for row, tokens in enumerate(batch):
            ids[row, : len(tokens)] = tokens.ids
            mask[row, : len(tokens)] = 1
        return {
            "input_ids": torch.from_numpy(ids).to(self._device),
            "attention_mask": torch.from_numpy(mask).to(self._device),
        }

    @staticmethod
    def _to_host(vectors: torch.Tensor) -> np.ndarray:
        return np.ascontiguousarray(vectors.float().cpu().numpy())

    async def warm_up(self, max_batch_tokens: int, forwards: int) -> None:
        """See Model. On CUDA also captures the graphs of small batches."""
        if self._gpu is not None:
            shape = (forwards, self.info.longest, self._first_position, max_batch_tokens)
            await self._forward_threads.run(self._gpu.capture, *shape)
        await super().warm_up(max_batch_tokens, forwards)

    async def split(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[TextToken]]:
        """See Model."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._tokenize_thread, self._split, list(texts), add_special_tokens)

    def _split(self, texts: list[str], add_special_tokens: bool) -> list[list[TextToken]]:
        encodings = self._whole.encode_batch(texts, add_special_tokens=add_special_tokens)
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
        lists = [list(sequence) for sequence in ids]
        return await loop.run_in_executor(self._tokenize_thread, self._whole.decode_batch, lists)

    async def close(self) -> None:
        """See Model."""
        self._tokenize_thread.shutdown(wait=False)
        self._forward_threads.close()


def _apart(ours: np.ndarray, theirs: np.ndarray) -> float:
    """1 - the smallest cosine of two rows; not a number where a value is none."""
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    return float(np.max(1 - np.sum(ours * theirs, axis=1) / np.maximum(norms, 1e-12)))


def _encoded(network: Any, name: str) -> np.ndarray:
    """(samples, dim) float32, one by one: what pads a batch must not count."""
    try:
        vectors = network.encode(_SAMPLES, batch_size=1, show_progress_bar=False, convert_to_tensor=True)
    except Exception as error:
        raise ModelUnavailable(f"The model {name!r} cannot encode: {_line(error)}") from error
    return np.asarray(vectors.float().cpu().numpy())


def _load(path: str, name: str, device: str, weights: torch.dtype, allow_download: bool) -> Any:
    try:
        network = SentenceTransformer(
            path, device=device, local_files_only=not allow_download, model_kwargs={"dtype": weights}
        )
    except Exception as error:  # whatever goes wrong in a foreign loader, an operator wants one line
        if not allow_download and isinstance(error, OSError) and not Path(path).is_dir():
            message = f"The model {name!r} is no folder and not in the hub cache, and allow_download is off."
        else:
            message = f"The model {name!r} cannot be loaded: {_line(error)}"
        raise ModelUnavailable(message) from error
    if not isinstance(network[0], Transformer) or not hasattr(network.tokenizer, "backend_tokenizer"):
        raise ModelUnavailable(
            f"The model {name!r} is not a transformer with a fast tokenizer; no other kind is served."
        )
    if "message" in network[0].modality_config:
        raise ModelUnavailable(f"The model {name!r} reads chat messages, which are not served.")
    if network[0].query_expansion is not None:
        raise ModelUnavailable(f"The model {name!r} fills up queries with masks, which is not served.")
    return network.eval()  # not .to(weights), which rounds rotary frequencies: float32 as loaded, beside any weights


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Torch's allocator has no room, or the driver has none (for a kernel's code, pinned memory): cudaError 2."""
    return isinstance(error, torch.OutOfMemoryError) or getattr(error, "error_code", None) == 2
