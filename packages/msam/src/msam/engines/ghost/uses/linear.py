r"""Perturbed matrix products, $y_j = x_j (W + E_j)^\top + b + e_j$, with E in factors or materialised."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from core_tensor import low_rank_add
from torch import Tensor

Stretch = tuple[int, int, int, int]
"""First and last row, first micro-batch and number n of micro-batches of a stretch of equal ones."""


def by_micro_batch(x: Tensor, start: int, stop: int, n: int) -> Tensor:
    """The rows of a stretch by micro-batch.

    Args:
        x: Shape (rows, d), contiguous.
        start: First row.
        stop: Last row, exclusive.
        n: Micro-batches of the stretch.

    Returns:
        Shape (n, rows of each, d), a view.
    """
    return x[start:stop].view(n, -1, x.shape[-1])


class Step(Protocol):
    """How every micro-batch's weights differ from the shared ones."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply by the perturbed weights.

        Args:
            x: Input, shape (rows, d_in), contiguous.
            weight: W, shape (d_out, d_in).
            bias: b, shape (d_out,), or None.

        Returns:
            y, shape (rows, d_out).
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


@dataclass
class LowRankStep:
    r"""$E_j = c_j O_j^\top I_j$, $e_j = \beta c_j O_j^\top 1$: $y_j = x_j W^\top + b + c_j (x_j I_j^\top + \beta) O_j$.

    Attributes:
        stretches: Stretches of equal micro-batches.
        inner: I by stretch, on the input's side, (n, r, d_in).
        outer: O by stretch, on the result's side, (n, r, d_out).
        coefficient: c by stretch, (n,).
        bias: beta, 0 if the bias does not move along.
        product: `x W' + b` if pass 1 computed it already for the same x, in the same order of rows.
    """

    stretches: tuple[Stretch, ...]
    inner: list[Tensor]
    outer: list[Tensor]
    coefficient: list[Tensor]
    bias: float
    product: Tensor | None

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See `Step.forward`.

        Args:
            x: Input.
            weight: W.
            bias: b or None.

        Returns:
            y.
        """
        if self.product is not None:
            base, self.product = self.product, None
            return self._added(base, x, self.inner, self.outer, self.bias)
        return self._added(bias, x, self.inner, self.outer, self.bias).addmm_(x, weight.t())

    def backward(self, dy: Tensor, weight: Tensor) -> Tensor:
        """See `Step.backward`.

        Args:
            dy: Gradient of y.
            weight: W.

        Returns:
            dx.
        """
        return self._added(None, dy, self.outer, self.inner, 0.0).addmm_(dy, weight)

    def _added(self, base: Tensor | None, x: Tensor, inner: list[Tensor], outer: list[Tensor], bias: float) -> Tensor:
        """What every micro-batch's own part of the weights gives, upon a matrix, a row or nothing.

        Returns:
            Shape (rows, d of `outer`).
        """
        if len(self.stretches) == 1:  # the usual case
            return low_rank_add(base, x, inner[0], outer[0], self.coefficient[0], bias)
        y = x.new_empty(x.shape[0], outer[0].shape[-1])
        terms = zip(self.stretches, inner, outer, self.coefficient, strict=True)
        for (start, stop, _, _), inner_part, outer_part, c in terms:
            own = base if base is None or base.ndim == 1 else base[start:stop]
            low_rank_add(own, x[start:stop], inner_part, outer_part, c, bias, out=y[start:stop])
        return y


@dataclass
class OwnWeights:
    """Every micro-batch has its own copy of the weights.

    Attributes:
        stretches: Stretches of equal micro-batches.
        weights: W + E, shape (m, d_out, d_in).
        biases: b + e, shape (m or 1, d_out), or None.
    """

    stretches: tuple[Stretch, ...]
    weights: Tensor
    biases: Tensor | None

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See `Step.forward`.

        Args:
            x: Input.
            weight: W.
            bias: b or None; unused, as `biases` holds it.

        Returns:
            y.
        """
        del bias
        y = x.new_empty(x.shape[0], weight.shape[0])
        for start, stop, first, n in self.stretches:
            own = self.weights[first : first + n].mT  # (n, d_in, d_out)
            rows, result = by_micro_batch(x, start, stop, n), by_micro_batch(y, start, stop, n)
            if self.biases is None:
                torch.bmm(rows, own, out=result)
            else:
                shift = self.biases if len(self.biases) == 1 else self.biases[first : first + n]
                torch.baddbmm(shift[:, None], rows, own, out=result)
        return y

    def backward(self, dy: Tensor, weight: Tensor) -> Tensor:
        """See `Step.backward`.

        Args:
            dy: Gradient of y.
            weight: W.

        Returns:
            dx.
        """
        dx = dy.new_empty(dy.shape[0], weight.shape[1])
        for start, stop, first, n in self.stretches:
            rows, result = by_micro_batch(dy, start, stop, n), by_micro_batch(dx, start, stop, n)
            torch.bmm(rows, self.weights[first : first + n], out=result)
        return dx


class PerturbedProduct(torch.autograd.Function):
    """The product of every micro-batch with its own weights; one whole-batch product for the gradient of W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, step: Step) -> Tensor:
        """Multiply.

        Args:
            ctx: Autograd's context.
            x: Input, shape (rows, d_in), contiguous.
            weight: W, shape (d_out, d_in).
            bias: b, shape (d_out,), or None.
            step: The perturbation, a constant.

        Returns:
            y, shape (rows, d_out).
        """
        ctx.save_for_backward(x, weight)
        ctx.step = step
        return step.forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        """Gradients of x, W and b.

        Args:
            ctx: Autograd's context.
            gradients: dy.

        Returns:
            Gradients of x, W and b, and None for the perturbation.
        """
        dy = gradients[0].contiguous()
        x, weight = ctx.saved_tensors
        step, ctx.step = ctx.step, None  # frees the perturbation layer by layer
        dx = step.backward(dy, weight) if ctx.needs_input_grad[0] else None
        dw = dy.t().mm(x) if ctx.needs_input_grad[1] else None
        return dx, dw, dy.sum(0) if ctx.needs_input_grad[2] else None, None
