"""Runs the modules of a local model, in the fastest of several ways that gives the vectors of `encode`.

The same code runs a cross-encoder: its "vectors" have one value each, the score of a pair before the activation, as
`predict` gives it.

Batches run without padding if the model allows it (unpadded.py). On CPU, half-precision weights are laid out once
(packed.py) and the forward is recorded (recorded.py). On CUDA, transfers overlap compute and small batches replay CUDA
graphs (cuda.py).

Whether a model allows a faster way is measured when it is loaded: a few texts run both ways and the vectors are
compared. A model whose vectors differ from those of `encode` is refused.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sentence_transformers.sentence_transformer.modules import Normalize

from deployments.embedding.local import packed, tiling, unpadded
from deployments.embedding.local.recorded import NotRecordable, Recorded
from deployments.embedding.local.spec import Spec, first_line
from deployments.embedding.local.unpadded import Flat
from deployments.embedding.model import Tokens
from deployments.errors import ModelUnavailable

if TYPE_CHECKING:
    from deployments.embedding.local.cuda import Gpu

logger = logging.getLogger("memserve.embedding")


@dataclass(frozen=True, slots=True)
class Measure:
    """How the results of two ways to run a model are compared.

    Attributes:
        distance: of two results, each (texts, dim) float32; NaN if any value is NaN.
        same: the most that two ways to run a batch may differ. Rounding stays far below this; a wrong position is far
            above it.
        tolerance: a result may differ from that of sentence-transformers by this many times more, since packed layers
            round once less. That is still far below the distance to another text's result.
        noun, reference, unit: what messages call the results, the method of sentence-transformers, and the distance.
    """

    distance: Callable[[np.ndarray, np.ndarray], float]
    same: dict[torch.dtype, float]
    tolerance: int
    noun: str
    reference: str
    unit: str


def _largest_angle(ours: np.ndarray, theirs: np.ndarray) -> float:
    """1 - the smallest cosine between a row of each; NaN if any value is NaN."""
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    return float(np.max(1 - np.sum(ours * theirs, axis=1) / np.maximum(norms, 1e-12)))


def _largest_difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference of two values, relative to the larger of theirs and 1; NaN if any value is NaN."""
    return float(np.max(np.abs(ours - theirs) / np.maximum(np.abs(theirs), 1.0)))


_MEASURES = {
    "sentence_embedding": Measure(
        _largest_angle,
        {torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-3},
        10,
        "vectors",
        "encode",
        "1 - cosine",
    ),
    "scores": Measure(
        _largest_difference,
        {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02},
        2,
        "scores",
        "predict",
        "the relative difference",
    ),
}


