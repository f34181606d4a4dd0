"""Elementwise uses of small parameters: scales and shifts, also those of normalization layers, and broadcast ones."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from msam.ghost.tape import Layout, Tape, UnsupportedError


def elementwise(tape: Tape, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """A sum, difference, product or quotient of an activation and a parameter.

    Args:
        tape: The running pass.
        func: The torch function.
        args: Its arguments; one of the first two is the parameter.
        kwargs: The others.

    Returns:
        The result, with every example's own replica of the parameter.

    Raises:
        UnsupportedError: If both operands are parameters, or the other one is no activation of at least its size.
    """
    owners = [tape.table.find(a) for a in args[:2]]
    if owners == [None] * len(owners):
        return func(*args, **kwargs)
    if len(args) < 2 or None not in owners or not isinstance(args[0 if owners[1] is not None else 1], Tensor):
        raise UnsupportedError(f"{func.__name__} of a perturbed parameter with something other than an activation")
    place = 0 if owners[0] is not None else 1
    parameter, x, index = args[place], args[1 - place], owners[place]
    assert index is not None
    if x.ndim < parameter.ndim:
        raise UnsupportedError(f"{func.__name__} of a perturbed parameter with a smaller tensor")
    layout = tape.enter("elementwise", (index,), x.ndim)
    if tape.phase == "probe":
        return tape.note(func(*args, **kwargs))
    x = tape.spread(x, layout)
    own = tape.per_example(tape.replicas(index, parameter), x.ndim, layout, x.shape[layout.dim] if x.ndim else 1)
    return func(*((own, x) if place == 0 else (x, own)), *args[2:], **kwargs)


def broadcast(tape: Tape, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """A slice or expansion of a parameter, such as a class token or the first positions of a table.

    Args:
        tape: The running pass.
        func: The torch function.
        args: The parameter and the function's other arguments.
        kwargs: The others.

    Returns:
        One row per example in front.

    Raises:
        UnsupportedError: If the parameter is an argument other than the first.
    """
    index = tape.table.find(args[0])
    if index is None:
        if any(tape.touches(a) for a in args[1:]) and func is not torch.Tensor.expand_as:
            raise UnsupportedError(f"{func.__name__} by a perturbed parameter")
        return func(*args, **kwargs)
    plain = func(*args, **kwargs)
    tape.enter("broadcast", (index,), plain.ndim)
    if tape.phase == "probe":
        return tape.note(plain)
    replicas = tape.replicas(index, args[0])
    if tape.shards.count == 1:
        return func(replicas[0], *args[1:], **kwargs)
    parts = []
    for j, (start, size) in enumerate(zip(tape.shards.starts, tape.shards.sizes, strict=True)):
        own = func(replicas[j], *args[1:], **kwargs)
        if own.ndim and own.shape[0] == tape.shards.total and args[0].shape[:1] != own.shape[:1]:
            parts.append(own[start : start + size])
        else:
            own = own if own.ndim and own.shape[0] == 1 else own[None]
            parts.append(own.expand(size, *own.shape[1:]))
    return torch.cat(parts)


def normalized(
    tape: Tape,
    plain: Callable[[], Tensor],
    normalize: Callable[[Tensor], Tensor],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    channels: bool,
    coupled: bool = False,
) -> Tensor:
    """A normalization layer: normalize, then scale and shift by every example's own replicas.

    Args:
        tape: The running pass.
        plain: The unperturbed call.
        normalize: The same layer without scale and shift.
        x: Its input.
        weight: Scale, or None.
        bias: Shift, or None.
        channels: Whether scale and shift belong to dimension 1 (otherwise to the last ones).
        coupled: Whether the layer mixes examples (batch norm in training), so that it needs a rule in any case.

    Returns:
        The result.

    Raises:
        UnsupportedError: If a mixing layer does not count examples along its first dimension.
    """
    owners = (tape.table.find(weight), tape.table.find(bias))
    if owners == (None, None) and not (coupled and tape.shards.count > 1):
        return plain()
    layout = tape.enter("normalized", owners, x.ndim)
    if tape.phase == "probe":
        return tape.note(plain())
    if coupled and (layout.dim or layout.shared or (tape.shards.count > 1 and x.shape[0] != tape.shards.total)):
        raise UnsupportedError("a batch norm over something other than the examples of the batch")
    x = tape.spread(x, layout)
    y = normalize(x)

    def own(parameter: Tensor | None, index: int | None) -> Tensor | None:
        if parameter is None:
            return None
        shaped = parameter.view(-1, *[1] * (x.ndim - 2)) if channels else parameter
        if index is None:
            return shaped
        replicas = tape.replicas(index, parameter)
        replicas = replicas.view(replicas.shape[0], *shaped.shape)
        return tape.per_example(replicas, x.ndim, layout, x.shape[layout.dim])

    scale, shift = own(weight, owners[0]), own(bias, owners[1])
    if scale is None:
        return y if shift is None else y + shift.to(y.dtype)
    return y * scale.to(y.dtype) if shift is None else torch.addcmul(shift.to(y.dtype), y, scale.to(y.dtype))


def add_constant(tape: Tape, y: Tensor, step: Tensor, layout: Layout) -> Tensor:
    """Add every micro-batch's own constant vector to a result.

    Args:
        tape: The running pass.
        y: Shape (..., d).
        step: Shape (m, d).
        layout: Which dimension of y counts examples.

    Returns:
        The sum.
    """
    return y + tape.per_example(step.to(y.dtype), y.ndim, layout, y.shape[layout.dim])
