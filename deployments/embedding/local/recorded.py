"""A forward on CPU, recorded once as TorchScript and then run without Python between its kernels.

A model's modules are written in Python, which takes as long as the kernels of a short text do, and holds the
interpreter's lock meanwhile. A recording takes batches of any shape and calls the same kernels, so its vectors are the
modules' bit for bit. Whether it holds all that a model does is not guessed: where the model's code looks at a value or
a size to decide something, torch warns as it records, and some batches are run both ways and compared.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch

from deployments.embedding.local.packed import PackedLinear
from deployments.embedding.local.unpadded import Tiles

_PER_BATCH = ("input_ids", "position_ids", "seq_idx", "cu_seq_lens_q")


class NotRecordable(Exception):
    """The recording would not do what the model does with every batch; says why."""


class Recorded:
    """A recorded forward; several threads may call it at once. Torch keeps it, weights and all, until the process ends.

    Args:
        vectors: the forward, which takes features (unpadded.features) and returns (texts, dim). Its weights need no
            gradient.
        packed: the linear layers whose weights a recording cannot hold.
        samples: features of several batches of different shapes, the first to record.

    Raises:
        NotRecordable: the model is to be run as it is.
    """

    def __init__(
        self,
        vectors: Callable[[dict[str, Any]], torch.Tensor],
        packed: Sequence[PackedLinear],
        samples: Sequence[dict[str, Any]],
    ) -> None:
        self._weights = [layer.weight for layer in packed]

        def forward(*arguments: torch.Tensor) -> torch.Tensor:
            given = iter(arguments)
            features = {**samples[0], **{name: next(given) for name in _PER_BATCH}}
            features["layout"] = Tiles(*islice(given, len(Tiles._fields)))
            # The weights behind them are the tensors that the layers hold: torch takes a layer's for the argument.
            return vectors(features)

        try:
            # Kept, not raised: an error that a warning becomes within an operator is now and then lost on its way out.
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("ignore")
                warnings.simplefilter("always", torch.jit.TracerWarning)
                self._graph = torch.jit.trace(forward, self._arguments(samples[0]), check_trace=False)
            del self._graph._torchdynamo_inline  # `forward`, and with it the samples
            same = not warned and all(torch.equal(self(sample), vectors(dict(sample))) for sample in samples)
        except Exception as error:  # whatever a foreign model raises, it can be run as it is
            raise NotRecordable(_reason(error)) from error
        if warned:
            raise NotRecordable(_reason(warned[0].message))
        if not same:
            raise NotRecordable("it gives other batches other vectors")

    def __call__(self, features: dict[str, Any]) -> torch.Tensor:
        """features: of a batch. Returns (texts, dim) in the dtype that `vectors` gives them.

        Raises:
            RuntimeError: an operator's, in one line.
        """
        try:
            return self._graph(*self._arguments(features))
        except RuntimeError as error:
            raise RuntimeError(_reason(error)) from error

    def _arguments(self, features: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        return (*(features[name] for name in _PER_BATCH), *features["layout"], *self._weights)


def _reason(error: BaseException | str) -> str:
    """What went wrong, in one line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # TorchScript says what failed behind where it did, in lines of its own; the operator's message is the last.
    first = next((n for n, line in enumerate(lines) if line.startswith("RuntimeError: ")), 0)
    return lines[first].removeprefix("RuntimeError: ")
