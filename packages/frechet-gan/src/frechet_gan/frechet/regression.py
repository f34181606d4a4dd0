"""Losses whose gradient is computed beside their value, and is not to be differentiated again."""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


class _Regression(torch.autograd.Function):
    """A value with a gradient that was computed beside it."""

    @staticmethod
    def forward(ctx: FunctionCtx, features: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient, features)
        return value.clone()

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradient, features = ctx.saved_tensors  # type: ignore[attr-defined]
        return once((gradient * grad).to(features.dtype), features), None, None


def regress(features: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """A loss with a given value whose gradient in the features is a given one.

    Args:
        features: Features with their graph, shape (n, d).
        value: Value, a scalar.
        gradient: Gradient, shape (n, d).

    Returns:
        A scalar in the dtype of the features, at least float32, differentiable once.
    """
    dtype = wide(features.dtype)
    loss: Tensor = _Regression.apply(features, value.to(dtype), gradient.to(dtype))
    return loss


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a distance between features of a dtype: at least float32, since 65504 ends half precision."""
    return torch.promote_types(dtype, torch.float32)


def once(gradient: Tensor, at: Tensor) -> Tensor:
    """Mark a closed-form gradient, in a backward pass, as one that has no second derivative.

    Args:
        gradient: The gradient.
        at: The point it was taken at.

    Returns:
        The gradient; with `create_graph`, one that refuses to be differentiated.
    """
    if not torch.is_grad_enabled():  # no graph of the backward pass is asked for
        return gradient
    marked: Tensor = OnceDifferentiable.apply(gradient, at)
    return marked


class OnceDifferentiable(torch.autograd.Function):
    """Passes a closed-form gradient on and refuses to be differentiated: silence would mean a wrong second derivative.

    torch's `once_differentiable` only refuses where the incoming gradient itself has a graph.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, gradient: Tensor, at: Tensor) -> Tensor:
        """The gradient, as depending on the point it was taken at.

        Args:
            ctx: Torch's context.
            gradient: Closed-form gradient.
            at: The point.

        Returns:
            The gradient.
        """
        del ctx, at
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Refuse.

        Args:
            ctx: Torch's context.
            grad: Incoming gradient.

        Raises:
            NotImplementedError: Always.
        """
        del ctx, grad
        raise NotImplementedError("the closed-form gradient of frechet_gan's distances has no second derivative")
