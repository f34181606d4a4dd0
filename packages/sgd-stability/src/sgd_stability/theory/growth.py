r"""Growth of the second moment over a grid of learning rates and batch sizes, from one small subspace.

The second-moment operators of a whole grid are made of the same three maps,

    T = 1 - eta D + eta^2 (a P + s N),   D(M) = H M + M H,   P(M) = H M H,   N(M) = mean(H_i M H_i),

of which only N is dear. So one orthonormal basis of symmetric matrices with its images under N serves every cell: the
top Ritz pair of T in it, and the residual of that pair, cost no application of N. A residual that is too large joins
the basis (Davidson's method), for this cell and all that follow; every value remains a certified lower bound.
"""

import math

import torch
from torch import Tensor

from sgd_stability.theory.dynamics import Update, noise_gain
from sgd_stability.theory.family import CurvatureFamily
from sgd_stability.theory.sampling import Sampling
from sgd_stability.theory.second_moment import critical_mode

_NUMBERS = 2**25
"""Most numbers of the basis; as many again hold its images."""
_LEAST = 32
"""Matrices that it holds at any size."""
_TOLERANCE = 1e-5
"""Relative residual; the error of an isolated eigenvalue is of second order in it."""


def growth_grid(family: CurvatureFamily, lrs: list[float], samplings: list[Sampling], update: Update) -> Tensor:
    """Growth of E||delta||^2 per step of plain SGD; of other update rules the noise gain, which is also 1 at the edge.

    Args:
        family: The per-sample Hessians.
        lrs: Learning rates.
        samplings: Minibatch schemes, such as the batch sizes of one scheme.
        update: Update rule.

    Returns:
        Shape (rates, samplings); infinite where the mean dynamics diverges under momentum or weight decay.
    """
    if not update.plain:
        return torch.stack([_gains(family, lr, samplings, update) for lr in lrs])
    growth = torch.ones(len(lrs), len(samplings), dtype=torch.float64)
    if len(family.h) == 0:
        return growth
    radii = _Radii(family, samplings)
    for j in range(len(samplings)):
        for i in reversed(range(len(lrs))):
            growth[i, j] = radii.solve(lrs[i], j)
    return growth


def _gains(family: CurvatureFamily, lr: float, samplings: list[Sampling], update: Update) -> Tensor:
    """The noise gain at one rate: it is proportional to s (a - 1 is 0 or -s), so one eigenvalue serves all."""
    if lr >= update.edge(family.lambda_max):
        return torch.full((len(samplings),), math.inf, dtype=torch.float64)
    noisiest = max(samplings, key=lambda sampling: sampling.s)
    if noisiest.s == 0.0:
        return torch.zeros(len(samplings), dtype=torch.float64)
    gain = noise_gain(family, lr, noisiest, update, tolerance=1e-4)[0].value / noisiest.s
    return torch.tensor([gain * sampling.s for sampling in samplings], dtype=torch.float64)


class _Radii:
    """Spectral radii of the second-moment operators of one family."""

    def __init__(self, family: CurvatureFamily, samplings: list[Sampling]) -> None:
        h = family.h
        self.family, self.samplings = family, samplings
        self.sum, self.product = (h[:, None] + h[None, :]).reshape(-1), torch.outer(h, h).reshape(-1)
        self.flattest = int(h.abs().argmin())
        squares = family.factors.square()
        own = (squares if family.signs is None else squares * family.signs[:, :, None]).sum(1)  # diagonals of H_i
        self.noise = (own.T @ own / family.n).reshape(-1)  # about the diagonal of N
        size = len(self.sum)
        self.capacity = min(size, max(_LEAST, _NUMBERS // size))
        self.count = 0
        self.basis, self.images = (torch.empty(0, size, dtype=h.dtype, device=h.device) for _ in range(2))
        self.small = torch.zeros(3, 0, 0, dtype=torch.float64)  # D, P and N in the basis
        # a positive definite matrix, which no semidefinite eigenvector is orthogonal to; the flattest direction; and
        # the modes that are critical at the thresholds
        flat = torch.zeros_like(self.sum)
        flat[self.flattest * (len(h) + 1)] = 1.0
        scale = float(h.abs().max())
        self._add(torch.diag(h.abs().clamp_min(1e-10 * scale if scale > 0 else 1.0)).reshape(-1))
        self._add(flat)
        self.thresholds = []
        for sampling in samplings:
            found, mode = critical_mode(family, sampling)
            self.thresholds.append(found.value)
            if mode is not None:
                self._add(mode.reshape(-1))

    def solve(self, lr: float, which: int) -> float:
        """The radius at a learning rate under one of the samplings."""
        sampling, h = self.samplings[which], self.family.h
        if sampling.s == 0.0 and sampling.a == 1.0:
            return float((1 - lr * h).square().max())
        square = lr**2
        mean = 1 - lr * self.sum + square * sampling.a * self.product
        if lr < self.thresholds[which]:
            flat = self.flattest * (len(h) + 1)
            factor = float(mean[flat] + square * sampling.s * self.noise[flat])
            if 0.0 <= 1.0 - factor <= _TOLERANCE:
                return factor  # the radius is between the two: nothing is left to iterate for
        while True:
            D, P, N = self.small
            eye = torch.eye(self.count, dtype=torch.float64)
            theta, rotation = torch.linalg.eigh(eye - lr * D + square * (sampling.a * P + sampling.s * N))
            top, weights = float(theta[-1]), rotation[:, -1].to(self.basis)
            vector = weights @ self.basis[: self.count]
            residual = (mean - top) * vector + square * sampling.s * (weights @ self.images[: self.count])
            if float(residual.norm()) <= _TOLERANCE * abs(top) or self.count == len(self.sum):
                return top
            if self.count == self.capacity:
                self._restart(rotation[:, -(self.capacity // 2) :])
            gap = (top - mean - square * sampling.s * self.noise).clamp_min(1e-3 * abs(top))
            if not self._add(residual / gap):
                return top

    def _add(self, vector: Tensor) -> bool:
        """One more direction; whether it is one."""
        if self.count == len(self.basis):
            room = min(max(16, 2 * self.count), self.capacity)
            self.basis, self.images = (_grown(rows, room) for rows in (self.basis, self.images))
        rows = self.basis[: self.count]
        vector = vector / vector.norm()
        for _ in range(2):  # twice is enough
            vector = vector - (rows @ vector) @ rows
        size = float(vector.norm())
        if not size > 1e-8:
            return False
        vector = vector / size
        r = len(self.family.h)
        image = self.family.noise(vector.reshape(r, r))
        self.basis[self.count] = vector
        self.images[self.count] = ((image + image.T) / 2).reshape(-1)
        self.count += 1
        rows = self.basis[: self.count]
        images = torch.stack([self.sum * vector, self.product * vector, self.images[self.count - 1]])
        columns = (images @ rows.T).cpu()
        small = torch.zeros(3, self.count, self.count, dtype=torch.float64)
        small[:, :-1, :-1] = self.small
        small[:, -1], small[:, :, -1] = columns, columns
        self.small = small
        return True

    def _restart(self, rotation: Tensor) -> None:
        """Keep some Ritz vectors."""
        weights = rotation.T.to(self.basis)
        for rows in (self.basis, self.images):
            rows[: len(weights)] = weights @ rows[: self.count]
        self.small = rotation.T @ self.small @ rotation
        self.count = len(weights)


def _grown(rows: Tensor, room: int) -> Tensor:
    larger = rows.new_empty(room, rows.shape[1])
    larger[: len(rows)] = rows
    return larger
