"""Finds and types the compiled CPU library."""

import ctypes
import functools
from collections.abc import Callable
from importlib import resources
from typing import Any

import torch

# `import torch` stands above the load on purpose: both then share the OpenMP runtime that torch brings.


@functools.cache
def native() -> ctypes.CDLL | None:
    """The compiled library, or None where the distribution was built without a C++ compiler.

    Found through `importlib.resources`, because in an editable install the library does not stand beside this file.

    Returns:
        The loaded library, or None.
    """
    folder = resources.files("core_tensor")
    for name in ("libcore_tensor_native.so", "libcore_tensor_native.dylib"):
        found = folder / name
        if found.is_file():
            with resources.as_file(found) as path:
                return ctypes.CDLL(str(path))
    return None


def function(name: str, *argtypes: Any, returns: Any = None) -> Callable[..., Any]:
    """A typed C function of the compiled library; the trailing `int threads` that every kernel takes is filled in.

    Args:
        name: Exported symbol.
        argtypes: ctypes types of the arguments without the thread count; tensors go in as `ctypes.c_void_p`.
        returns: ctypes type of what it returns, None for nothing.

    Returns:
        A callable that takes tensors, or None, for `c_void_p` arguments and appends `torch.get_num_threads()`.
    """
    pointers = [i for i, kind in enumerate(argtypes) if kind is ctypes.c_void_p]

    @functools.cache
    def symbol() -> Any:
        library = native()
        if library is None:
            raise RuntimeError(
                "core_tensor was installed without its compiled library; reinstall with a C++17 compiler"
            )
        found = getattr(library, name)
        found.argtypes = [*argtypes, ctypes.c_int]
        found.restype = returns
        return found

    def call(*args: Any) -> Any:
        values = [*args, torch.get_num_threads()]
        for i in pointers:
            if values[i] is not None:
                values[i] = values[i].data_ptr()
        return symbol()(*values)

    return call
