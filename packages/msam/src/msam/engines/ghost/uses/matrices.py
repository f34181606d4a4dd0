"""Uses of matrices: products, embeddings, convolutions. Each records factors in pass 1 and is perturbed in pass 2."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from msam.engines.ghost.directions import KAPPA, Plan
from msam.engines.ghost.errors import UnsupportedError
from msam.engines.ghost.factors import Factors, Kept, cast
from msam.engines.ghost.layout import Layout
from msam.engines.ghost.tape import Contribution, Tape
from msam.engines.ghost.uses.affine import add_constant
from msam.engines.ghost.uses.conv import Geometry, ShardedConvolution, kernel_gradients
from msam.engines.ghost.uses.linear import LowRankStep, OwnWeights, PerturbedProduct

_NOTHING = nullcontext()


def product(tape: Tape, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, flipped: bool = False) -> Tensor:
    """`x @ weight.T + bias` (`x @ weight + bias` if flipped).

    Args:
        tape: The running pass.
        x: Shape (..., d_in).
        weight: Shape (d_out, d_in), flipped (d_in, d_out).
        bias: Shape (d_out,) or None.
        flipped: Orientation of the weight.

    Returns:
        Shape (..., d_out).

    Raises:
        UnsupportedError: If it is not a matrix applied to rows.
    """
    w, b, left = tape.table.owners(weight, bias, x)
    if w is None and b is None:
        return _multiply(x, weight, bias, flipped)
    if x.ndim < 2 or weight.ndim != 2 or left is not None or (bias is not None and bias.ndim != 1):
        raise UnsupportedError(f"a product of shapes {tuple(x.shape)} and {tuple(weight.shape)}")
    layout = tape.enter("product", (w, b), x.shape)
    x = tape.examples.spread(x, layout)
    if tape.phase == "apply":
        return _perturbed(tape, x, (weight, bias), (w, b), layout, flipped)
    y = _multiply(x, weight, bias, flipped)
    if tape.phase == "probe":
        return tape.note(y)
    if x.requires_grad:
        x = x.detach()
    elif not (flipped or layout.shared or tape.table.sharded or torch.is_autocast_enabled(x.device.type)):
        tape.kept[tape.position] = Kept(x, y.detach(), (x._version, y._version))
    tape.record(y, _factor_contribution(tape, x, weight.shape, layout, (w, b), flipped))
    return y


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, flipped: bool) -> Tensor:
    if not flipped:
        return F.linear(x, weight, bias)
    y = x @ weight
    return y if bias is None else y + bias


def _factor_contribution(
    tape: Tape, x: Tensor, shape: torch.Size, layout: Layout, owners: tuple[int | None, int | None], flipped: bool
) -> Contribution:
    """What a product adds to the plan, once its gradient is known.

    Returns:
        Takes the plan and the gradient of the result.
    """
    w, b = owners

    def contribute(plan: Plan, gradient: Tensor) -> None:
        inputs, outputs = tape.examples.blocks(cast(x, gradient.dtype), layout), tape.examples.blocks(gradient, layout)
        if w is None:
            if b is not None:
                plan.add_dense(b, torch.cat([g.sum(1) for g in outputs]))
            return
        left, right = (inputs, outputs) if flipped else (outputs, inputs)
        plan.add_factors(w, shape, Factors(left, right, b, flipped))

    return contribute


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
    tape: Tape,
    x: Tensor,
    parameters: tuple[Tensor, Tensor | None],
    owners: tuple[int | None, int | None],
    layout: Layout,
    flipped: bool,
) -> Tensor:
    """The product in pass 2.

    Returns:
        Shape (..., d_out).

    Raises:
        UnsupportedError: If the bias moves along with another matrix.
    """
    (weight, bias), (w, b), plan = parameters, owners, tape.plan
    assert plan is not None
    found = None if w is None else plan.low_rank.get(w)
    if b in plan.biases and (found is None or found.owner != b):
        raise UnsupportedError("a matrix that is used with the bias of another one")
    if found is None and not plan.is_dense(w):  # the matrix itself does not move
        return add_constant(tape, _multiply(x, weight, bias, flipped), plan.shift(b, bias), layout)
    dtype, without_autocast = precision(x)
    dim = layout.dim if tape.shards.count > 1 else 0
    rows = _rows(cast(x, dtype), dim)
    stretches = tape.examples.stretches(rows.shape[0])
    step: LowRankStep | OwnWeights
    if found is not None:
        kept = plan.kept.pop(tape.position, None)
        inner, outer = (found.left, found.right) if flipped else (found.right, found.left)
        known = _rows(kept.y, dim) if kept is not None and kept.serves(x) else None
        ratio = found.bias if b == found.owner else 0.0  # another use of the matrix may have no bias
        step = LowRankStep(stretches, inner, outer, found.coefficient, ratio, known)
    else:
        assert w is not None
        own = cast(plan.own(w, weight), dtype)
        shift = None if bias is None else cast(plan.perturbed(b, bias).detach(), dtype)
        step = OwnWeights(stretches, own.mT if flipped else own, shift)
    with without_autocast:
        y: Tensor = PerturbedProduct.apply(
            rows, cast(weight.mT if flipped else weight, dtype), None if bias is None else cast(bias, dtype), step
        )
    if found is not None and plan.is_dense(b):  # ASAM scales the bias by other factors than the matrix
        y = add_constant(tape, y, plan.shift(b, bias), Layout())
    if x.ndim > 2:
        y = y.view(x.shape[dim], *(n for d, n in enumerate(x.shape[:-1]) if d != dim), -1)
    return y.movedim(0, dim).contiguous() if dim else y


def _rows(x: Tensor, dim: int) -> Tensor:
    """All vectors of the last dimension, in the order of the examples.

    Returns:
        Shape (product of the other dimensions, d), contiguous.
    """
    if dim:
        x = x.movedim(dim, 0)
    return (x if x.ndim == 2 else x.reshape(-1, x.shape[-1])).contiguous()


def embedding(tape: Tape, ids: Tensor, weight: Tensor, padding: int | None) -> Tensor:
    """Rows of a table.

    Args:
        tape: The running pass.
        ids: Tokens, any shape, int64.
        weight: Table, shape (V, d).
        padding: Token whose row is not trained, or None.

    Returns:
        Shape (*ids.shape, d).
    """
    index = tape.table.find(weight)
    assert index is not None
    layout = tape.enter("embedding", (index,), ids.shape)
    ids = tape.examples.spread(ids, layout)
    y = F.embedding(ids, weight, padding)
    if tape.phase == "probe":
        return tape.note(y)
    vocabulary, tokens = weight.shape[0], ids.flatten()
    padding = None if padding is None else padding % vocabulary
    keys = _slots(tape, ids, layout) * vocabulary + tokens
    if tape.phase == "capture":
        shape = weight.shape

        def contribute(plan: Plan, gradient: Tensor) -> None:
            rows = gradient.flatten(0, -2)
            keep = slice(None) if padding is None else tokens != padding
            plan.add_tokens(index, shape, keys[keep], rows[keep])

        tape.record(y, contribute)
        return y
    return y + _token_steps(tape, index, weight.detach(), keys, tokens, y).view_as(y)


def _slots(tape: Tape, ids: Tensor, layout: Layout) -> Tensor:
    """Micro-batch of every token.

    Returns:
        Shape (ids.numel(),), int64.
    """
    if tape.shards.count == 1:
        return torch.zeros(ids.numel(), dtype=torch.long, device=ids.device)
    each = tape.examples.rows_each(ids.shape[layout.dim])
    sizes = torch.tensor([s * each for s in tape.shards.sizes], device=ids.device)
    slots = torch.arange(tape.shards.count, device=ids.device).repeat_interleave(sizes)
    return slots.view(-1, *[1] * (ids.ndim - 1 - layout.dim)).expand(ids.shape).flatten()


def _token_steps(tape: Tape, index: int, weight: Tensor, keys: Tensor, tokens: Tensor, like: Tensor) -> Tensor:
    """Perturbation of every looked-up row.

    Returns:
        Shape (tokens, d).
    """
    plan = tape.plan
    assert plan is not None
    if index in plan.tokens:
        found = plan.tokens[index]
        if not len(found.keys):
            return like.new_zeros(len(keys), like.shape[-1])
        place = torch.searchsorted(found.keys, keys).clamp_(max=len(found.keys) - 1)
        hit = found.keys[place] == keys
        return (found.rows[place] * hit[:, None]).to(like.dtype)
    if plan.is_dense(index):
        return (plan.own(index, weight).flatten(0, 1)[keys] - weight[tokens]).to(like.dtype)
    tied = plan.low_rank.get(index)
    if tied is None:
        return like.new_zeros(len(keys), like.shape[-1])
    slots, rows = keys // plan.shape_of(index)[0], like.new_zeros(len(keys), like.shape[-1])
    for (first, count, _), left, right, c in zip(
        plan.shards.runs, tied.left, tied.right, tied.coefficient, strict=True
    ):
        for j in range(count):
            mine = (slots == first + j).nonzero()[:, 0]
            rows[mine] = (c[j] * left[j][:, tokens[mine]].mT @ right[j]).to(like.dtype)
    return rows


def convolution(tape: Tape, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """A convolution of any number of dimensions.

    Args:
        tape: The running pass.
        x: Shape (N, C_in, *positions).
        weight: Kernel.
        bias: Shape (C_out,) or None.
        geometry: Stride, padding and so on.

    Returns:
        Shape (N, C_out, *positions).

    Raises:
        UnsupportedError: If N does not count the examples of the batch.
    """
    w, b = tape.table.find(weight), tape.table.find(bias)
    layout = tape.enter("convolution", (w, b), x.shape)
    if tape.phase == "probe":
        return tape.note(geometry.run(x, weight, bias))
    if layout.dim or layout.shared:
        raise UnsupportedError("a convolution whose first dimension does not count examples")
    bounds = tape.examples.bounds(x.shape[0])
    if tape.phase == "capture":
        y = geometry.run(x, weight, bias)
        tape.record(y, _convolution_contribution(tape, x.detach(), weight.shape, layout, (w, b), bounds, geometry))
        return y
    plan = tape.plan
    assert plan is not None
    if w is not None and w in plan.low_rank:
        patches = geometry.unfold(x, tuple(weight.shape[2:]))  # (N, positions, C_in * kernel)
        rows = _perturbed(tape, patches, (weight.flatten(1), bias), (w, b), layout, flipped=False)
        return rows.mT.reshape(x.shape[0], weight.shape[0], *geometry.positions(x.shape[2:], weight.shape[2:]))
    if w is not None and plan.is_dense(w):
        dtype, without_autocast = precision(x)
        with without_autocast:
            y = ShardedConvolution.apply(x.to(dtype), weight.to(dtype), plan.own(w, weight).to(dtype), bounds, geometry)
        y = y if bias is None or plan.is_dense(b) else y + bias.to(dtype).view(-1, *[1] * (x.ndim - 2))
    else:
        y = geometry.run(x, weight, None if plan.is_dense(b) else bias)
    if bias is None or not plan.is_dense(b):
        return y
    shift = plan.perturbed(b, bias).to(y.dtype)  # (m, C_out)
    return y + tape.examples.per_example(shift.view(*shift.shape, *[1] * (x.ndim - 2)), y.ndim, layout, y.shape[0])


def _convolution_contribution(
    tape: Tape,
    x: Tensor,
    shape: torch.Size,
    layout: Layout,
    owners: tuple[int | None, int | None],
    bounds: list[tuple[int, int]],
    geometry: Geometry,
) -> Contribution:
    """What a convolution adds to the plan: factors where low rank pays, else every micro-batch's kernel gradient.

    Returns:
        Takes the plan and the gradient of the result.
    """
    w, b = owners

    def contribute(plan: Plan, gradient: Tensor) -> None:
        inputs = x.to(gradient.dtype)
        rows = max(stop - start for start, stop in bounds) * gradient.shape[2:].numel()
        outer, inner = shape[0], shape[1:].numel()
        plain = len(shape) == 4 and geometry.groups == 1 and not geometry.transposed
        if w is not None and plain and rows * (inner + outer) < KAPPA * inner * outer:
            patches, flat = geometry.unfold(inputs, tuple(shape[2:])), gradient.flatten(2).mT
            factors = Factors(tape.examples.blocks(flat, layout), tape.examples.blocks(patches, layout), b)
            plan.add_factors(w, shape, factors)
            return
        if w is not None:
            plan.add_dense(w, kernel_gradients(gradient, inputs, shape, bounds, geometry))
        if b is not None:
            sums = gradient.sum(tuple(range(2, gradient.ndim)))
            plan.add_dense(b, torch.stack([sums[start:stop].sum(0) for start, stop in bounds]))

    return contribute
