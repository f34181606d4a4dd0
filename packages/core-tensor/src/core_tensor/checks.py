"""Argument checks whose messages name the argument, what was expected and what came."""

import math
import numbers
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def check_tensor(
    name: str,
    value: Any,
    *,
    ndim: int | None = None,
    shape: tuple[int | None, ...] | None = None,
    dtype: torch.dtype | tuple[torch.dtype, ...] | None = None,
    finite: bool = False,
    nonempty: bool = False,
) -> None:
    """Refuse a tensor of the wrong kind.

    Args:
        name: The argument's name, for the message.
        value: What the caller passed.
        ndim: Expected number of dimensions.
        shape: Expected shape; None stands for any size.
        dtype: Expected dtype, or the dtypes that are allowed.
        finite: Whether NaN and infinities are refused.
        nonempty: Whether a tensor without elements is refused.

    Raises:
        TypeError: If it is not a tensor or has another dtype.
        ValueError: If its shape or values do not fit.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
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
    if nonempty and value.numel() == 0:
        raise ValueError(f"{name}: expected at least one element, got shape {tuple(value.shape)}")
    # the sum is one pass, a tenth of isfinite's three; where it overflows the entries decide
    if finite and not bool(torch.isfinite(value.sum())) and not bool(torch.isfinite(value).all()):
        count = int((~torch.isfinite(value)).sum())
        raise ValueError(f"{name}: expected finite values, got {count} NaN or infinite of {value.numel()}")


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
        ValueError: If it is NaN or outside the interval.
    """
    # the built-in types first: an abstract class is ten times slower to ask
    kinds = (int, numbers.Integral) if integer else (float, int, numbers.Real)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise TypeError(f"{name}: expected {'an int' if integer else 'a number'}, got {type(value).__name__}")
    number = float(value)
    above = number > low if open_low else number >= low
    below = number < high if open_high else number <= high
    if not (above and below):  # NaN is neither
        ends = f"{'(' if open_low else '['}{low}, {high}{')' if open_high else ']'}"
        raise ValueError(f"{name}: expected a value in {ends}, got {value}")


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Refuse a value that is not one of the choices.

    Args:
        name: The argument's name, for the message.
        value: What the caller passed.
        choices: Allowed values.

    Raises:
        ValueError: If the value is none of them.
    """
    allowed = list(choices)
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")
