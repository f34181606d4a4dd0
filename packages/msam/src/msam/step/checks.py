"""Checks of what a user's loss function returned, and of the gradients it left."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor


def check_loss(loss: Any, finite: bool) -> Tensor:
    """Refuse a loss that cannot be differentiated.

    Args:
        loss: What the loss function or closure returned.
        finite: Whether NaN and infinities are refused too.

    Returns:
        The loss, shape ().

    Raises:
        TypeError: If it is not a tensor.
        ValueError: If it is not a scalar, has no graph, or is not finite where that is asked for.
    """
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss: expected the loss function to return a scalar tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"loss: expected a scalar, got shape {tuple(loss.shape)} (take its mean)")
    if not loss.requires_grad:
        raise ValueError("loss: expected a tensor with a graph, got one without gradients (no_grad, or detached?)")
    if finite:
        check_finite_loss(loss)
    return loss.reshape(()) if loss.ndim else loss


def check_losses(losses: Any) -> Tensor:
    """Refuse losses of micro-batches that cannot be differentiated.

    Args:
        losses: What the loss function returned, for all micro-batches, shape (m, ...).

    Returns:
        The losses, shape (m,).

    Raises:
        TypeError: If they are not a tensor.
        ValueError: If a loss is not a scalar, or has no graph.
    """
    if not isinstance(losses, Tensor):
        raise TypeError(f"loss: expected the loss function to return a scalar tensor, got {type(losses).__name__}")
    if losses.numel() != len(losses):
        raise ValueError(f"loss: expected a scalar, got shape {tuple(losses.shape[1:])} (take its mean)")
    if not losses.requires_grad:
        raise ValueError("loss: expected a tensor with a graph, got one without gradients (no_grad, or detached?)")
    return losses.reshape(-1)


def check_finite_loss(loss: Tensor) -> None:
    """Refuse a NaN or infinite loss.

    Args:
        loss: Scalar tensor.

    Raises:
        ValueError: If it is not finite.
    """
    value = loss.item()
    if not math.isfinite(value):
        raise ValueError(f"loss: expected a finite value, got {value}")


def check_finite_norms(norms: Sequence[float]) -> None:
    """Refuse a NaN or infinite ascent gradient.

    Args:
        norms: Norm of every micro-batch's gradient.

    Raises:
        ValueError: If one is not finite.
    """
    if not all(map(math.isfinite, norms)):
        raise ValueError(f"loss: expected a finite gradient, got norms {norms}")


def check_closure_loss(loss: Any, finite: bool) -> Tensor:
    """Refuse what a standard closure may not return.

    Args:
        loss: The closure's value.
        finite: Whether NaN and infinity are refused.

    Returns:
        The detached loss.

    Raises:
        ValueError: If it is None.
    """
    if loss is None:
        raise ValueError("closure: expected it to return the loss, got None")
    if isinstance(loss, Tensor) and not loss.requires_grad:
        loss = loss.clone().requires_grad_()  # closures may return a detached loss: gradients were taken inside
    return check_loss(loss, finite).detach()
