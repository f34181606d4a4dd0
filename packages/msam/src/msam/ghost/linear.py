"""Perturbed matrix products: the low-rank correction, and the materialised form."""

from typing import Any

import torch
from torch import Tensor

Block = tuple[int, int, Tensor, Tensor, Tensor, Tensor | None]
"""First and last leading row of a stretch, factors on the input's and the result's side (n, r, d), c and bias c."""


class LowRankCorrection(torch.autograd.Function):
    r"""$y_j \mathrel{+}= (c\, x_j R_j^\top + c_b)\, L_j$, in place; the factors are constants."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, blocks: list[Block]) -> Tensor:
        """Add the correction.

        Args:
            ctx: Autograd's context.
            y: Unperturbed result, shape (rows, ..., d_out), contiguous; overwritten.
            x: Input, shape (rows, ..., d_in).
            blocks: Stretches of equal micro-batches.

        Returns:
            y.
        """
        ctx.mark_dirty(y)
        ctx.blocks, ctx.shape = blocks, x.shape
        for start, stop, inner, outer, c, bias in blocks:
            n = inner.shape[0]
            s = torch.bmm(x[start:stop].reshape(n, -1, x.shape[-1]), inner.mT).mul_(c)  # (n, rows, r)
            if bias is not None:
                s.add_(bias)
            y[start:stop].view(n, -1, y.shape[-1]).baddbmm_(s, outer)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        r"""The gradient passes y unchanged, and x gets $c\, (dy_j L_j^\\top) R_j$ on top.

        Args:
            ctx: Autograd's context.
            gradients: dy.

        Returns:
            Gradients of y, x and the blocks.
        """
        (dy,) = gradients
        blocks, ctx.blocks = ctx.blocks, None  # frees the factors layer by layer
        if not ctx.needs_input_grad[1]:
            return dy, None, None
        dx = dy.new_empty(ctx.shape)
        for start, stop, inner, outer, c, _ in blocks:
            n = inner.shape[0]
            s = torch.bmm(dy[start:stop].reshape(n, -1, dy.shape[-1]), outer.mT).mul_(c)
            torch.bmm(s, inner, out=dx[start:stop].view(n, -1, dx.shape[-1]))
        return dy, dx, None


class KeptProduct(torch.autograd.Function):
    """A product of the batch itself and the weights, computed in pass 1; pass 2 takes over its result.

    The first layer's unperturbed product is the same in both passes, so one matrix product in six is saved there.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,  # noqa: ARG004
        bias: Tensor | None,  # noqa: ARG004
        result: list[Tensor],
    ) -> Tensor:
        """Return the result, with the weights' gradient attached.

        Args:
            ctx: Autograd's context.
            x: Input without gradient, shape (..., d_in).
            weight: W, shape (d_out, d_in); only its gradient is of interest.
            bias: b, shape (d_out,), or None.
            result: `x W' + b`, boxed so that autograd does not take it for an argument.

        Returns:
            The result itself.
        """
        ctx.save_for_backward(x)
        return result.pop()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor | None, Tensor | None, None]:
        """Gradients of W and b.

        Args:
            ctx: Autograd's context.
            gradients: dy.

        Returns:
            None for x, the two gradients, None for the box.
        """
        (x,) = ctx.saved_tensors
        dy = gradients[0].flatten(0, -2)
        dw = dy.mT @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return None, dw, dy.sum(0) if ctx.needs_input_grad[2] else None, None


class ShardedLinear(torch.autograd.Function):
    r"""$y_j = x_j (W + E_j)^\top + b + e_j$ by stretches; one whole-batch product for the gradient of W."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        step: Tensor,
        shift: Tensor | None,
        stretches: list[tuple[int, int, int, int]],
    ) -> Tensor:
        """Multiply every micro-batch by its own weights.

        Args:
            ctx: Autograd's context.
            x: Input, shape (rows, ..., d_in), contiguous.
            weight: W, shape (d_out, d_in).
            bias: b, shape (d_out,), or None.
            step: E, shape (m, d_out, d_in).
            shift: e, shape (m, d_out), or None.
            stretches: First and last leading row, first micro-batch and number of micro-batches of each.

        Returns:
            y, shape (rows, ..., d_out).
        """
        ctx.save_for_backward(x, weight)
        ctx.step, ctx.stretches = step, stretches
        y = x.new_empty(*x.shape[:-1], weight.shape[0])
        for start, stop, first, n in stretches:
            own = (weight + step[first : first + n]).mT  # (n, d_in, d_out)
            rows, result = x[start:stop].view(n, -1, x.shape[-1]), y[start:stop].view(n, -1, y.shape[-1])
            if shift is not None or bias is not None:
                offset = shift[first : first + n] if shift is not None else y.new_zeros(n, y.shape[-1])
                offset = offset if bias is None else offset + bias
                torch.baddbmm(offset[:, None], rows, own, out=result)
            else:
                torch.bmm(rows, own, out=result)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        """Gradients of x, W and b.

        Args:
            ctx: Autograd's context.
            gradients: dy.

        Returns:
            Gradients of x, W and b, and None for the constants.
        """
        dy = gradients[0].contiguous()
        x, weight = ctx.saved_tensors
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x)
            for start, stop, first, n in ctx.stretches:
                own = weight + ctx.step[first : first + n]
                rows = dy[start:stop].view(n, -1, dy.shape[-1])
                torch.bmm(rows, own, out=dx[start:stop].view(n, -1, x.shape[-1]))
        if ctx.needs_input_grad[1]:
            dw = dy.flatten(0, -2).mT @ x.flatten(0, -2)
        if ctx.needs_input_grad[2]:
            db = dy.flatten(0, -2).sum(0)
        return dx, dw, db, None, None, None
