"""Functions of TorchScript: they run without Python, and hold what a recorded forward (recorded.py) cannot."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])


def script(function: _Function) -> _Function:
    """The same function, compiled from its source: branches and loops stay what they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # for torch.compile, which takes minutes and a C++ compiler
        return torch.jit.script(function)


def from_ir(name: str, ir: str) -> Callable[..., Any]:
    """A function in TorchScript's own notation: for operators whose arguments Python's have no type for."""
    return torch._C._create_function_from_graph(name, torch._C.parse_ir(ir))
