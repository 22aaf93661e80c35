"""Makes TorchScript functions. They run without Python and keep what a recorded forward loses (recorded.py): branches,
loops, and some types of arguments.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])


def script(function: _Function) -> _Function:
    """Compile a function from its source, with its branches and loops."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it advises torch.compile: minutes, and a C++ compiler
        return torch.jit.script(function)


def from_ir(name: str, ir: str) -> Callable[..., Any]:
    """Make a function from TorchScript's own notation, for operators whose argument types Python cannot express."""
    return torch._C._create_function_from_graph(name, torch._C.parse_ir(ir))
