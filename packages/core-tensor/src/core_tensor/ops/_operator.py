"""How every operator of this package is registered: one schema, one fake, one implementation per device."""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from core_tensor.ops._library import serves

_LIBRARY = torch.library.Library("core_tensor", "DEF")
_BACKENDS: dict[str, dict[str, str]] = {}


def live() -> dict[str, dict[str, str]]:
    """Which implementation serves every operator imported so far, as `core_tensor.backends` returns it."""
    return {name: dict(devices) for name, devices in sorted(_BACKENDS.items())}


def operator(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    cpu: Callable[..., Any] | None = None,
    cuda: str | None = None,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register one operator with the torch dispatcher, which is the only dispatcher.

    Args:
        schema: `name(arguments) -> returns` in torch's schema language.
        reference: Plain torch implementation, the truth; serves every device that has no kernel.
        fake: Shapes and dtypes of the results without computing them.
        cpu: Call into the compiled library; used where the library holds every symbol that its module names.
        cuda: `"module:function"` of the Triton launcher, imported at the first call on a CUDA tensor.
        setup_context: Saves for backward, as in `torch.library.register_autograd`.
        backward: Gradient formula, as in `torch.library.register_autograd`; without one the results need no gradient.

    Returns:
        The operator's overload, to be called by its public function.
    """
    name = schema.split("(", 1)[0]
    qualified = f"core_tensor::{name}"
    _LIBRARY.define(schema)
    if backward is None:
        reference = torch.no_grad()(reference)
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    live = {"cpu": "reference", "cuda": "reference"}
    if cpu is not None and serves(cpu.__module__):
        _LIBRARY.impl(name, cpu, "CPU")
        live["cpu"] = "native"
    if cuda is not None and importlib.util.find_spec("triton") is not None:
        _LIBRARY.impl(name, _lazy(cuda), "CUDA")
        live["cuda"] = "triton"
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_LIBRARY)
    else:  # results that need no gradient: torch's default is one of zero, and a warning when it is asked for
        _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    _BACKENDS[name] = live
    overload: Callable[..., Any] = getattr(torch.ops.core_tensor, name).default
    return overload


def _lazy(target: str) -> Callable[..., Any]:
    module, attribute = target.split(":")

    @functools.cache
    def load() -> Callable[..., Any]:
        launcher: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
        return launcher

    def call(*args: Any) -> Any:
        return load()(*args)

    return call
