r"""What a layer contributes to per-sample gradients, without forming them ("ghost" route), exact.

For a linear layer the gradient of output c of sample i is the outer product g_ic a_i' of the layer's back-propagated
signal and its input, so layers contribute

    Z_ic . Z_jc' = (a_i . a_j + 1) (g_ic . g_jc')            (the 1 is the bias)

and with T positions per sample (sequences, the patches of a convolution) the sum over both positions. Under a diagonal
preconditioner P and T = 1 the sample's own products are g_ic' diag(P^-1 a_i^2) g_ic', one matrix product more. Where T
is large the layer's own gradients (n, R, in out) are formed instead, whichever costs less.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_NUMBERS = 2**25
"""Most numbers of the explicit gradients of one group of samples."""


class Signal(Protocol):
    """One layer's part in the gradients."""

    def blocks(self) -> Tensor:
        """Inner products of every sample's own gradients.

        Returns:
            Shape (n, R, R), float64.
        """

    def add_gram(self, K: Tensor) -> None:
        """Add the inner products of all gradients.

        Args:
            K: Shape (n R, n R), in place.
        """


@dataclass(frozen=True)
class Outer:
    """A linear layer or a convolution.

    Attributes:
        a: Inputs of the layer, shape (n, T, in).
        g: Back-propagated signals, shape (n, R, T, out).
        weight: P^-1 of the weight, shape (out, in); 1 without a preconditioner, 0 where the weight is not trained.
        bias: P^-1 of the bias, shape (out,); likewise.
    """

    a: Tensor
    g: Tensor
    weight: Tensor | float
    bias: Tensor | float

    def gradients(self) -> Iterator[Tensor]:
        """The layer's gradients for every sample and cotangent, times P^(-1/2).

        Yields:
            Weight and bias part, each of shape (n, R, size).
        """
        if isinstance(self.weight, Tensor) or self.weight:
            Z = torch.einsum("nrto,nti->nroi", self.g, self.a)
            yield (Z * self.weight.sqrt() if isinstance(self.weight, Tensor) else Z).flatten(2)
        if isinstance(self.bias, Tensor) or self.bias:
            Z = self.g.sum(2)
            yield Z * self.bias.sqrt() if isinstance(self.bias, Tensor) else Z

    def blocks(self) -> Tensor:
        """See `Signal.blocks`.

        Returns:
            Shape (n, R, R), float64.
        """
        n, R, T, out = self.g.shape
        size = self.a.shape[2]
        if isinstance(self.weight, Tensor) or isinstance(self.bias, Tensor):
            return self._preconditioned_alone() if T == 1 else self._explicit()
        if out * size < R * T * T:
            return self._explicit()
        a, g = self.a.double(), self.g.double().reshape(n, R * T, out)
        inputs = a @ a.mT * self.weight + self.bias  # (n, T, T)
        return torch.einsum("nrtsu,ntu->nrs", (g @ g.mT).reshape(n, R, T, R, T), inputs)

    def _preconditioned_alone(self) -> Tensor:
        """G diag(P^-1 a^2) G' of every sample, for one position."""
        g = self.g[:, :, 0].double()
        squares = self.a[:, 0].double().square()
        if isinstance(self.weight, Tensor):
            weights = (squares.to(self.weight) @ self.weight.T).double()
        else:
            weights = squares.sum(1, keepdim=True) * self.weight
        return (g * (weights + self.bias)[:, None]) @ g.mT

    def _explicit(self) -> Tensor:
        n, R, _, out = self.g.shape
        group = max(1, _NUMBERS // (R * out * self.a.shape[2]))
        blocks = []
        for i in range(0, n, group):
            some = Outer(self.a[i : i + group], self.g[i : i + group], self.weight, self.bias)
            blocks.append(torch.stack([(Z @ Z.mT).double() for Z in some.gradients()]).sum(0))
        return torch.cat(blocks)

    def ghost_is_cheaper(self) -> bool:
        """Whether inner products of signals cost less than explicit gradients.

        Returns:
            True if they do.
        """
        _, R, T, out = self.g.shape
        size = self.a.shape[2]
        return T * T * (out + 2 + size / R**2) < size * out

    def add_gram(self, K: Tensor) -> None:
        """See `Signal.add_gram`; without a preconditioner.

        Args:
            K: Shape (n R, n R), in place.
        """
        n, R, T, _ = self.g.shape
        if not self.ghost_is_cheaper():
            for Z in self.gradients():
                add_products(K, Z)
            return
        view = K.view(n, R, n, R)
        for t in range(T):
            a, g = self.a[:, t].to(K.dtype), self.g[:, :, t].reshape(n * R, -1).to(K.dtype)
            for u in range(T):
                b, f = self.a[:, u].to(K.dtype), self.g[:, :, u].reshape(n * R, -1).to(K.dtype)
                inputs = a @ b.T * self.weight + self.bias
                view.addcmul_((g @ f.T).view(n, R, n, R), inputs[:, None, :, None])


@dataclass(frozen=True)
class Lookup:
    """An embedding: gradients of equal tokens meet in one row.

    Attributes:
        tokens: Shape (n, T).
        g: Back-propagated signals times P^(-1/2) of their token's row, zero for padding, shape (n, R, T, width).
    """

    tokens: Tensor
    g: Tensor

    def blocks(self) -> Tensor:
        """See `Signal.blocks`.

        Returns:
            Shape (n, R, R), float64.
        """
        n, R, T, width = self.g.shape
        g = self.g.double().reshape(n, R * T, width)
        equal = (self.tokens[:, :, None] == self.tokens[:, None, :]).double()
        return torch.einsum("nrtsu,ntu->nrs", (g @ g.mT).reshape(n, R, T, R, T), equal)

    def add_gram(self, K: Tensor) -> None:
        """See `Signal.add_gram`.

        Args:
            K: Shape (n R, n R), in place.
        """
        n, R, T, _ = self.g.shape
        view = K.view(n, R, n, R)
        for t in range(T):
            g = self.g[:, :, t].reshape(n * R, -1).to(K.dtype)
            for u in range(T):
                f = self.g[:, :, u].reshape(n * R, -1).to(K.dtype)
                equal = (self.tokens[:, t, None] == self.tokens[None, :, u]).to(K.dtype)
                view.addcmul_((g @ f.T).view(n, R, n, R), equal[:, None, :, None])


@dataclass(frozen=True)
class Explicit:
    """Gradients as they are: few parameters, as of norms, or layers not known here.

    Attributes:
        Z: Rows times P^(-1/2), shape (n, R, size).
    """

    Z: Tensor

    def blocks(self) -> Tensor:
        """See `Signal.blocks`.

        Returns:
            Shape (n, R, R), float64.
        """
        Z = self.Z.double()
        return Z @ Z.mT

    def add_gram(self, K: Tensor) -> None:
        """See `Signal.add_gram`.

        Args:
            K: Shape (n R, n R), in place.
        """
        add_products(K, self.Z)


def add_products(K: Tensor, Z: Tensor) -> None:
    """K += Z Z'.

    Args:
        K: Shape (n R, n R).
        Z: Shape (n, R, size).
    """
    flat = Z.reshape(len(K), -1).to(K.dtype)
    K.addmm_(flat, flat.T)