class Forward:
    """See the module. Several threads may call `run` at once.

    Args:
        network: a SentenceTransformer or CrossEncoder, for inference only. Its layers are changed in place.
        spec: its requirements.
        samples: a few texts or pairs, ready for the forward.
        expected: (samples, dim) float32, their vectors as `encode` gives them, or their scores as `predict` does.

    Attributes:
        pads: whether a batch is padded to its longest text.

    Raises:
        ModelUnavailable: the vectors of the samples differ from the expected ones.
    """

    def __init__(self, network: Any, spec: Spec, samples: Sequence[Tokens], expected: np.ndarray) -> None:
        self._network = network
        self._spec = spec
        self._measure = _MEASURES[spec.output]
        self._recorded: Recorded | None = None
        self._gpu: Gpu | None = None
        on_gpu = spec.device.type == "cuda"
        why_padded = self._why_padded()
        self.pads = why_padded is not None
        if why_padded is not None:
            logger.info("%s runs with padding: %s", spec.info.name, why_padded)
        can_pack = not on_gpu and packed.available(spec.dtype)
        if not on_gpu and not can_pack and spec.dtype != torch.float32:
            logger.info("%s runs without packed layers: this CPU or this build of torch has none", spec.info.name)
        linears = packed.pack_linears(network) if can_pack else []
        self._rounds_up = bool(linears)
        if not on_gpu and not self.pads:
            self._recorded = self._record(linears)
        self._refuse_other_vectors(samples, expected)
        if on_gpu and not self.pads:
            from deployments.embedding.local.cuda import Gpu

            self._gpu = Gpu(self._vectors, spec.device)

    def _why_padded(self) -> str | None:
        """Why batches must be padded; None if they need not. Runs a few texts both ways, and compares the vectors."""
        if self._spec.device.type == "cuda" and self._spec.dtype == torch.float32:
            return "flash attention on CUDA has no float32"
        reason = unpadded.install(self._network[0].model)
        if reason is not None:
            return reason
        unpadded.give_heads_first_tokens(self._network[0].model)
        probe = self._probe(3, 17, 9, 17, 300)  # 300 is longer than most attention windows
        try:
            with torch.inference_mode():
                flat = self._flatten(probe)
                ours = self._vectors(unpadded.features(flat, self._spec.device, self._spec.dtype))
                ours = _to_host(ours)[flat.place]
                theirs = _to_host(self._vectors(self._padded(probe)))
        except Exception as error:  # noqa: BLE001 - a foreign model may raise anything; with padding it can still run
            return first_line(error)
        apart = self._measure.distance(ours, theirs)
        if apart <= self._measure.same[self._spec.dtype]:
            return None
        return f"without it, its {self._measure.noun} differ by {apart:g}"

    def _flatten(self, batch: Sequence[Tokens]) -> Flat:
        return unpadded.flatten(batch, self._spec.first_position, token_types=self._spec.token_types)

    def _probe(self, *lengths: int) -> list[Tokens]:
        """Texts of random words with these numbers of tokens, none longer than the model reads."""
        info = self._spec.info
        random = np.random.default_rng(0)
        words = np.setdiff1d(np.arange(info.vocab_size), list(self._spec.special_ids))
        texts = [random.choice(words, min(length, info.max_tokens)).tolist() for length in lengths]
        return [Tokens(text, len(text) // 3) for text in texts]

    def _record(self, linears: list[packed.PackedLinear]) -> Recorded | None:
        """Record the forward without padding; None if the model cannot be recorded."""
        self._network.requires_grad_(False)
        probes = (self._probe(3, 40, 9, 17), self._probe(1), self._probe(16), self._probe(*range(5, 15), 300, 33))
        try:
            with torch.inference_mode():
                batches = [self._flatten(probe) for probe in probes]
                samples = [unpadded.features(flat, self._spec.device, self._spec.dtype) for flat in batches]
                return Recorded(self._run_modules, linears, samples)
        except NotRecordable as error:
            logger.info("%s runs without a recording: %s", self._spec.info.name, error)
            return None

    def _refuse_other_vectors(self, samples: Sequence[Tokens], expected: np.ndarray) -> None:
        """Refuse a model to which sentence-transformers gives more than is known here."""
        measure = self._measure
        apart = measure.distance(np.concatenate([self._run([one]) for one in samples]), expected)
        if not apart <= measure.tolerance * measure.same[self._spec.dtype]:
            raise ModelUnavailable(
                f"The model {self._spec.info.name!r} gives other {measure.noun} here than {measure.reference} does"
                f" ({measure.unit} is {apart:.2g}); it is not served."
            )

    def capture_graphs(self, forwards: int, max_batch_tokens: int) -> None:
        """On CUDA, capture the graphs of small batches for this many forwards in flight. Nothing else may run."""
        if self._gpu is not None:
            self._gpu.capture(forwards, self._spec.info.longest, self._flatten([Tokens([0])]), max_batch_tokens)

    def run(self, batch: Sequence[Tokens]) -> np.ndarray:
        """Run one batch. Returns (batch, dim) float32, C-contiguous, in the order of `batch`.

        Raises:
            torch.AcceleratorError: of the device; `is_out_of_memory` says whether the process can continue.
            RuntimeError: an operator failed, or there is no memory.
        """
        try:
            return self._run(batch)
        except RuntimeError as error:
            if is_out_of_memory(error):
                # The traceback's frames hold the forward's activations, which would stay while halves of the batch run.
                traceback.clear_frames(error.__traceback__)
                torch.cuda.empty_cache()
            raise

    def _run(self, batch: Sequence[Tokens]) -> np.ndarray:
        if self._spec.pools_without_prompt and len({tokens.prompt_tokens for tokens in batch}) > 1:
            # Pooling takes one prompt length for a whole batch.
            vectors = np.empty((len(batch), self._spec.info.dim), np.float32)
            for length in {tokens.prompt_tokens for tokens in batch}:
                rows = [row for row, tokens in enumerate(batch) if tokens.prompt_tokens == length]
                vectors[rows] = self._run([batch[row] for row in rows])
            return vectors
        prompt_tokens = batch[0].prompt_tokens if self._spec.pools_without_prompt else 0
        with torch.inference_mode():
            if self.pads:
                return _to_host(self._vectors(self._padded(batch), prompt_tokens))
            flat = self._flatten(batch)
            if self._gpu is not None and not prompt_tokens:
                return self._gpu.run(flat)
            if self._rounds_up:
                flat = unpadded.round_up(flat)
            features = unpadded.features(flat, self._spec.device, self._spec.dtype)
            vectors = _to_host(self._vectors(features, prompt_tokens))[flat.place]
        if len(batch) > 1:  # a text that overflows spoils the texts in its row (tiling.py), so each of them runs alone
            for row in np.flatnonzero(~np.isfinite(vectors).all(axis=1)).tolist():
                if len(batch[row]) <= tiling.SHARED:
                    vectors[row] = self._run([batch[row]])[0]
        return vectors

    def _vectors(self, features: dict[str, Any], prompt_tokens: int = 0) -> torch.Tensor:
        """Run the model. Returns (texts, dim) on the device, in float32 if normalised, else in the weights' dtype."""
        if self._recorded is not None and not prompt_tokens:
            return self._recorded(features)
        return self._run_modules(features, prompt_tokens)

    def _run_modules(self, features: dict[str, Any], prompt_tokens: int = 0) -> torch.Tensor:
        if prompt_tokens:
            features["prompt_length"] = prompt_tokens
        for module in self._network:
            if module is self._network[-1] and isinstance(module, Normalize):
                # In half precision, lengths would be 1 to three digits only, and dot products depend on them.
                features[self._spec.output] = features[self._spec.output].float()
            features = module(features)
        return features[self._spec.output]

    def _padded(self, batch: Sequence[Tokens]) -> dict[str, Any]:
        longest = max(len(tokens) for tokens in batch)
        ids = np.full((len(batch), longest), self._spec.pad_id, np.int64)  # (batch, seq)
        mask = np.zeros((len(batch), longest), np.int64)  # (batch, seq)
        types = np.zeros((len(batch), longest), np.int64)  # (batch, seq)
        for row, tokens in enumerate(batch):
            ids[row, : len(tokens)] = tokens.ids
            mask[row, : len(tokens)] = 1
            types[row, tokens.prompt_tokens : len(tokens)] = 1
        features = {"input_ids": ids, "attention_mask": mask}
        if self._spec.token_types:
            features["token_type_ids"] = types
        return {name: torch.from_numpy(values).to(self._spec.device) for name, values in features.items()}


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch's allocator has no room, or the driver has none for code or pinned memory (cudaError 2)."""
    return isinstance(error, torch.OutOfMemoryError) or getattr(error, "error_code", None) == 2


def _to_host(vectors: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(vectors.float().cpu().numpy())
