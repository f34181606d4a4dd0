"""Argument checks whose messages name the argument, what was expected and what came."""

import math
import numbers
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def check_tensor(
    name: str,
    value: Any,
    *,
    ndim: int | None = None,
    shape: tuple[int | None, ...] | None = None,
    dtype: torch.dtype | tuple[torch.dtype, ...] | None = None,
    device: torch.device | None = None,
    finite: bool = False,
    nonempty: bool = False,
) -> None:
    """Refuse a tensor of the wrong kind.

    Args:
        name: The argument's name, for the message.
        value: What the caller passed; sparse and nested tensors are refused.
        ndim: Expected number of dimensions.
        shape: Expected shape; None means any size.
        dtype: Expected dtype, or the dtypes that are allowed.
        device: Expected device.
        finite: Whether NaN and infinities are refused, where the tensor has values to look at.
        nonempty: Whether a tensor without elements is refused.

    Raises:
        TypeError: If it is not a dense tensor or has another dtype.
        ValueError: If its shape, device or values do not fit.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.layout is not torch.strided or value.is_nested:
        raise TypeError(f"{name}: expected a dense tensor, got {'a nested one' if value.is_nested else value.layout}")
    if dtype is not None:
        allowed = dtype if isinstance(dtype, tuple) else (dtype,)
        if value.dtype not in allowed:
            raise TypeError(f"{name}: expected dtype {' or '.join(map(str, allowed))}, got {value.dtype}")
    if ndim is not None and value.ndim != ndim:
        raise ValueError(f"{name}: expected {ndim} dimensions, got shape {tuple(value.shape)}")
    if shape is not None and (
        value.ndim != len(shape) or any(e is not None and e != g for e, g in zip(shape, value.shape, strict=True))
    ):
        expected = ", ".join("any" if e is None else str(e) for e in shape)
        raise ValueError(f"{name}: expected shape ({expected}), got {tuple(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {value.device}")
    if nonempty and value.numel() == 0:
        raise ValueError(f"{name}: expected at least one element, got shape {tuple(value.shape)}")
    # the sum is one pass, a tenth of isfinite's three; where it overflows the entries decide
    if finite and has_values(value) and not bool(torch.isfinite(value.sum())):
        bad = int((~torch.isfinite(value)).sum())
        if bad:
            raise ValueError(f"{name}: expected finite values, got {bad} NaN or infinite of {value.numel()}")


def has_values(value: Tensor) -> bool:
    """Whether a tensor's values can be looked at: not on the meta device, nor while torch traces a program.

    Args:
        value: A tensor.

    Returns:
        False where only shapes and dtypes are known.
    """
    return not (torch.compiler.is_compiling() or value.is_meta or isinstance(value, FakeTensor))


def check_indices(name: str, value: Tensor, size: int) -> None:
    """Refuse indices outside `[0, size)`; indices without values (meta, traced) pass.

    Args:
        name: The argument's name, for the message.
        value: Whole numbers of any shape.
        size: How many things they may name.

    Raises:
        ValueError: If one of them is negative, or `size` or more.
    """
    if value.numel() == 0 or not has_values(value):
        return
    low, high = (int(end) for end in torch.aminmax(value))
    if low < 0 or high >= size:
        raise ValueError(f"{name}: expected indices in [0, {size}), got {low} to {high}")


def check_offsets(name: str, value: Tensor, end: int) -> None:
    """Refuse offsets that do not rise from 0 to `end`; offsets without values (meta, traced) pass.

    Args:
        name: The argument's name, for the message.
        value: Whole numbers, shape (parts + 1,).
        end: What the last one must be.

    Raises:
        ValueError: If the first is not 0, the last not `end`, or one less than that before it.
    """
    if has_values(value) and (int(value[0]) != 0 or int(value[-1]) != end or bool((value[1:] < value[:-1]).any())):
        raise ValueError(f"{name}: expected a rising sequence from 0 to {end}")


def check_number(
    name: str,
    value: Any,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
    open_high: bool = False,
    integer: bool = False,
) -> None:
    """Refuse a number outside an interval, NaN, or a non-number.

    Args:
        name: The argument's name, for the message.
        value: What the caller passed.
        low: Lower end.
        high: Upper end.
        open_low: Whether the lower end itself is refused.
        open_high: Whether the upper end itself is refused.
        integer: Whether only whole numbers (int or numpy's) are allowed.

    Raises:
        TypeError: If it is not a number, or not an int where one is expected.
        ValueError: If it is NaN, outside the interval, or an int that 64 bits do not hold.
    """
    # the built-in types first: an abstract class is ten times slower to ask
    kinds = (int, numbers.Integral) if integer else (float, int, numbers.Real)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise TypeError(f"{name}: expected {'an int' if integer else 'a number'}, got {type(value).__name__}")
    number: Any = value  # an int is compared as it is: a float could not hold it
    above = number > low if open_low else number >= low
    below = number < high if open_high else number <= high
    if not (above and below):  # NaN is neither
        ends = f"{'(' if open_low else '['}{low}, {high}{')' if open_high else ']'}"
        raise ValueError(f"{name}: expected a value in {ends}, got {value}")
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:  # C and torch would wrap it around, or overflow
        raise ValueError(f"{name}: expected an int of 64 bits at most, got one of {value.bit_length()}")


def check_flag(name: str, value: Any) -> None:
    """Refuse anything but True and False.

    Args:
        name: The argument's name, for the message.
        value: What the caller passed.

    Raises:
        TypeError: If it is not a bool.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Refuse a value that is not one of the choices.

    Args:
        name: The argument's name, for the message.
        value: What the caller passed.
        choices: Allowed values.

    Raises:
        ValueError: If the value is not one of them.
    """
    allowed = list(choices)
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")
