"""What a loss writes into the modules of a model, which a second pass must not write again."""

import operator
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as everywhere
from torch.nn.modules.batchnorm import _NormBase

from msam.step.passes import is_sharded

SMALL = 1 << 16
"""Elements up to which a tensor is copied unasked: writes through `.data` leave no other trace."""


class State:
    """Buffers, parameters that are not trained, and attributes (tensors and numbers) of a model's modules, at one time.

    Batch and instance norms are left out: `passes.statistics` looks after them. What lies in containers, in the loss
    function itself or in other objects is out of reach.

    Args:
        model: The model.
        earlier: Its state before a pass: what that pass has written is copied, as the next pass will write it again.
        copies: Whether to copy all buffers, of any size.

    Attributes:
        hooked: Class of a module with a backward hook; empty if none has one.
    """

    def __init__(self, model: nn.Module, earlier: "State | None" = None, *, copies: bool = False) -> None:
        self._model = model
        found = list(model.modules())
        hooked = bool(everywhere._global_backward_hooks or everywhere._global_backward_pre_hooks)
        self.hooked = next((f"a {type(m).__name__}" for m in found if hooked or _is_hooked(m)), "")
        self._sharded = "torch.distributed.fsdp" in sys.modules and any(
            map(is_sharded, found)
        )  # parameters come and go
        self._modules = [m for m in found if not _keeps_nothing(m)]
        self._tables = [tuple(map(dict, self._tables_of(m))) for m in self._modules]
        self._versions: dict[int, tuple[Tensor, int]] = {}
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}
        for tensor in self._tensors():
            self._versions[id(tensor)] = tensor, tensor._version
            is_small = tensor.numel() <= SMALL
            is_written = earlier is not None and earlier._has_changed(tensor)
            if is_small or is_written or (copies and not isinstance(tensor, nn.Parameter)):
                self._copies[id(tensor)] = tensor, tensor.detach().clone()

    def _tables_of(self, module: nn.Module) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Attributes (of modules that are not torch's own), buffers and parameters."""
        own = type(module).__module__.startswith("torch.")
        attributes = module.__dict__
        return {} if own else attributes, attributes["_buffers"], {} if self._sharded else attributes["_parameters"]

    def _tensors(self) -> list[Tensor]:
        found = []
        for attributes, buffers, parameters in self._tables:
            found += [v for v in (*attributes.values(), *buffers.values()) if isinstance(v, Tensor)]
            found += [v for v in parameters.values() if isinstance(v, Tensor) and not v.requires_grad]
        return [t for t in found if t.device.type != "meta" and not t.is_nested]

    def _has_changed(self, tensor: Tensor) -> bool:
        found = self._versions.get(id(tensor))
        if found is None or found[1] != tensor._version:
            return True
        copy = self._copies.get(id(tensor))
        return copy is not None and not _same(copy[1], tensor)

    def changed(self) -> list[str]:
        """Names of what has been written since: `module.attribute`."""
        found: list[tuple[nn.Module, str]] = []
        for module, tables in zip(self._modules, self._tables, strict=True):
            for now, then in zip(self._tables_of(module), tables, strict=True):
                found += [(module, name) for name in _differing(now, then)]
                kept = [(name, v) for name, v in then.items() if isinstance(v, Tensor) and id(v) in self._versions]
                found += [(module, name) for name, v in kept if now.get(name) is v and self._has_changed(v)]
        if not found:
            return []
        prefixes = {id(m): f"{name}." if name else "" for name, m in self._model.named_modules()}
        return [prefixes.get(id(module), "") + name for module, name in found]

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back that has been written since, as far as it was copied."""
        for module, tables in zip(self._modules, self._tables, strict=True):
            for now, then in zip(self._tables_of(module), tables, strict=True):
                for name in _differing(now, then):
                    if name in then:
                        now[name] = then[name]
                    else:
                        del now[name]
        for tensor, copy in self._copies.values():
            if tensor._version != self._versions[id(tensor)][1] or not _same(tensor, copy):
                tensor.copy_(copy)


def _is_hooked(found: nn.Module) -> bool:
    return bool(found._backward_hooks or found._backward_pre_hooks)


def _keeps_nothing(module: nn.Module) -> bool:
    """Whether a module is one of torch's own that writes nothing, or a norm that others look after."""
    if isinstance(module, _NormBase):
        return True
    own = type(module).__module__.startswith("torch.nn.modules.")
    return own and not module._buffers and all(p is None or p.requires_grad for p in module._parameters.values())


def _differing(now: Mapping[str, Any], then: Mapping[str, Any]) -> list[str]:
    """Names whose value is another tensor or number than it was, or new, or gone."""
    if len(now) == len(then) and all(map(operator.is_, now.values(), then.values())):
        return []
    pairs = [(name, now.get(name, _ABSENT), then.get(name, _ABSENT)) for name in {**then, **now}]
    return [name for name, a, b in pairs if a is not b and _counts(a) and _counts(b) and not _equal(a, b)]


_ABSENT: Any = object()


def _counts(value: Any) -> bool:
    return value is _ABSENT or isinstance(value, Tensor | int | float | bool | str | None)


def _equal(a: Any, b: Any) -> bool:
    return type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits, NaN included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    one, two = (x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (a, b))
    return torch.equal(one, two)
