"""Perturbed convolutions: unfolded to a matrix product where low rank pays, otherwise one kernel per micro-batch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Geometry:
    """Arguments of a convolution after input, weight and bias, as ATen's `convolution` takes them.

    Attributes:
        stride: By dimension.
        padding: By dimension.
        dilation: By dimension.
        transposed: Whether it is a transposed convolution.
        output_padding: By dimension.
        groups: Number of groups.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve.

        Args:
            x: Shape (N, C_in, *positions).
            weight: Kernel.
            bias: Shape (C_out,) or None.

        Returns:
            Shape (N, C_out, *positions).
        """
        return torch.convolution(
            x, weight, bias, self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups
        )

    def backward(self, dy: Tensor, x: Tensor, weight: Tensor, mask: tuple[bool, bool]) -> tuple[Any, Any]:
        """Gradients of the input and of the kernel.

        Args:
            dy: Gradient of the result.
            x: Input.
            weight: Kernel (only its shape counts for its own gradient).
            mask: Which of the two are wanted.

        Returns:
            Gradient of the input and of the kernel; None where it is not wanted.
        """
        dx, dw, _ = torch.ops.aten.convolution_backward.default(
            dy, x, weight, None, self.stride, self.padding, self.dilation, self.transposed, self.output_padding,
            self.groups, (*mask, False),
        )  # fmt: skip
        return dx, dw

    def positions(self, size: torch.Size, kernel: torch.Size) -> list[int]:
        """Extent of the result of a convolution that is not transposed.

        Args:
            size: Extent of the input, by dimension.
            kernel: Of the kernel.

        Returns:
            Extent by dimension.
        """
        zipped = zip(size, kernel, self.stride, self.padding, self.dilation, strict=True)
        return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zipped]

    def unfold(self, x: Tensor, kernel: tuple[int, ...]) -> Tensor:
        """Patches of a two-dimensional convolution.

        Args:
            x: Shape (N, C, H, W).
            kernel: Its height and width.

        Returns:
            Shape (N, positions, C * height * width).
        """
        if kernel == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0):
            return x.flatten(2).mT
        return F.unfold(x, kernel, self.dilation, self.padding, self.stride).mT


class ShardedConvolution(torch.autograd.Function):
    """Every micro-batch with its own kernel W + E_j; one whole-batch call for the gradient of the shared W."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, own: Tensor, bounds: list[tuple[int, int]], geometry: Geometry,
        each: Callable[[Tensor], None] | None,
    ) -> Tensor:  # fmt: skip
        """Convolve micro-batch by micro-batch.

        Args:
            ctx: Autograd's context.
            x: Shape (N, C_in, *positions).
            weight: Shared kernel W.
            own: W + E, shape (m, *kernel).
            bounds: First and last example of every micro-batch.
            geometry: The convolution.
            each: Takes the kernel's gradients of all micro-batches in the backward pass, or None.

        Returns:
            Shape (N, C_out, *positions).
        """
        ctx.save_for_backward(x, weight)
        ctx.own, ctx.bounds, ctx.geometry, ctx.each = own, bounds, geometry, each
        return torch.cat([geometry.run(x[a:b], own[j], None) for j, (a, b) in enumerate(bounds)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        """Gradients of x and W.

        Args:
            ctx: Autograd's context.
            gradients: dy.

        Returns:
            Gradients of x and W, and None for the constants.
        """
        dy = gradients[0].contiguous()
        x, weight = ctx.saved_tensors
        geometry: Geometry = ctx.geometry
        own, ctx.own = ctx.own, None
        wanted = ctx.needs_input_grad[0]
        if ctx.each is None:
            dw = geometry.backward(dy, x, weight, (False, True))[1] if ctx.needs_input_grad[1] else None
            parts = [(dy[a:b], x[a:b], own[j]) for j, (a, b) in enumerate(ctx.bounds)] if wanted else []
            dx = torch.cat([geometry.backward(*part, (True, False))[0] for part in parts]) if wanted else None
            return dx, dw, None, None, None, None
        found = [geometry.backward(dy[a:b], x[a:b], own[j], (wanted, True)) for j, (a, b) in enumerate(ctx.bounds)]
        kernels = torch.stack([kernel for _, kernel in found])
        ctx.each(kernels)
        return torch.cat([dx for dx, _ in found]) if wanted else None, kernels.sum(0), None, None, None, None


def kernel_gradients(
    dy: Tensor, x: Tensor, shape: torch.Size, bounds: list[tuple[int, int]], geometry: Geometry
) -> Tensor:
    """Every micro-batch's gradient of the kernel.

    Args:
        dy: Gradient of the result, shape (N, C_out, *positions).
        x: Input, shape (N, C_in, *positions).
        shape: Shape of the kernel.
        bounds: First and last example of every micro-batch.
        geometry: The convolution.

    Returns:
        Shape (m, *shape).
    """
    like = x.new_empty(()).expand(shape)  # under FSDP2 the kernel itself is gone by now; only its shape is needed
    return torch.stack([geometry.backward(dy[a:b].contiguous(), x[a:b], like, (False, True))[1] for a, b in bounds])
