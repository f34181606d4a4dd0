"""Finds and types the compiled CPU library."""

import ctypes
import functools
import os
import sys
import warnings
from collections.abc import Callable
from importlib import resources
from typing import Any

import torch

# `import torch` precedes the load on purpose: both then share the OpenMP runtime that torch brings.

_SYMBOLS: dict[str, list[str]] = {}
"""Symbols of the library by the module that calls them."""

_forked = False
"""Whether this process was forked: GNU's OpenMP waits forever for a team of threads that stayed with the parent."""


def _after_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_after_fork)


@functools.cache
def native() -> ctypes.CDLL | None:
    """The compiled library, or None where the distribution was built without a C++ compiler."""
    # in an editable install the library is not beside this file
    folder = resources.files("core_tensor")
    for name in ("libcore_tensor_native.so", "libcore_tensor_native.dylib"):
        found = folder / name
        if found.is_file():
            with resources.as_file(found) as path:
                return ctypes.CDLL(str(path))
    return None


def serves(module: str) -> bool:
    """Whether the library holds every symbol that a module has named by `function`; warns once if not."""
    library = native()
    if library is None:
        _warn("the compiled library is missing; reinstall core-tensor with a C++17 compiler")
        return False
    complete = all(hasattr(library, name) for name in _SYMBOLS.get(module, []))
    if not complete:
        _warn("the compiled library is older than the code; build core-tensor anew")
    return complete


@functools.cache
def _warn(reason: str) -> None:
    message = f"{reason}. Slow references in plain torch serve instead, see core_tensor.backends()"
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def function(name: str, *argtypes: Any, returns: Any = None) -> Callable[..., Any]:
    """A typed C function of the compiled library; the trailing `int threads` that every kernel takes is filled in.

    Args:
        name: Exported symbol.
        argtypes: ctypes types of the arguments without the thread count; tensors go in as `ctypes.c_void_p`.
        returns: ctypes type of what it returns, None for nothing.

    Returns:
        A callable that takes tensors, or None, for `c_void_p` arguments and appends `torch.get_num_threads()`.
    """
    _SYMBOLS.setdefault(sys._getframe(1).f_globals["__name__"], []).append(name)
    pointers = [i for i, kind in enumerate(argtypes) if kind is ctypes.c_void_p]

    @functools.cache
    def symbol() -> Any:
        found = getattr(native(), name)
        found.argtypes = [*argtypes, ctypes.c_int]
        found.restype = returns
        return found

    def call(*args: Any) -> Any:
        values = [*args, 1 if _forked else torch.get_num_threads()]
        for i in pointers:
            if values[i] is not None:
                values[i] = values[i].data_ptr()
        return symbol()(*values)

    return call
