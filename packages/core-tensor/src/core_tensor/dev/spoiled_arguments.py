"""Spoils an argument: a number, a flag, a tensor, or what holds them."""

import dataclasses
import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

_NUMBERS = (-1, 0, 1, 7, 2**31 - 1, 2**31, 2**62, 2**63, 2**64, -(2**63), 10**400, 0.5, None, "3", True, [1])
_REALS = (0.0, -1.0, float("nan"), float("inf"), -float("inf"), 1e308, 5e-324, 10**400, None, "x", 1j)


def mutate(value: Any, rng: random.Random) -> tuple[Any, str]:
    """Spoil an argument.

    Args:
        value: A valid argument.
        rng: Source of chance.

    Returns:
        What to pass instead, and what was done.
    """
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided or value.is_meta or value.is_nested:  # spoiled already
            return value, "nothing"
        way, change = rng.choice(_TENSORS)
        return change(value, rng), way
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        field = rng.choice([f.name for f in dataclasses.fields(value)])
        changed, way = mutate(getattr(value, field), rng)
        return dataclasses.replace(value, **{field: changed}), f"{field}: {way}"
    if isinstance(value, list | tuple) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        changed, way = mutate(value[at], rng)
        return type(value)([*value[:at], changed, *value[at + 1 :]]), f"[{at}]: {way}"
    if isinstance(value, bool):
        other: Any = rng.choice((not value, None, "yes", 2))
    elif isinstance(value, int):
        other = rng.choice(_NUMBERS)
    elif isinstance(value, float):
        other = rng.choice(_REALS)
    else:
        other = rng.choice((None, 3, "x", torch.zeros(2), [], [torch.zeros(1)], {}))
    return other, f"{str(other)[:30]} of type {type(other).__name__}"


def _dtype(t: Any, rng: random.Random) -> Any:
    kinds = ("float16", "bfloat16", "float32", "float64", "int8", "uint8", "int32", "int64", "bool", "complex64")
    return t.to(getattr(torch, rng.choice(kinds)))


def _shape(t: Any, rng: random.Random) -> Any:
    ways: list[Callable[[], Any]] = [lambda: t.unsqueeze(rng.randrange(t.ndim + 1)), lambda: t.reshape(-1)]
    if t.ndim:
        axis = rng.randrange(t.ndim)
        ways += [
            lambda: t.narrow(axis, 0, max(t.shape[axis] - 1, 0)),
            lambda: t.narrow(axis, 0, 0),
            lambda: t.repeat_interleave(2, axis),
            lambda: t.mT if t.ndim > 1 else t.flip(0),
            lambda: t.select(axis, 0) if t.shape[axis] else t,
        ]
    return rng.choice(ways)()


def _strides(t: Any, rng: random.Random) -> Any:
    """The same values at other places in memory."""
    if t.ndim == 0 or t.numel() == 0:
        return t
    axis = rng.randrange(t.ndim)
    way = rng.randrange(4)
    if way == 0:
        return t.repeat_interleave(3, axis).movedim(axis, 0)[1::3].movedim(0, axis)
    if way == 1 and t.ndim > 1:
        return t.mT.contiguous().mT
    if way == 2:
        return t.narrow(axis, 0, 1).expand_as(t)
    padded = t.new_empty(t.numel() + 3)
    return padded[3:].copy_(t.reshape(-1)).view(t.shape)  # not aligned like a fresh allocation


def _entries(t: Any, rng: random.Random) -> Any:
    if t.numel() == 0:
        return t
    changed = t.detach().clone(memory_format=torch.contiguous_format)
    flat = changed.view(-1)
    if t.dtype is torch.bool:
        flat.logical_not_()
        return changed
    if t.dtype.is_floating_point:
        limit = torch.finfo(t.dtype)
        values = [float("nan"), float("inf"), -float("inf"), 0.0, -1.0, limit.max, limit.min, limit.tiny]
    elif t.dtype.is_complex:
        values = [0.0]
    else:
        whole = torch.iinfo(t.dtype)
        values = [whole.min, whole.max, -1, 0, 1, 5, 64, 2**20, 2**30, 2**31, 2**40, 2**62]
        values = [v for v in values if whole.min <= v <= whole.max]
    value = rng.choice(values)
    flat[rng.randrange(flat.numel()) if rng.random() < 0.6 else slice(None)] = value
    return changed


def _scaled(t: Any, rng: random.Random) -> Any:
    return t * rng.choice((1e-300, 1e-30, 1e30, 1e300, -1)) if t.dtype.is_floating_point else t * -1


def _nested(t: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls them a prototype
        return torch.nested.nested_tensor([t])


def _kind(t: Any, rng: random.Random) -> Any:
    ways: list[Callable[[], Any]] = [
        lambda: t.to("meta"),
        lambda: t.to_sparse(),
        lambda: None,
        lambda: t.tolist() if t.numel() < 100 else 3,
        lambda: t.detach().float().numpy(),
        lambda: t.clone().requires_grad_() if t.dtype.is_floating_point else 3.0,
        lambda: torch.complex(t.double(), t.double()).conj().imag if t.dtype.is_floating_point else "x",
        lambda: _nested(t) if t.ndim and t.dtype.is_floating_point else [],
    ]
    return rng.choice(ways)()


_TENSORS: Sequence[tuple[str, Callable[[Any, random.Random], Any]]] = [
    ("another dtype", _dtype),
    ("another shape", _shape),
    ("other strides", _strides),
    ("entries changed", _entries),
    ("entries changed", _entries),
    ("entries changed", _entries),
    ("scaled", _scaled),
    ("another kind of object", _kind),
]
