"""A forward on CPU that is recorded once as TorchScript and then runs without Python between its kernels.

The modules of a model are written in Python. For a short text, Python takes as long as the kernels, and it holds the
interpreter's lock meanwhile. A recording takes batches of any shape and calls the same kernels, so its vectors are
bit for bit those of the modules.

A recording is wrong if the model's code branches on a value or a size. So it is checked: torch warns about
such code while it records, and some batches run both ways and are compared.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch

from deployments.embedding.local.packed import PackedLinear
from deployments.embedding.local.unpadded import Tiles

_PER_BATCH = ("input_ids", "position_ids", "seq_idx", "cu_seq_lens_q", "token_type_ids")  # those that the model reads


class NotRecordable(Exception):
    """The recording would not give every batch the model's own vectors. The message is the reason."""


class Recorded:
    """A recorded forward. Several threads may call it at once. Torch keeps it and its weights until the process ends.

    Args:
        vectors: the forward. It takes features (unpadded.features) and returns (texts, dim). Its weights must not
            require gradients.
        packed: the linear layers whose weights a recording cannot hold.
        samples: features of several batches of different shapes. The first is recorded, all are compared.

    Raises:
        NotRecordable: the recording would not be the model; run the model itself instead.
    """

    def __init__(
        self,
        vectors: Callable[[dict[str, Any]], torch.Tensor],
        packed: Sequence[PackedLinear],
        samples: Sequence[dict[str, Any]],
    ) -> None:
        self._weights = [layer.weight for layer in packed]
        self._per_batch = [name for name in _PER_BATCH if name in samples[0]]

        def forward(*arguments: torch.Tensor) -> torch.Tensor:
            given = iter(arguments)
            features = {**samples[0], **{name: next(given) for name in self._per_batch}}
            features["layout"] = Tiles(*islice(given, len(Tiles._fields)))
            # The remaining arguments are the packed weights. They are the very tensors that the layers hold, so torch
            # records a layer's use of its weight as a use of the argument.
            return vectors(features)

        try:
            # Warnings are collected, not raised: an error raised from a warning inside an operator may get lost.
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("ignore")
                warnings.simplefilter("always", torch.jit.TracerWarning)
                self._graph = torch.jit.trace(forward, self._arguments(samples[0]), check_trace=False)
            del self._graph._torchdynamo_inline  # it would keep `forward` alive, and with it the samples
            same = not warned and all(torch.equal(self(sample), vectors(dict(sample))) for sample in samples)
        except Exception as error:  # a foreign model may raise anything; it can still run unrecorded
            raise NotRecordable(_reason(error)) from error
        if warned:
            raise NotRecordable(_reason(warned[0].message))
        if not same:
            raise NotRecordable("its vectors differ from the model's in other batches")

    def __call__(self, features: dict[str, Any]) -> torch.Tensor:
        """Run a batch, given its features. Returns (texts, dim) in the dtype of the forward that was recorded.

        Raises:
            RuntimeError: an operator failed; the message is one line.
        """
        try:
            return self._graph(*self._arguments(features))
        except RuntimeError as error:
            raise RuntimeError(_reason(error)) from error

    def _arguments(self, features: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        return (*(features[name] for name in self._per_batch), *features["layout"], *self._weights)


def _reason(error: BaseException | str) -> str:
    """The message of an error, in one line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # TorchScript puts lines about the place of the failure in front of the operator's message.
    first = next((n for n, line in enumerate(lines) if line.startswith("RuntimeError: ")), 0)
    return lines[first].removeprefix("RuntimeError: ")
