"""Uses of matrices: products, embeddings, convolutions. Each records factors in pass 1 and is perturbed in pass 2."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from msam.ghost.affine import add_constant
from msam.ghost.conv import Geometry, ShardedConvolution, kernel_gradients
from msam.ghost.directions import KAPPA, Factors, Kept, LowRank, Plan
from msam.ghost.linear import Block, KeptProduct, LowRankCorrection, ShardedLinear
from msam.ghost.tape import Contribution, Layout, Tape, UnsupportedError


def product(tape: Tape, x: Tensor, weight: Tensor, bias: Tensor | None, *, flipped: bool) -> Tensor:
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
    w, b = tape.table.find(weight), tape.table.find(bias)
    if x.ndim < 2 or weight.ndim != 2 or tape.touches(x):
        raise UnsupportedError(f"a product of shapes {tuple(x.shape)} and {tuple(weight.shape)}")
    layout = tape.enter("product", (w, b), x.ndim)
    x = tape.spread(x, layout)
    if tape.phase == "apply":
        assert tape.plan is not None
        found = None if w is None else tape.plan.low_rank.get(w)
        step = tape.plan.dense_of(w)
        if step is not None and found is None:
            return _materialised(tape, x, (weight, bias), (step, tape.plan.dense_of(b)), layout, flipped)
        kept = tape.plan.kept.pop(len(tape.calls) - 1, None)
        if kept is not None and kept.serves(x):
            y = KeptProduct.apply(x, weight, bias, [kept.y])
        else:
            y = _multiply(x, weight, bias, flipped)
        if found is not None:
            y = corrected(tape, y, x, found, layout, flipped)
        shift = tape.plan.dense_of(b)
        return y if shift is None else add_constant(tape, y, shift, layout)
    y = _multiply(x, weight, bias, flipped)
    if tape.phase == "probe":
        return tape.note(y)
    if not (
        x.requires_grad or flipped or layout.shared or tape.table.sharded or torch.is_autocast_enabled(x.device.type)
    ):
        tape.kept[len(tape.calls) - 1] = Kept(x.detach(), y.detach(), (x._version, y._version))
    tape.record(y, _factor_contribution(tape, x.detach(), weight.shape, layout, (w, b), flipped))
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
        inputs, outputs = tape.blocks(x.to(gradient.dtype), layout), tape.blocks(gradient, layout)
        if w is None:
            if b is not None:
                plan.add_dense(b, torch.cat([g.sum(1) for g in outputs]))
            return
        left, right = (inputs, outputs) if flipped else (outputs, inputs)
        plan.add_factors(w, shape, Factors(left, right, b, flipped))

    return contribute


def corrected(tape: Tape, y: Tensor, x: Tensor, found: LowRank, layout: Layout, flipped: bool) -> Tensor:
    """Add a low-rank perturbation to a product.

    Args:
        tape: The running pass.
        y: Unperturbed product; overwritten.
        x: Its input.
        found: The direction.
        layout: Which dimension counts examples.
        flipped: Orientation of the weight.

    Returns:
        The perturbed product.
    """
    inner, outer = (found.left, found.right) if flipped else (found.right, found.left)
    moved = layout.dim != 0 and tape.shards.count > 1
    rows, result = (x.movedim(layout.dim, 0), y.movedim(layout.dim, 0).contiguous()) if moved else (x, y)
    each = tape.rows_each(rows.shape[0]) if tape.shards.count > 1 else 0
    blocks: list[Block] = []
    for i, (first, count, size) in enumerate(tape.shards.runs):
        start = tape.shards.starts[first] * each
        stop = start + count * size * each if each else rows.shape[0]
        bias = found.bias_coefficient[i] if found.bias_coefficient else None
        blocks.append((start, stop, inner[i], outer[i], found.coefficient[i], bias))
    with plain_precision(y.device.type):
        done: Tensor = LowRankCorrection.apply(result, rows.to(result.dtype), blocks)
    return done.movedim(0, layout.dim).contiguous() if moved else done


def working_dtype(x: Tensor) -> torch.dtype:
    """Type that a matrix product of x runs in.

    Args:
        x: Its input.

    Returns:
        Autocast's type where that is on, otherwise x's.
    """
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def plain_precision(device: str) -> AbstractContextManager[object]:
    """No autocast inside the block: the rules cast by hand, because backward passes run outside of autocast.

    Args:
        device: Device type.

    Returns:
        A context.
    """
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _materialised(
    tape: Tape,
    x: Tensor,
    parameters: tuple[Tensor, Tensor | None],
    directions: tuple[Tensor, Tensor | None],
    layout: Layout,
    flipped: bool,
) -> Tensor:
    (weight, bias), (step, shift) = parameters, directions
    dtype = working_dtype(x)
    own, steps = (weight.mT, step.mT) if flipped else (weight, step)
    moved = layout.dim != 0 and tape.shards.count > 1
    rows = (x.movedim(layout.dim, 0) if moved else x).to(dtype).contiguous()
    each = tape.rows_each(rows.shape[0]) if tape.shards.count > 1 else 0
    stretches = []
    for first, count, size in tape.shards.runs:
        start = tape.shards.starts[first] * each
        stretches.append((start, start + count * size * each if each else rows.shape[0], first, count))
    with plain_precision(x.device.type):
        y: Tensor = ShardedLinear.apply(
            rows, own.to(dtype), None if bias is None else bias.to(dtype), steps.to(dtype),
            None if shift is None else shift.to(dtype), stretches,
        )  # fmt: skip
    return y.movedim(0, layout.dim).contiguous() if moved else y


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
    layout = tape.enter("embedding", (index,), ids.ndim + 1)
    ids = tape.spread(ids, layout)
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
    return y + _token_steps(tape, index, keys, tokens, y).view_as(y)


def _slots(tape: Tape, ids: Tensor, layout: Layout) -> Tensor:
    """Micro-batch of every token.

    Returns:
        Shape (ids.numel(),), int64.
    """
    if tape.shards.count == 1:
        return torch.zeros(ids.numel(), dtype=torch.long, device=ids.device)
    each = tape.rows_each(ids.shape[layout.dim])
    sizes = torch.tensor([s * each for s in tape.shards.sizes], device=ids.device)
    slots = torch.arange(tape.shards.count, device=ids.device).repeat_interleave(sizes)
    return slots.view(-1, *[1] * (ids.ndim - 1 - layout.dim)).expand(ids.shape).flatten()


def _token_steps(tape: Tape, index: int, keys: Tensor, tokens: Tensor, like: Tensor) -> Tensor:
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
    dense = plan.dense_of(index)
    if dense is not None:
        return dense.flatten(0, 1)[keys].to(like.dtype)
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
    layout = tape.enter("convolution", (w, b), x.ndim)
    if tape.phase == "probe":
        return tape.note(geometry.run(x, weight, bias))
    if layout.dim or layout.shared:
        raise UnsupportedError("a convolution whose first dimension does not count examples")
    bounds = [(0, x.shape[0])]
    if tape.shards.count > 1:
        each = tape.rows_each(x.shape[0])
        bounds = [(s * each, (s + n) * each) for s, n in zip(tape.shards.starts, tape.shards.sizes, strict=True)]
    if tape.phase == "capture":
        y = geometry.run(x, weight, bias)
        tape.record(y, _convolution_contribution(tape, x.detach(), weight.shape, layout, (w, b), bounds, geometry))
        return y
    assert tape.plan is not None
    found, step = (None, None) if w is None else (tape.plan.low_rank.get(w), tape.plan.dense_of(w))
    if found is not None:
        y = geometry.run(x, weight, bias)
        rows = corrected(
            tape,
            y.flatten(2).mT.contiguous(),
            geometry.unfold(x, tuple(weight.shape[2:])),
            found,
            layout,
            flipped=False,
        )
        y = rows.mT.reshape(y.shape)
    elif step is not None:
        dtype = working_dtype(x)
        with plain_precision(x.device.type):
            y = ShardedConvolution.apply(x.to(dtype), weight.to(dtype), step.to(dtype), bounds, geometry)
        y = y if bias is None else y + bias.to(dtype).view(-1, *[1] * (x.ndim - 2))
    else:
        y = geometry.run(x, weight, bias)
    shift = tape.plan.dense_of(b)
    if shift is None:
        return y
    shift = shift.to(y.dtype).view(*shift.shape, *[1] * (x.ndim - 2))
    return y + tape.per_example(shift, y.ndim, layout, y.shape[0])


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
            factors = Factors(tape.blocks(flat, layout), tape.blocks(patches, layout), b)
            plan.add_factors(w, shape, factors)
            return
        if w is not None:
            plan.add_dense(w, kernel_gradients(gradient, inputs, shape, bounds, geometry))
        if b is not None:
            sums = gradient.sum(tuple(range(2, gradient.ndim)))
            plan.add_dense(b, torch.stack([sums[start:stop].sum(0) for start, stop in bounds]))

    return contribute
