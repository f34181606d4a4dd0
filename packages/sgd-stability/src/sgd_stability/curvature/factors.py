r"""Factors of the loss's curvature in the outputs: Lambda_i = W_i diag(signs_i) W_i', with W_i of shape (O, R).

Never formed as matrices where the loss has structure: an output of a language model has a hundred thousand numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class OutputFactor(Protocol):
    """W_i for every sample of a batch."""

    @property
    def rank(self) -> int:
        """R, the number of columns of every W_i."""

    @property
    def signs(self) -> Tensor | None:
        """Signs of the columns, shape (n, R); None if Lambda_i is positive semidefinite."""

    def trace(self) -> Tensor:
        """Trace of |Lambda_i| = W_i W_i'.

        Returns:
            Shape (n,).
        """

    def transpose_times(self, x: Tensor) -> Tensor:
        """Multiply by W_i'.

        Args:
            x: Shape (n, O, k).

        Returns:
            W_i' x_i, shape (n, R, k).
        """

    def times(self, u: Tensor) -> Tensor:
        """Multiply by W_i.

        Args:
            u: Shape (n, R, k).

        Returns:
            W_i u_i, shape (n, O, k).
        """


@dataclass(frozen=True)
class ScaledIdentity:
    """W_i = sqrt(scale) I, of the squared error.

    Attributes:
        scale: Lambda_i = scale I.
        n: Number of samples.
        rank: O.
        signs: None.
    """

    scale: float
    n: int
    rank: int
    signs: None = None

    def trace(self) -> Tensor:
        """See `OutputFactor.trace`.

        Returns:
            Shape (n,).
        """
        return torch.full((self.n,), self.scale * self.rank)

    def transpose_times(self, x: Tensor) -> Tensor:
        """See `OutputFactor.transpose_times`.

        Args:
            x: Shape (n, O, k).

        Returns:
            Shape (n, R, k).
        """
        scaled: Tensor = x * self.scale**0.5
        return scaled

    times = transpose_times


@dataclass(frozen=True)
class DiagonalFactor:
    """W_i diagonal, of a loss of every output by itself.

    Attributes:
        root: Square roots of |Lambda_i|, shape (n, O).
        signs: Shape (n, O), or None.
    """

    root: Tensor
    signs: Tensor | None

    @property
    def rank(self) -> int:
        """O."""
        return int(self.root.shape[1])

    def trace(self) -> Tensor:
        """See `OutputFactor.trace`.

        Returns:
            Shape (n,).
        """
        return self.root.square().sum(1)

    def transpose_times(self, x: Tensor) -> Tensor:
        """See `OutputFactor.transpose_times`.

        Args:
            x: Shape (n, O, k).

        Returns:
            Shape (n, R, k).
        """
        scaled: Tensor = x * self.root[:, :, None]
        return scaled

    times = transpose_times


@dataclass(frozen=True)
class SoftmaxFactor:
    """W = diag(sqrt p) (I - sqrt p sqrt p') at every position: W W' = diag(p) - p p' (cross-entropy).

    Attributes:
        root: sqrt p with the weight of a position in it, shape (n, V, P), or (n, P, V).
        unit: sqrt p, of the same shape.
        axis: Dimension of the V classes.
        signs: None.
    """

    root: Tensor
    unit: Tensor
    axis: int = 1
    signs: None = None

    @property
    def rank(self) -> int:
        """V P."""
        return self.root.shape[1] * self.root.shape[2]

    def trace(self) -> Tensor:
        """See `OutputFactor.trace`.

        Returns:
            Shape (n,).
        """
        total: Tensor = (self.root.square() * (1 - self.unit.square())).sum((1, 2))
        return total

    def transpose_times(self, x: Tensor) -> Tensor:
        """See `OutputFactor.transpose_times`.

        Args:
            x: Shape (n, O, k).

        Returns:
            Shape (n, R, k).
        """
        return self._project(self.root[..., None] * x.reshape(*self.root.shape, -1)).reshape(x.shape)

    def times(self, u: Tensor) -> Tensor:
        """See `OutputFactor.times`.

        Args:
            u: Shape (n, R, k).

        Returns:
            Shape (n, O, k).
        """
        return (self.root[..., None] * self._project(u.reshape(*self.root.shape, -1))).reshape(u.shape)

    def _project(self, y: Tensor) -> Tensor:
        projected: Tensor = y - self.unit[..., None] * (self.unit[..., None] * y).sum(self.axis, keepdim=True)
        return projected


@dataclass(frozen=True)
class DenseFactor:
    """W_i as matrices, of a loss whose output Hessian autograd supplies.

    Attributes:
        W: Shape (n, O, R).
        signs: Shape (n, R), or None.
    """

    W: Tensor
    signs: Tensor | None

    @property
    def rank(self) -> int:
        """R."""
        return int(self.W.shape[2])

    def trace(self) -> Tensor:
        """See `OutputFactor.trace`.

        Returns:
            Shape (n,).
        """
        return self.W.square().sum((1, 2))

    def transpose_times(self, x: Tensor) -> Tensor:
        """See `OutputFactor.transpose_times`.

        Args:
            x: Shape (n, O, k).

        Returns:
            Shape (n, R, k).
        """
        return self.W.mT @ x

    def times(self, u: Tensor) -> Tensor:
        """See `OutputFactor.times`.

        Args:
            u: Shape (n, R, k).

        Returns:
            Shape (n, O, k).
        """
        return self.W @ u


def elementwise_factor(losses: Callable[[Tensor, Tensor], Tensor], z: Tensor, y: Tensor) -> "DiagonalFactor":
    """Factor of the mean over the outputs of a loss of every output by itself: one double backward pass.

    Args:
        losses: `(outputs, targets) -> losses` of the outputs' shape.
        z: Outputs, shape (n, ...).
        y: Targets.

    Returns:
        The factor.
    """
    leaf = z.detach().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(losses(leaf, y).sum(), leaf, create_graph=True)
        curvature = _gradient(slope.sum(), leaf)
    second = curvature.reshape(len(z), -1) / leaf[0].numel()
    signs = None if bool((second >= 0).all()) else torch.sign(second)
    return DiagonalFactor(second.abs().sqrt(), signs)


def dense_factor(loss: Callable[[Tensor, Tensor], Tensor], z: Tensor, y: Tensor) -> DenseFactor:
    """Factor of any loss that is a sum over samples: O double backward passes give all samples' output Hessians.

    Args:
        loss: `(outputs, targets) -> losses (n,)`.
        z: Outputs, shape (n, ...).
        y: Targets.

    Returns:
        The factor.
    """
    flat = z.detach().reshape(len(z), -1).requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(loss(flat.reshape(z.shape), y).sum(), flat, create_graph=True)
        rows = [_gradient(slope[:, o].sum(), flat) for o in range(flat.shape[1])]
    hessian = torch.stack(rows, 1)  # (n, O, O)
    values, vectors = torch.linalg.eigh((hessian + hessian.mT) / 2)
    noise = 10 * torch.finfo(z.dtype).eps * values.abs().amax(1, keepdim=True)
    values = torch.where(values.abs() <= noise, 0.0, values)
    signs = None if bool((values >= 0).all()) else torch.sign(values)
    return DenseFactor(vectors * values.abs().sqrt()[:, None, :], signs)


def _gradient(value: Tensor, by: Tensor) -> Tensor:
    if not value.requires_grad:  # a loss linear in this output
        return torch.zeros_like(by)
    (found,) = torch.autograd.grad(value, by, retain_graph=True, materialize_grads=True)
    return found.detach()
