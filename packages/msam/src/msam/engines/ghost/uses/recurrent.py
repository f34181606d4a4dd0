r"""LSTM, GRU and plain recurrent layers in products and elementwise steps; `vmap` has no rule for torch's kernels.

The product with the inputs, $x_t W_{ih}^\top$, is one for all times. The other one, $h_{t-1} W_{hh}^\top$, is done step
by step with every micro-batch's own matrix and without a graph to it: the gradient of W_hh needs the gradients at all
these products and all h_{t-1}, which an `Anchor` meets once, after the last step backwards in time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from msam.engines.ghost.tape import Rule, Tape
from msam.engines.ghost.uses.linear import Totals
from msam.engines.ghost.uses.matrices import contribution, keeper, product

States = tuple[Tensor, ...]
Step = Callable[[Tensor, Tensor | None, States], States]


class Cell(NamedTuple):
    """A recurrent cell.

    Attributes:
        step: From h W_hh' + b_hh (and the rest of it, if additive), x W_ih' + b_ih (None, if additive) and the states
            (h, ...) to the next states.
        states: Tensors in the state.
        additive: Whether only the sum of both products counts.
    """

    step: Step
    states: int
    additive: bool


def _lstm(total: Tensor, x: Tensor | None, states: States) -> States:
    del x
    width = total.shape[-1] // 4
    i, f = torch.sigmoid(total[..., : 2 * width]).chunk(2, -1)
    g, o = torch.tanh(total[..., 2 * width : 3 * width]), torch.sigmoid(total[..., 3 * width :])
    c = torch.addcmul(f * states[1], i, g)
    return o * torch.tanh(c), c


def _gru(hidden: Tensor, x: Tensor | None, states: States) -> States:
    assert x is not None
    width = x.shape[-1] // 3
    r, z = torch.sigmoid(x[..., : 2 * width] + hidden[..., : 2 * width]).chunk(2, -1)
    n = torch.tanh(torch.addcmul(x[..., 2 * width :], r, hidden[..., 2 * width :]))
    return (torch.lerp(n, states[0], z),)


def _tanh(total: Tensor, x: Tensor | None, states: States) -> States:
    del x, states
    return (torch.tanh(total),)


def _relu(total: Tensor, x: Tensor | None, states: States) -> States:
    del x, states
    return (torch.relu(total),)


CELLS = {
    "lstm": Cell(_lstm, 2, additive=True), "gru": Cell(_gru, 1, additive=False),
    "rnn_tanh": Cell(_tanh, 1, additive=True), "rnn_relu": Cell(_relu, 1, additive=True),
}  # fmt: skip


class Weights(NamedTuple):
    """Weights of one layer in one direction; the biases may be None."""

    inputs: Tensor
    hidden: Tensor
    input_bias: Tensor | None
    hidden_bias: Tensor | None


class Anchor(torch.autograd.Function):
    """Zeros that are added to all products with W_hh: their gradients are those of the products."""

    @staticmethod
    def forward(
        ctx: Any, zeros: Tensor, weight: Tensor, bias: Tensor | None, before: list[Tensor],
        each: Callable[[Tensor, Tensor], Totals | None] | None,
    ) -> Tensor:  # fmt: skip
        """Pass on.

        Args:
            ctx: Autograd's context.
            zeros: Shape (m, r, T, d).
            weight: W_hh, shape (d, d_hidden).
            bias: b_hh, shape (d,), or None.
            before: h_{t-1} of all times, (m, r, d_hidden) each, complete when the loss is differentiated.
            each: Keeps every micro-batch's gradients; None if nobody wants them.

        Returns:
            The zeros.
        """
        del weight, bias
        ctx.before, ctx.each = before, each
        return zeros.view_as(zeros)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor | None, Tensor | None, None, None]:
        """Gradients of W_hh and b_hh.

        Args:
            ctx: Autograd's context.
            gradients: At the products.

        Returns:
            The two gradients, and None for the rest.
        """
        dy = gradients[0].flatten(0, 2)
        h = torch.stack(ctx.before, 2).flatten(0, 2)
        totals = None if ctx.each is None else ctx.each(dy, h)
        if totals is None:
            totals = dy.t().mm(h), dy.sum(0)
        return None, totals[0], totals[1] if ctx.needs_input_grad[2] else None, None, None


def recurrent(cell: Cell) -> Rule:
    """The rule of `torch.lstm` and its kin."""

    def rule(tape: Tape, func: Any, /, *args: Any, **kwargs: Any) -> Any:
        del func
        if len(args) != 9 or kwargs or tape.nested or args[0].ndim != 3:
            return NotImplemented
        x, start, flat, biased, layers, dropout, training, both_ways, batch_first = args
        if not isinstance(layers, int):
            return NotImplemented  # packed sequences have other arguments
        ways, each = 1 + both_ways, 4 if biased else 2
        weights = [_weights(flat[i : i + each]) for i in range(0, len(flat), each)]
        if len(weights) != layers * ways or not all(_possible(tape, w) for w in weights):
            return NotImplemented  # such as an LSTM with projections
        starts = [start] if cell.states == 1 else list(start)
        x, ends = x if batch_first else x.transpose(0, 1), list[States]()
        for layer in range(layers):
            x = F.dropout(x, dropout, training) if layer else x
            found = []
            for way in range(ways):
                k = layer * ways + way
                result, end = _one_way(tape, cell, x, tuple(s[k] for s in starts), weights[k], reverse=way == 1)
                found.append(result)
                ends.append(end)
            x = found[0] if ways == 1 else torch.cat(found, -1)
        last = [torch.stack([end[i] for end in ends]) for i in range(cell.states)]
        return x if batch_first else x.transpose(0, 1), *last

    return rule


def recurrent_cell(cell: Cell) -> Rule:
    """The rule of `torch.lstm_cell` and its kin."""

    def rule(tape: Tape, func: Any, /, *args: Any, **kwargs: Any) -> Any:
        del func
        if kwargs or tape.nested:
            return NotImplemented
        x, start, w_inputs, w_hidden, *biases = args
        b_inputs, b_hidden = biases or (None, None)
        before = (start,) if cell.states == 1 else tuple(start)
        inputs, hidden = _linear(tape, x, w_inputs, b_inputs), _linear(tape, before[0], w_hidden, b_hidden)
        after = cell.step(inputs + hidden, None, before) if cell.additive else cell.step(hidden, inputs, before)
        return after[0] if cell.states == 1 else after

    return rule


def _weights(part: Sequence[Tensor]) -> Weights:
    return Weights(*part) if len(part) == 4 else Weights(part[0], part[1], None, None)


def _possible(tape: Tape, weights: Weights) -> bool:
    """Whether W_hh and b_hh are perturbed both or neither, and no weight differs between micro-batches already."""
    bias = weights.hidden_bias
    alike = bias is None or (tape.find(weights.hidden) is None) == (tape.find(bias) is None)
    return alike and not any(map(tape.is_apart, weights))


def _linear(tape: Tape, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = product(tape, x, weight, bias)
    return F.linear(x, tape.replaced(weight), tape.replaced(bias)) if y is NotImplemented else y


def _one_way(
    tape: Tape, cell: Cell, x: Tensor, start: States, weights: Weights, reverse: bool
) -> tuple[Tensor, States]:
    """One layer in one direction.

    Args:
        tape: The running pass.
        cell: The cell.
        x: Inputs, shape (r, T, d_in).
        start: First states, shape (r, d_hidden) each.
        weights: Of the layer.
        reverse: Whether time runs backwards.

    Returns:
        All h, shape (r, T, d_hidden), and the last states.
    """
    inputs = tape.below(_linear(tape, x, weights.inputs, weights.input_bias))  # (m, r, T, d)
    states = tuple(map(tape.below, start))
    with tape.outside():
        own, base, finish = _moved(tape, weights, inputs)
        base = base + inputs if cell.additive else base.expand_as(inputs)
        columns, rest = base.unbind(2), None if cell.additive else inputs.unbind(2)
        times = range(len(columns))
        before, found = dict[int, Tensor](), dict[int, Tensor]()
        for t in reversed(times) if reverse else times:
            before[t] = states[0].detach()
            total = torch.baddbmm(columns[t], states[0], own)
            states = cell.step(total, None if rest is None else rest[t], states)
            found[t] = states[0]
        finish([before[t] for t in times])
        result = torch.stack([found[t] for t in times], 2)
    return tape.above(result), tuple(map(tape.above, states))


def _moved(
    tape: Tape, weights: Weights, inputs: Tensor
) -> tuple[Tensor, Tensor, Callable[[list[Tensor]], None]]:  # fmt: skip
    """How h is multiplied.

    Returns:
        Every micro-batch's W_hh', shape (m, d_hidden, d), what is added to the product, broadcast to the shape
        (m, r, T, d) of the inputs, and what to call with all h_{t-1}.
    """
    weight, bias, plan, m = weights.hidden, weights.hidden_bias, tape.plan, tape.count
    w, b = tape.find(weight), tape.find(bias)
    if w is None:
        shift = inputs.new_zeros(()) if bias is None else bias
        return weight.mT.expand(m, *weight.mT.shape), shift, lambda _: None
    own = weight.detach()[None] if plan is None or not plan.moves(w) else plan.own(w, weight)
    own = own.mT.expand(m, *weight.mT.shape).to(inputs.dtype)
    zeros, owners, before = torch.zeros_like(inputs), (w, b), list[Tensor]()
    if plan is None:
        anchor = zeros.requires_grad_()
    else:
        each = None if tape.found is None else keeper(tape.found, weight.shape, owners, flipped=False)
        anchor = Anchor.apply(zeros, tape.shared(weight), tape.shared(bias), before, each)
    base = anchor
    if bias is not None:
        shift = (bias[None] if plan is None else plan.perturbed(b, bias)).detach()
        base = anchor + shift[:, None, None].to(inputs.dtype)

    def finish(earlier: list[Tensor]) -> None:
        before.extend(earlier)
        if plan is None and torch.is_grad_enabled():
            h = torch.stack(earlier, 2).reshape(m, -1, weight.shape[1])
            tape.record(anchor, contribution(h, weight.shape, owners, False, m))

    return own, base, finish


RECURRENT: dict[Any, Rule] = {
    getattr(torch._C._VariableFunctions, name + suffix): rule(cell)
    for name, cell in CELLS.items() for suffix, rule in (("", recurrent), ("_cell", recurrent_cell))
}  # fmt: skip
