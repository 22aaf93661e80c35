"""Linear layers whose weights are laid out for the CPU's matrix units once, instead of in every call.

In half precision, torch's linear reorders its weight into oneDNN's blocked layout in each call. For a short text, this
takes longer than the product itself. oneDNN accepts a weight that was reordered in advance, and gives bit-identical
results. This is what the freezing of torch.compile does, but without compiling.

The GELU that follows a BERT-like intermediate layer is fused into the layer's product. This saves a pass over the
widest activation and rounds once less.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from deployments.embedding.local import torchscript


def available(dtype: torch.dtype) -> bool:
    """Whether this build of torch has the operators used here, and this CPU can run them in this dtype."""
    ops = torch.ops.mkldnn
    if not (torch.backends.mkldnn.is_available() and hasattr(ops, "_linear_pointwise")):
        return False
    supported = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    return dtype in supported and hasattr(ops, supported[dtype]) and bool(getattr(ops, supported[dtype])())


class PackedLinear:
    """The forward of a linear layer with a reordered weight. Only oneDNN can read `weight`."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, activation: str) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        self._bias = bias
        self._activation = activation

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """inputs: (..., in_features). Returns (..., out_features)."""
        if torch.jit.is_tracing():
            return _recordable(self._activation)(inputs, self.weight, self._bias)
        return torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self._bias, self._activation, [], "none")


@functools.cache
def _recordable(activation: str) -> Callable[..., torch.Tensor]:
    """The operator as a TorchScript function: tracing cannot record its list of optional numbers."""
    return torchscript.from_ir(
        f"linear_{activation}",
        f"""
        graph(%inputs : Tensor, %weight : Tensor, %bias : Tensor?):
          %activation : str = prim::Constant[value="{activation}"]()
          %scalars : Scalar?[] = prim::ListConstruct()
          %algorithm : str = prim::Constant[value="none"]()
          %out : Tensor = mkldnn::_linear_pointwise(%inputs, %weight, %bias, %activation, %scalars, %algorithm)
          return (%out)
        """,
    )


def pack_linears(model: torch.nn.Module) -> list[PackedLinear]:
    """Give every linear layer of a half-precision CPU model a reordered weight, in place. For inference only.

    The original weights are dropped; only their shape and dtype remain. Returns the new forwards.
    """
    made = []
    for parent in model.modules():
        activation = getattr(parent, "intermediate_act_fn", None)
        for name, layer in parent.named_children():
            if type(layer) is not torch.nn.Linear or layer.weight.dtype not in (torch.bfloat16, torch.float16):
                continue
            fuse = name == "dense" and type(activation).__name__ == "GELUActivation" and _is_exact_gelu(activation)
            packed = PackedLinear(layer.weight.detach(), layer.bias, "gelu" if fuse else "none")
            layer.forward = packed  # type: ignore[method-assign, assignment]
            layer.weight = torch.nn.Parameter(layer.weight.to("meta"), requires_grad=False)
            if fuse:
                parent.intermediate_act_fn = torch.nn.Identity()
            made.append(packed)
    return made


def _is_exact_gelu(activation: Any) -> bool:
    return getattr(activation, "act", None) is torch.nn.functional.gelu
