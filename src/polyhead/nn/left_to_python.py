"""Methods that `torch.compile` leaves to Python as one step, without loading the compiler to say so."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch._compile import _disable_dynamo

__all__ = ["LeftToPython"]


class LeftToPython:
    """A method that the compiler runs as it is: one graph break, whatever it does inside.

    As `torch.compiler.disable` above the method, but that loads the compiler where the class is defined. And
    said at the call it would be traced itself: it breaks the graph three times, and makes something new in
    every call, which is compiled anew.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.plain = function
        # not public, but what torch itself uses where it must not load its compiler: it loads it when called
        self.left_out = _disable_dynamo(function)
        self.__doc__ = function.__doc__

    def __get__(self, owner: Any, kind: type | None = None) -> Any:
        if owner is None:
            return self
        return functools.partial(self.left_out if torch.compiler.is_compiling() else self.plain, owner)
