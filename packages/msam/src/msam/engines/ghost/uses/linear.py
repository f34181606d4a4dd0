r"""Perturbed matrix products, $y_j = x_j (W + E_j)^\top + b + e_j$, with E in factors or materialised."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from core_tensor import low_rank_add
from torch import Tensor

Totals = tuple[Tensor, Tensor | None]
"""Gradients of a shared W and b."""

Each = Callable[[Tensor, Tensor], Totals | None]
"""Takes dy and x of all micro-batches in the backward pass of a product; may return the gradients of W and b."""


class Step(Protocol):
    """How every micro-batch's weights differ from the shared ones."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """Multiply by the perturbed weights.

        Args:
            x: Input, shape (rows, d_in), contiguous.
            weight: W, shape (d_out, d_in).
            bias: b, shape (d_out,), or None.
            out: Where y is written, shape (rows, d_out), contiguous.
        """
        ...

    def backward(self, dy: Tensor, weight: Tensor) -> Tensor:
        """Gradient of the input.

        Args:
            dy: Gradient of y, contiguous.
            weight: W.

        Returns:
            dx, shape (rows, d_in).
        """
        ...

    def totals(self, dy: Tensor, x: Tensor) -> Totals | None:
        """Gradients of the shared weights, where those of every micro-batch have to be formed anyway.

        Args:
            dy: Gradient of y, contiguous.
            x: Input.

        Returns:
            Gradients of W and b, or None.
        """
        ...


@dataclass
class LowRankStep:
    r"""$E_j = c_j O_j^\top I_j$, $e_j = \beta c_j O_j^\top 1$: $y_j = x_j W^\top + b + c_j (x_j I_j^\top + \beta) O_j$.

    Attributes:
        inner: I, on the input's side, (m, r, d_in).
        outer: O, on the result's side, (m, r, d_out).
        coefficient: c, (m,).
        bias: beta, 0 if the bias does not move along.
        product: `x W' + b` if pass 1 computed it already for the same x.
        each: Takes dy and x of all micro-batches, which are the directions of the next step.
    """

    inner: Tensor
    outer: Tensor
    coefficient: Tensor
    bias: float
    product: Tensor | None
    each: Each | None = None

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """See `Step.forward`."""
        known, self.product = self.product, None
        base = bias if known is None else known
        low_rank_add(base, x, self.inner, self.outer, self.coefficient, self.bias, out=out)
        if known is None:
            out.addmm_(x, weight.t())

    def backward(self, dy: Tensor, weight: Tensor) -> Tensor:
        """See `Step.backward`."""
        return low_rank_add(None, dy, self.outer, self.inner, self.coefficient, 0.0).addmm_(dy, weight)

    def totals(self, dy: Tensor, x: Tensor) -> Totals | None:
        """See `Step.totals`."""
        return None if self.each is None else self.each(dy, x)


@dataclass
class OwnWeights:
    """Every micro-batch has its own copy of the weights.

    Attributes:
        weights: W + E, shape (m, d_out, d_in).
        biases: b + e, shape (m or 1, d_out), or None.
        each: Takes dy and x of all micro-batches, keeps their gradients for the next step, and may return the sums.
    """

    weights: Tensor
    biases: Tensor | None
    each: Each | None = None

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """See `Step.forward`; `biases` take the place of b."""
        del weight, bias
        m = len(self.weights)
        rows, result = x.view(m, -1, x.shape[-1]), out.view(m, -1, out.shape[-1])
        if self.biases is None:
            torch.bmm(rows, self.weights.mT, out=result)
        else:
            torch.baddbmm(self.biases[:, None], rows, self.weights.mT, out=result)

    def backward(self, dy: Tensor, weight: Tensor) -> Tensor:
        """See `Step.backward`."""
        del weight
        return torch.bmm(dy.view(len(self.weights), -1, dy.shape[-1]), self.weights).flatten(0, 1)

    def totals(self, dy: Tensor, x: Tensor) -> Totals | None:
        """See `Step.totals`."""
        return None if self.each is None else self.each(dy, x)


class PerturbedProduct(torch.autograd.Function):
    """The product of every micro-batch with its own weights; one whole-batch product for the gradient of W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, step: Step) -> Tensor:
        """Multiply.

        Args:
            ctx: Autograd's context.
            x: Input, shape (m, ..., d_in), contiguous.
            weight: W, shape (d_out, d_in).
            bias: b, shape (d_out,), or None.
            step: The perturbation, a constant.

        Returns:
            y, shape (m, ..., d_out); no view, so that it may be overwritten outside.
        """
        ctx.save_for_backward(x, weight)
        ctx.step = step
        y = x.new_empty(*x.shape[:-1], weight.shape[0])
        step.forward(x.view(-1, x.shape[-1]), weight, bias, y.view(-1, y.shape[-1]))
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        """Gradients of x, W and b.

        Args:
            ctx: Autograd's context.
            gradients: dy.

        Returns:
            Gradients of x, W and b, and None for the perturbation.
        """
        x, weight = ctx.saved_tensors
        dy, rows = gradients[0].contiguous().view(-1, weight.shape[0]), x.view(-1, x.shape[-1])
        step, ctx.step = ctx.step, None  # frees the perturbation layer by layer
        dx = step.backward(dy, weight).view(x.shape) if ctx.needs_input_grad[0] else None
        totals = step.totals(dy, rows)
        if totals is None:
            totals = dy.t().mm(rows), dy.sum(0) if ctx.needs_input_grad[2] else None
        return dx, *totals, None
