"""Uses of matrices: products, embeddings, convolutions. Each records factors in pass 1 and is perturbed in pass 2."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from msam.engines.ghost.directions import KAPPA, pays
from msam.engines.ghost.factors import Kept, cast
from msam.engines.ghost.tape import Contribution, Tape
from msam.engines.ghost.uses.conv import Bounds, Geometry, MeasuredConvolution, ShardedConvolution, kernel_gradients
from msam.engines.ghost.uses.linear import Each, LowRankStep, OwnWeights, PerturbedProduct, Totals
from msam.step.gradients import Factors, Gradients

_NOTHING = nullcontext()


def product(tape: Tape, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, flipped: bool = False) -> Any:
    """`x @ weight.T + bias` (`x @ weight + bias` if flipped).

    Args:
        tape: The running pass.
        x: Shape (..., d_in).
        weight: Shape (d_out, d_in), flipped (d_in, d_out).
        bias: Shape (d_out,) or None.
        flipped: Orientation of the weight.

    Returns:
        Shape (..., d_out).
    """
    w = tape.find(weight)
    if w is None or weight.ndim != 2 or tape.nested or (bias is not None and bias.ndim != 1):
        return NotImplemented
    x = tape.replaced(x)
    b = tape.find(bias)
    if bias is not None and b is None and tape.is_apart(bias):
        return NotImplemented
    rows = tape.below(x)
    with tape.outside():
        y = _product(tape, rows, (weight, bias), (w, b), flipped)
    return tape.above(y)


def _product(
    tape: Tape, x: Tensor, parameters: tuple[Tensor, Tensor | None], owners: tuple[int, int | None], flipped: bool
) -> Tensor:
    """The product of all micro-batches, x of shape (m, ..., d_in)."""
    weight, bias = parameters
    tape.position += 1
    if tape.plan is not None:
        return _perturbed(tape, x, parameters, owners, flipped, weight.shape)
    recorded, shape = torch.is_grad_enabled(), (*x.shape[:-1], weight.shape[1 if flipped else 0])
    shared = weight.detach().requires_grad_() if recorded else weight
    # Rows make a result that is no view: writing to a view would lead the graph past the recorded edge.
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    y = _multiply(rows, shared, None if bias is None else bias.detach() if owners[1] is not None else bias, flipped)
    if not recorded:
        return y.view(shape)
    if x.requires_grad:
        x = x.detach()
    elif not (flipped or torch.is_autocast_enabled(x.device.type)):
        tape.kept[tape.position] = Kept(x, y.detach(), (x._version, y._version))
    tape.record(y, contribution(x, weight.shape, owners, flipped, tape.count))
    return y.view(shape)


def contribution(
    x: Tensor, shape: torch.Size, owners: tuple[int, int | None], flipped: bool, count: int
) -> Contribution:
    """What a product with input x adds to the gradients: its factors."""
    w, b = owners

    def contribute(found: Gradients, gradient: Tensor) -> None:
        inputs = cast(x, gradient.dtype).reshape(count, -1, x.shape[-1])
        outputs = gradient.reshape(count, -1, gradient.shape[-1])
        left, right = (inputs, outputs) if flipped else (outputs, inputs)
        found.add_factors(w, shape, Factors(left, right, b, flipped))

    return contribute


def held(x: Tensor) -> Tensor:
    """An input to hold until the next step; a copy where it is data or a parameter, which others overwrite."""
    owner = x if x._base is None else x._base
    return x.clone() if owner.is_leaf else x.detach()


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, flipped: bool) -> Tensor:
    if not flipped:
        return F.linear(x, weight, bias)
    y: Tensor = x @ weight
    return y if bias is None else y + bias


def precision(x: Tensor) -> tuple[torch.dtype, AbstractContextManager[object]]:
    """The type that a product with x runs in, and a context without autocast.

    The rules cast by hand, because backward passes run outside of autocast.

    Args:
        x: Its input.

    Returns:
        Autocast's type where that is on, otherwise x's; the context.
    """
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return x.dtype, _NOTHING
    return torch.get_autocast_dtype(device), torch.autocast(device, enabled=False)


def _perturbed(
    tape: Tape, x: Tensor, parameters: tuple[Tensor, Tensor | None], owners: tuple[int, int | None], flipped: bool,
    whole: torch.Size,
) -> Tensor:  # fmt: skip
    """The product in pass 2.

    Args:
        tape: The running pass.
        x: Shape (m, ..., d_in).
        parameters: Matrix and bias.
        owners: Their indices.
        flipped: Orientation of the matrix.
        whole: Shape of the parameter that the matrix is, or a flattened kernel is made of.

    Returns:
        Shape (m, ..., d_out).
    """
    (weight, bias), (w, b), plan = parameters, owners, tape.plan
    assert plan is not None
    found = plan.low_rank.get(w)
    dtype, without_autocast = precision(x)
    step: LowRankStep | OwnWeights | None = None
    shift, keeps = None, tape.found is not None and torch.is_grad_enabled()
    if found is not None:
        kept = plan.kept.pop(tape.position, None)
        inner, outer = (found.left, found.right) if flipped else (found.right, found.left)
        known = kept.y if kept is not None and kept.serves(x) else None
        along = b is not None and b == found.owner  # another use of the matrix may have no bias, or another one
        each = _factor_keeper(tape, x, whole, owners, flipped) if keeps else None
        step = LowRankStep(inner, outer, found.coefficient, found.bias if along else 0.0, known, each)
        shift = None if along else plan.shift(b, bias)
    elif plan.moves(w):
        own = cast(plan.own(w, weight), dtype)
        moved = None if bias is None else cast(plan.perturbed(b, bias).detach(), dtype)
        each = None if tape.found is None else keeper(tape.found, whole, owners, flipped)
        step = OwnWeights(own.mT if flipped else own, moved, each)
    if step is None:  # the matrix itself does not move
        y = _multiply(x.reshape(-1, x.shape[-1]), tape.shared(weight), tape.shared(bias), flipped)
        shift = plan.shift(b, bias)
        if keeps and y.requires_grad:
            tape.record(y, contribution(held(x), whole, owners, flipped, tape.count))
    else:
        direct = not flipped and weight.dtype is dtype and (bias is None or bias.dtype is dtype)
        wide, known_bias = (weight, bias) if direct else (tape.shared(weight), tape.shared(bias))
        wide, known_bias = wide.mT if flipped else wide, None if known_bias is None else cast(known_bias, dtype)
        with without_autocast:
            y = PerturbedProduct.apply(cast(x, dtype).contiguous(), cast(wide, dtype), known_bias, step)
        if keeps and direct:  # no node between this one and the parameters
            tape.ours.add(y.grad_fn)
    if shift is not None:  # every micro-batch's own constant vector
        y = y.view(tape.count, -1, y.shape[-1]) + shift[:, None].to(y.dtype)
    return y if y.ndim == x.ndim else y.view(*x.shape[:-1], y.shape[-1])


def _factor_keeper(
    tape: Tape, x: Tensor, shape: torch.Size, owners: tuple[int, int | None], flipped: bool
) -> Each:  # fmt: skip
    """Keeps the factors of a product's gradients."""
    found, add = tape.found, contribution(held(x), shape, owners, flipped, tape.count)
    assert found is not None

    def each(dy: Tensor, x: Tensor) -> None:
        del x
        add(found, dy)

    return each


