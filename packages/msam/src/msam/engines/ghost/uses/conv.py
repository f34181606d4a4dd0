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

    def backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, mask: tuple[bool, bool, bool]
    ) -> tuple[Any, Any, Any]:  # fmt: skip
        """Gradients of the input, the kernel and the bias.

        Args:
            dy: Gradient of the result.
            x: Input.
            weight: Kernel (only its shape counts for its own gradient).
            mask: Which of the three are wanted.

        Returns:
            Gradients of the input, the kernel and the bias; None where it is not wanted.
        """
        dx, dw, db = torch.ops.aten.convolution_backward.default(
            dy, x, weight, [dy.shape[1]], self.stride, self.padding, self.dilation, self.transposed,
            self.output_padding, self.groups, mask,
        )  # fmt: skip
        return dx, dw, db

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


Bounds = list[tuple[int, int]]
"""First and last example of every micro-batch."""

Each = Callable[[Tensor, Tensor | None], None]
"""Takes the gradients of the kernel, shape (m, *kernel), and of the bias, (m, C_out), of all micro-batches."""


class MeasuredConvolution(torch.autograd.Function):
    """A convolution of pass 1: one backward call per micro-batch for the gradients of its input and of the kernel."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, bounds: Bounds, geometry: Geometry, each: Each
    ) -> Tensor:  # fmt: skip
        """Convolve the whole batch.

        Args:
            ctx: Autograd's context.
            x: Shape (N, C_in, *positions).
            weight: Kernel W, a constant.
            bias: Shape (C_out,), a constant, or None.
            bounds: Of the micro-batches.
            geometry: The convolution.
            each: Takes what the backward pass finds.

        Returns:
            Shape (N, C_out, *positions).
        """
        ctx.save_for_backward(x, weight)
        ctx.rest = bounds, geometry, bias is not None, each
        return geometry.run(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        """Gradient of x.

        Args:
            ctx: Autograd's context.
            gradients: dy.

        Returns:
            Gradient of x, and None for the constants.
        """
        x, weight = ctx.saved_tensors
        bounds, geometry, biased, each = ctx.rest
        dy = gradients[0].contiguous()
        found = [geometry.backward(dy[a:b], x[a:b], weight, (True, True, biased)) for a, b in bounds]
        each(*_stacked(found))
        return torch.cat([dx for dx, _, _ in found]), None, None, None, None, None


class ShardedConvolution(torch.autograd.Function):
    """Every micro-batch with its own kernel W + E_j; one whole-batch call for the gradient of the shared W."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, own: tuple[Tensor, Tensor | None], bounds: Bounds,
        geometry: Geometry, each: Each | None,
    ) -> Tensor:  # fmt: skip
        """Convolve micro-batch by micro-batch.

        Args:
            ctx: Autograd's context.
            x: Shape (N, C_in, *positions).
            weight: Shared kernel W.
            bias: Shared bias b, shape (C_out,), or None.
            own: W + E, shape (m, *kernel), and b + e, shape (m or 1, C_out), or None.
            bounds: Of the micro-batches.
            geometry: The convolution.
            each: Takes the gradients of all micro-batches in the backward pass, or None.

        Returns:
            Shape (N, C_out, *positions).
        """
        ctx.save_for_backward(x, weight)
        ctx.own, ctx.bounds, ctx.geometry, ctx.each, ctx.biased = own[0], bounds, geometry, each, bias is not None
        biases = [None] * len(bounds) if own[1] is None else own[1].expand(len(bounds), -1)
        parts = zip(bounds, own[0], biases, strict=True)
        return torch.cat([geometry.run(x[a:b], kernel, shift) for (a, b), kernel, shift in parts])

    @staticmethod
    def backward(
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None, None]:
        """Gradients of x, W and b.

        Args:
            ctx: Autograd's context.
            gradients: dy.

        Returns:
            Gradients of x, W and b, and None for the constants.
        """
        dy = gradients[0].contiguous()
        x, weight = ctx.saved_tensors
        geometry: Geometry = ctx.geometry
        own, ctx.own = ctx.own, None
        wanted, *shared = ctx.needs_input_grad[:3]
        parts = [(dy[a:b], x[a:b], own[j]) for j, (a, b) in enumerate(ctx.bounds)]
        if ctx.each is None:
            _, dw, db = geometry.backward(dy, x, weight, (False, *shared)) if any(shared) else (None, None, None)
            dx = torch.cat([geometry.backward(*part, (True, False, False))[0] for part in parts]) if wanted else None
            return dx, dw, db, None, None, None, None
        found = [geometry.backward(*part, (wanted, True, ctx.biased)) for part in parts]
        kernels, biases = _stacked(found)
        ctx.each(kernels, biases)
        dx = torch.cat([dx for dx, _, _ in found]) if wanted else None
        return dx, kernels.sum(0), None if biases is None else biases.sum(0), None, None, None, None


def _stacked(found: list[tuple[Any, Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    biases = [db for _, _, db in found if db is not None]
    return torch.stack([dw for _, dw, _ in found]), torch.stack(biases) if biases else None


def kernel_gradients(
    dy: Tensor, x: Tensor, shape: torch.Size, biased: bool, bounds: Bounds, geometry: Geometry
) -> tuple[Tensor, Tensor | None]:
    """Every micro-batch's gradients of the kernel and the bias.

    Args:
        dy: Gradient of the result, shape (N, C_out, *positions).
        x: Input, shape (N, C_in, *positions).
        shape: Shape of the kernel.
        biased: Whether the bias's are wanted.
        bounds: Of the micro-batches.
        geometry: The convolution.

    Returns:
        Shapes (m, *shape) and (m, C_out), or None.
    """
    like = x.new_empty(()).expand(shape)  # under FSDP2 the kernel itself is gone by now; only its shape is needed
    dy = dy.contiguous()
    return _stacked([geometry.backward(dy[a:b], x[a:b], like, (False, True, biased)) for a, b in bounds])
