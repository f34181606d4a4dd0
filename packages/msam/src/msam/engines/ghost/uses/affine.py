"""Elementwise uses of small parameters: scales and shifts, also those of normalization layers, and broadcast ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from msam.engines.ghost.errors import UnsupportedError
from msam.engines.ghost.layout import Layout
from msam.engines.ghost.tape import Tape

if TYPE_CHECKING:
    from msam.engines.ghost.directions import Plan


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
    layout = tape.enter("elementwise", (index,), x.shape)
    if tape.phase == "probe":
        return tape.note(func(*args, **kwargs))
    x = tape.examples.spread(x, layout)
    own = tape.examples.per_example(
        tape.replicas(index, parameter), x.ndim, layout, x.shape[layout.dim] if x.ndim else 1
    )
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
        if tape.touches(*args[1:]) and func is not torch.Tensor.expand_as:
            raise UnsupportedError(f"{func.__name__} by a perturbed parameter")
        return func(*args, **kwargs)
    plain = func(*args, **kwargs)
    tape.enter("broadcast", (index,), plain.shape)
    if tape.phase == "probe":
        return tape.note(plain)
    replicas = tape.replicas(index, args[0])
    if tape.shards.count == 1:
        return func(replicas[0], *args[1:], **kwargs)
    before, after = args[0].shape, plain.shape
    # A slice whose length is that of the batch, or 1, by chance counts no examples.
    picks = func is not torch.Tensor.__getitem__ or _picks(args[1])
    counts = picks and after[:1] == (tape.shards.total,) and before[:1] != after[:1]
    leading = after[:1] == (1,) and (len(after) > len(before) or before[:1] == (1,))
    parts = []
    for j, (start, size) in enumerate(zip(tape.shards.starts, tape.shards.sizes, strict=True)):
        own = func(replicas[j], *args[1:], **kwargs)
        if counts:
            parts.append(own[start : start + size])
        else:
            own = own if leading else own[None]
            parts.append(own.expand(size, *own.shape[1:]))
    return torch.cat(parts)


def _picks(index: Any) -> bool:
    """Whether an index holds numbers of rows, which may be the examples' own, beside slices.

    Returns:
        True if so.
    """
    return any(isinstance(i, Tensor | list) for i in (index if isinstance(index, tuple) else (index,)))


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
    owners, parameter = (tape.table.find(weight), tape.table.find(bias)), bias if weight is None else weight
    if owners == (None, None) and not (coupled and tape.shards.count > 1):
        return plain()
    layout = tape.enter("normalized", owners, x.shape)
    if tape.phase == "probe":
        return tape.note(plain(), constant=owners == (None, None))
    if coupled and (layout.dim or layout.shared or (tape.shards.count > 1 and x.shape[0] != tape.shards.total)):
        raise UnsupportedError("a batch norm over something other than the examples of the batch")
    x = tape.examples.spread(x, layout)
    y = normalize(x)
    shape = () if parameter is None else parameter.shape
    places = range(1, 2) if channels else range(x.ndim - len(shape), x.ndim)
    if tape.phase == "capture":
        return _captured(tape, y, (weight, bias), owners, layout, places)
    assert tape.plan is not None
    split = tape.examples.splits
    if split:  # (..., m, examples of each, ...): a replica serves all examples of its micro-batch without copies
        y = y.unflatten(layout.dim, (tape.shards.count, -1))
    replicas = [
        None if p is None else _aligned(tape, tape.plan.perturbed(index, p).to(y.dtype), layout, x.shape, places, split)
        for p, index in zip((weight, bias), owners, strict=True)
    ]
    y = _scaled(y, *replicas)
    return y.flatten(layout.dim, layout.dim + 1) if split else y


def _scaled(y: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    if scale is None:
        return y if shift is None else y + shift
    return y * scale if shift is None else torch.addcmul(shift, y, scale)


def _captured(
    tape: Tape,
    y: Tensor,
    parameters: tuple[Tensor | None, Tensor | None],
    owners: tuple[int | None, int | None],
    layout: Layout,
    places: range,
) -> Tensor:
    """Scale and shift by the shared parameters, whose gradients by micro-batch are sums over the result's gradient.

    Returns:
        The result, recorded.
    """
    tail = (1,) * (y.ndim - places.stop)
    scale, shift = (None if p is None else p.view(*p.shape, *tail).to(y.dtype) for p in parameters)
    normal, result = y.detach(), _scaled(y, scale, shift)
    if owners == (None, None):
        return result

    def contribute(plan: Plan, gradient: Tensor) -> None:
        for index, values in zip(owners, (gradient * normal, gradient), strict=True):
            if index is not None:
                plan.add_dense(index, tape.examples.sums(values, layout, places))

    tape.record(result, contribute)
    return result


def _aligned(tape: Tape, own: Tensor, layout: Layout, shape: torch.Size, places: range, split: bool) -> Tensor:
    """Replicas of a scale or shift, shaped to broadcast against the normalized activation.

    Args:
        tape: The running pass.
        own: One replica per micro-batch, or one for all, shape (m or 1, *parameter).
        layout: Which dimension counts examples.
        shape: Shape of the activation.
        places: Dimensions of the activation that the parameter belongs to.
        split: Whether the dimension of the examples has been split by micro-batch.

    Returns:
        A broadcastable tensor.

    Raises:
        UnsupportedError: If the parameter extends over the dimension of the examples.
    """
    if layout.dim in places and tape.shards.count > 1:
        raise UnsupportedError(f"a parameter of shape {tuple(own.shape[1:])} reaches across examples")
    own = own.view(len(own), *[1] * places.start, *own.shape[1:], *[1] * (len(shape) - places.stop))
    if split:
        return own.movedim(0, layout.dim)
    return own[0] if len(own) == 1 else tape.examples.per_example(own, len(shape), layout, shape[layout.dim])


def add_constant(tape: Tape, y: Tensor, step: Tensor | None, layout: Layout) -> Tensor:
    """Add every micro-batch's own constant vector to a result.

    Args:
        tape: The running pass.
        y: Shape (..., d).
        step: Shape (m, d), or None for nothing to add.
        layout: Which dimension of y counts examples.

    Returns:
        The sum.
    """
    return y if step is None else y + tape.examples.per_example(step.to(y.dtype), y.ndim, layout, y.shape[layout.dim])