def keeper(found: Gradients, shape: torch.Size, owners: tuple[int, int | None], flipped: bool) -> Each:
    """Keeps every micro-batch's gradient of a matrix whose direction is materialised; the shared one is their sum."""
    w, b = owners

    def each(dy: Tensor, x: Tensor) -> Totals | None:
        outputs, inputs = dy.view(found.count, -1, dy.shape[-1]), x.view(found.count, -1, x.shape[-1])
        if pays(outputs.shape[1], shape, found.count):
            contribution(held(inputs), shape, owners, flipped, found.count)(found, outputs)
            return None
        gradient = torch.bmm(outputs.mT, inputs)  # (m, d_out, d_in)
        found.add_dense(w, gradient.mT if flipped else gradient)
        if b is None:
            return gradient.sum(0), dy.sum(0)
        sums = outputs.sum(1)
        found.add_dense(b, sums)
        return gradient.sum(0), sums.sum(0)

    return each


def embedding(tape: Tape, ids: Tensor, weight: Tensor, padding: int | None) -> Any:
    """Rows of a table.

    Args:
        tape: The running pass.
        ids: Tokens, any shape, int64.
        weight: Table, shape (V, d).
        padding: Token whose row is not trained, or None.

    Returns:
        Shape (*ids.shape, d).
    """
    index = tape.find(weight)
    if index is None or tape.nested:
        return NotImplemented
    below = tape.below(ids)
    with tape.outside():
        y = _embedding(tape, index, below, weight, padding)
    return tape.above(y)


def _embedding(tape: Tape, index: int, ids: Tensor, weight: Tensor, padding: int | None) -> Tensor:
    vocabulary, tokens = weight.shape[0], ids.flatten()
    slots = torch.arange(tape.count, device=ids.device).repeat_interleave(len(tokens) // tape.count)
    keys = slots * vocabulary + tokens
    padding, size = None if padding is None else padding % vocabulary, weight.shape

    def contribute(found: Gradients, gradient: Tensor) -> None:
        rows = gradient.flatten(0, -2)
        keep = slice(None) if padding is None else tokens != padding
        found.add_tokens(index, size, keys[keep], rows[keep])

    if tape.plan is None:
        recorded = torch.is_grad_enabled()
        y = F.embedding(ids, weight.detach().requires_grad_() if recorded else weight, padding)
        if recorded:
            tape.record(y, contribute)
        return y
    y = F.embedding(ids, tape.shared(weight), padding)
    y = y + _token_steps(tape, index, weight.detach(), keys, tokens, y).view_as(y)
    if tape.found is not None and y.requires_grad:
        tape.record(y, contribute)
    return y


def _token_steps(tape: Tape, index: int, weight: Tensor, keys: Tensor, tokens: Tensor, like: Tensor) -> Tensor:
    """Perturbation of every looked-up row, shape (tokens, d)."""
    plan = tape.plan
    assert plan is not None
    if index in plan.tokens:
        found = plan.tokens[index]
        if not len(found.keys):
            return like.new_zeros(len(keys), like.shape[-1])
        place = torch.searchsorted(found.keys, keys).clamp_(max=len(found.keys) - 1)
        hit = found.keys[place] == keys
        return torch.mul(found.rows[place], hit[:, None]).to(like.dtype)
    tied = plan.low_rank.get(index)
    if tied is None:
        if not plan.moves(index):
            return like.new_zeros(len(keys), like.shape[-1])
        return (plan.own(index, weight).flatten(0, 1)[keys] - weight[tokens]).to(like.dtype)
    left, right, c = tied.left, tied.right, tied.coefficient  # (m, r, V), (m, r, d), (m,)
    mine = tokens.view(tape.count, -1)
    picked = left.gather(2, mine[:, None].expand(-1, left.shape[1], -1))  # (m, r, tokens)
    steps: Tensor = c[:, None, None] * (picked.mT @ right)
    return steps.flatten(0, 1).to(like.dtype)


def convolution(tape: Tape, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Any:
    """A convolution of any number of dimensions.

    Args:
        tape: The running pass.
        x: Shape (N, C_in, *positions).
        weight: Kernel.
        bias: Shape (C_out,) or None.
        geometry: Stride, padding and so on.

    Returns:
        Shape (N, C_out, *positions).
    """
    w, b = tape.find(weight), tape.find(bias)
    if w is None or tape.nested or (bias is not None and b is None and tape.is_apart(bias)):
        return NotImplemented
    x = tape.replaced(x)
    images = tape.below(x)
    lone = images.ndim == weight.ndim  # one example without its dimension
    with tape.outside():
        y = _convolution(tape, images if lone else images.flatten(0, 1), (weight, bias), (w, b), geometry)
        y = y if lone else y.unflatten(0, (tape.count, -1))
    return tape.above(y)


def _convolution(
    tape: Tape, x: Tensor, parameters: tuple[Tensor, Tensor | None], owners: tuple[int, int | None], geometry: Geometry
) -> Tensor:
    (weight, bias), (w, b), plan = parameters, owners, tape.plan
    each = x.shape[0] // tape.count
    bounds = [(j * each, (j + 1) * each) for j in range(tape.count)]
    if plan is None:
        return _measured_convolution(tape, x, parameters, owners, bounds, geometry)
    return _moved_convolution(tape, x, (tape.shared(weight), tape.shared(bias)), (w, b), bounds, geometry)


def _measured_convolution(
    tape: Tape, x: Tensor, parameters: tuple[Tensor, Tensor | None], owners: tuple[int, int | None], bounds: Bounds,
    geometry: Geometry,
) -> Tensor:  # fmt: skip
    """A convolution in pass 1."""
    (weight, bias), b = parameters, owners[1]
    constant = None if bias is None else bias.detach() if b is not None else bias
    if not torch.is_grad_enabled():
        return geometry.run(x, weight, constant)
    contribute = _convolution_contribution(tape, x.detach(), weight.shape, owners, bounds, geometry)
    fixed = constant is None or not constant.requires_grad
    if x.requires_grad and fixed and not factored(x, weight.shape, tape.count, geometry):
        known: list[tuple[Tensor, Tensor | None]] = []
        dtype, without_autocast = precision(x)
        with without_autocast:
            y: Tensor = MeasuredConvolution.apply(
                x.to(dtype), weight.detach().to(dtype), None if constant is None else constant.to(dtype), bounds,
                geometry, lambda *found: known.append(found),
            )  # fmt: skip
        tape.record(y, lambda found, gradient: contribute(found, gradient, known))
        return y
    y = geometry.run(x, weight.detach().requires_grad_(), constant)
    tape.record(y, contribute)
    return y


def _moved_convolution(
    tape: Tape, x: Tensor, parameters: tuple[Tensor, Tensor | None], owners: tuple[int, int | None], bounds: Bounds,
    geometry: Geometry,
) -> Tensor:  # fmt: skip
    """A convolution in pass 2."""
    (weight, bias), (w, b), plan, found = parameters, owners, tape.plan, tape.found
    assert plan is not None
    if w in plan.low_rank:
        patches = geometry.unfold(x, tuple(weight.shape[2:]))  # (N, positions, C_in * kernel)
        rows = _perturbed(tape, patches, (weight.flatten(1), bias), owners, flipped=False, whole=weight.shape)
        size = (x.shape[0], weight.shape[0], *geometry.positions(x.shape[2:], weight.shape[2:]))
        return rows.view(x.shape[0], -1, weight.shape[0]).mT.reshape(size)
    if plan.moves(w):
        dtype, without_autocast = precision(x)

        def each(kernels: Tensor, biases: Tensor | None) -> None:
            assert found is not None
            found.add_dense(w, kernels)
            if b is not None and biases is not None:
                found.add_dense(b, biases)

        shift = None if bias is None else plan.perturbed(b, bias).detach().to(dtype)  # (m or 1, C_out)
        with without_autocast:
            y: Tensor = ShardedConvolution.apply(
                x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype),
                (plan.own(w, weight).to(dtype), shift), bounds, geometry, None if found is None else each,
            )  # fmt: skip
        return y
    moves = plan.moves(b)
    y = geometry.run(x, weight, None if moves else bias)
    if found is not None and y.requires_grad:
        tape.record(y, _convolution_contribution(tape, held(x), weight.shape, owners, bounds, geometry))
    if bias is None or not moves:
        return y
    own = plan.perturbed(b, bias).to(y.dtype)  # (m, C_out)
    shifted: Tensor = y.unflatten(0, (tape.count, -1)) + own.view(tape.count, 1, -1, *[1] * (x.ndim - 2))
    return shifted.flatten(0, 1)


def _convolution_contribution(
    tape: Tape, x: Tensor, shape: torch.Size, owners: tuple[int, int | None], bounds: Bounds, geometry: Geometry,
) -> Callable[..., None]:  # fmt: skip
    """What a convolution adds to the gradients: factors where low rank pays, else the kernel's of each micro-batch."""
    (w, b), count = owners, tape.count

    def contribute(found: Gradients, gradient: Tensor, known: Sequence[tuple[Tensor, Tensor | None]] = ()) -> None:
        inputs = x.to(gradient.dtype)
        if not known and factored(x, shape, count, geometry):
            patches, flat = geometry.unfold(inputs, tuple(shape[2:])), gradient.flatten(2).mT
            left, right = flat.reshape(count, -1, shape[0]), patches.reshape(count, -1, shape[1:].numel())
            found.add_factors(w, shape, Factors(left, right, b))
            return
        kernels, biases = (
            known[0] if known else kernel_gradients(gradient, inputs, shape, b is not None, bounds, geometry)
        )
        found.add_dense(w, kernels)
        if b is not None and biases is not None:
            found.add_dense(b, biases)

    return contribute


def factored(x: Tensor, shape: torch.Size, count: int, geometry: Geometry) -> bool:
    """Whether a convolution's gradients are found as those of a matrix product with patches."""
    plain = len(shape) == 4 and geometry.groups == 1 and not geometry.transposed
    if not plain:
        return False
    rows = x.shape[0] // count * math.prod(geometry.positions(x.shape[2:], shape[2:]))
    outer, inner = shape[0], shape[1:].numel()
    return rows * (inner + outer) < KAPPA * inner * outer
