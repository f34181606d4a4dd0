"""A family of per-sample Hessians, reduced to the coordinates in which everything here is computed.

Symbols: H_i the Hessian of sample i, H = (1/n) sum_i H_i, H_i = Z_i' diag(signs_i) Z_i with a factor Z_i (C, d).
All H_i live on the joint range of the Z_i, of dimension r <= min(nC, d). In the eigenbasis V of H on that range
F_i = Z_i V is (C, r) and H = diag(h). Outside the range the dynamics is the identity, so nothing is lost.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from core_tensor.checks import check_number, check_tensor
from core_tensor.linalg.spectrum import SymmetricOperator, lanczos
from torch import Tensor


@dataclass(frozen=True)
class CurvatureFamily:
    """Per-sample Hessians H_i = F_i' diag(signs_i) F_i in the eigenbasis of their mean H = diag(h).

    Build one with `from_hessians`, `from_factors` or `from_gram`.

    Attributes:
        h: Eigenvalues of H on the range, largest first, float64, shape (r,).
        factors: F, float64, shape (n, C, r).
        signs: Signs of the factors' rows, shape (n, C); None when every H_i is positive semidefinite.
        sample_curvature: lambda1(H_i), shape (n,).
        truncated: Whether only the top eigenvectors of H were kept. Thresholds are then upper bounds.
    """

    h: Tensor
    factors: Tensor
    signs: Tensor | None
    sample_curvature: Tensor
    truncated: bool = False

    @classmethod
    def from_hessians(cls, hessians: Tensor) -> "CurvatureFamily":
        """Family of dense per-sample Hessians; indefinite ones are allowed.

        Args:
            hessians: H_i, symmetric, shape (n, d, d).

        Returns:
            The family.

        Raises:
            ValueError: If the matrices are not symmetric or not finite.
        """
        check_tensor("hessians", hessians, ndim=3, finite=True, nonempty=True)
        H = hessians.double()
        if H.shape[1] != H.shape[2] or not torch.allclose(H, H.mT, rtol=1e-8, atol=1e-12 * float(H.abs().max())):
            raise ValueError(f"hessians: expected symmetric matrices (n, d, d), got shape {tuple(H.shape)}")
        values, vectors = torch.linalg.eigh((H + H.mT) / 2)  # (n, d), (n, d, d)
        noise = torch.finfo(hessians.dtype).eps * H.shape[1] * values.abs().amax(1, keepdim=True)
        values = torch.where(values.abs() <= noise, 0.0, values)  # rounding must not make a PSD matrix indefinite
        factors = (vectors * values.abs().sqrt()[:, None, :]).mT  # (n, d, d)
        signs = None if bool((values >= 0).all()) else torch.sign(values)
        return cls.from_factors(factors, signs)

    @classmethod
    def from_factors(cls, factors: Tensor, signs: Tensor | None = None) -> "CurvatureFamily":
        """Family of factored Hessians H_i = Z_i' diag(signs_i) Z_i.

        Args:
            factors: Z, shape (n, C, d); for a Gauss-Newton Hessian the weighted output Jacobian.
            signs: Signs of the rows, shape (n, C); None for positive semidefinite H_i.

        Returns:
            The family.

        Raises:
            ValueError: If shapes do not fit or values are not finite.
        """
        check_tensor("factors", factors, ndim=3, finite=True, nonempty=True)
        n, C, d = factors.shape
        flat = factors.double().reshape(n * C, d)
        if d > n * C:
            F = _coordinates(flat @ flat.T, factors.dtype, n)
        else:
            weight, V = torch.linalg.eigh(flat.T @ flat / n)  # of sum_i Z_i'Z_i / n: H itself if there are no signs
            F = (flat @ V[:, _range(weight, factors.dtype, n * C)]).reshape(n, C, -1)
        if signs is not None:
            check_tensor("signs", signs, shape=(n, C))
            signs = signs.double()
            weighted = (F * signs[:, :, None]).reshape(n * C, -1)
            F = F @ torch.linalg.eigh(weighted.T @ F.reshape(n * C, -1) / n)[1]
        return cls._from_reduced(F.flip(2), signs)

    @classmethod
    def from_gram(cls, gram: Tensor, n: int) -> "CurvatureFamily":
        """Family known only through the Gram matrix of its factors, K[ic, jc'] = z_ic . z_jc'.

        Args:
            gram: K, symmetric positive semidefinite, shape (n*C, n*C), sample-major.
            n: Number of samples.

        Returns:
            The family; all it needs is a function of K, at any number of parameters.

        Raises:
            ValueError: If the shape does not fit or values are not finite.
        """
        check_tensor("gram", gram, ndim=2, finite=True, nonempty=True)
        check_number("n", n, low=1, integer=True)
        size = gram.shape[0]
        if gram.shape[1] != size or size % n:
            raise ValueError(f"gram: expected a square matrix with a multiple of n = {n} rows, got {tuple(gram.shape)}")
        return cls._from_reduced(_coordinates(gram.double(), gram.dtype, n).flip(2), None)

    @classmethod
    def _from_reduced(cls, F: Tensor, signs: Tensor | None) -> "CurvatureFamily":
        weighted = F if signs is None else F * signs[:, :, None]
        h = (weighted * F).sum((0, 1)) / len(F)
        return cls(h, F.contiguous(), signs, _largest_eigenvalue(F, signs))

    @property
    def n(self) -> int:
        """Number of samples in the family."""
        return int(self.factors.shape[0])

    @property
    def lambda_max(self) -> float:
        """lambda1(H); zero for a family of zero matrices."""
        return float(self.h.max()) if len(self.h) else 0.0

    @property
    def trace(self) -> float:
        """Trace of H (of its kept part, if truncated)."""
        return float(self.h.sum())

    @property
    def max_sample_curvature(self) -> float:
        """L = max_i lambda1(H_i)."""
        return float(self.sample_curvature.max())

    @cached_property
    def coherence_matrix(self) -> Tensor:
        """S_ij = ||H_i^(1/2) H_j^(1/2)||_F = sqrt(tr H_i H_j), shape (n, n). Source: arXiv 2401.12332, Def. 1."""
        _refuse_indefinite(self)
        n, C, r = self.factors.shape
        flat = self.factors.reshape(n * C, r)
        return (flat @ flat.T).square_().reshape(n, C, n, C).sum((1, 3)).clamp_min(0).sqrt()

    @cached_property
    def coherence(self) -> float:
        """The paper's sigma = lambda1(S) / max_i lambda1(H_i), between 1 and n for rank-one H_i; NaN if all are 0."""
        if self.max_sample_curvature <= 0:
            return float("nan")
        return float(torch.linalg.eigvalsh(self.coherence_matrix)[-1]) / self.max_sample_curvature

    @cached_property
    def mean_square(self) -> Tensor:
        """The mean of H_i^2, shape (r, r)."""
        return self.noise(torch.eye(len(self.h), dtype=torch.float64, device=self.h.device))

    @cached_property
    def largest_deviation(self) -> float:
        """max_i ||H_i - H||_2 over the four most curved samples, by Lanczos: from below. H_i positive semidefinite."""
        _refuse_indefinite(self)
        return max(_deviation(self.factors[i], self.h) for i in self.sample_curvature.topk(min(4, self.n)).indices)

    def noise(self, M: Tensor) -> Tensor:
        """The mean of H_i M H_i.

        Args:
            M: Symmetric matrix in the family's coordinates, shape (r, r).

        Returns:
            (1/n) sum_i H_i M H_i, shape (r, r).
        """
        n, C, r = self.factors.shape
        flat = self.factors.reshape(n * C, r)
        blocks = torch.bmm((flat @ M).reshape(n, C, r), self.factors.mT)  # F_i M F_i', (n, C, C)
        if self.signs is not None:
            blocks = blocks * self.signs[:, :, None] * self.signs[:, None, :]
        return flat.T @ torch.bmm(blocks, self.factors).reshape(n * C, r) / n

    def truncate(self, k: int) -> "CurvatureFamily":
        """Keep the k top eigenvectors of H: thresholds become certified upper bounds.

        Args:
            k: Number of eigenvectors.

        Returns:
            The compressed family, with the per-sample curvatures of the whole one.
        """
        check_number("k", k, low=1, integer=True)
        if k >= len(self.h):
            return self
        return replace(self, h=self.h[:k], factors=self.factors[:, :, :k].contiguous(), truncated=True)

    def quadratic_forms(self, v: Tensor) -> Tensor:
        """v'H_i v for every sample.

        Args:
            v: Vectors in the columns, in the family's coordinates, shape (r, m).

        Returns:
            Shape (n, m).
        """
        squares = (self.factors @ v).square_()  # (n, C, m)
        return squares.sum(1) if self.signs is None else (squares * self.signs[:, :, None]).sum(1)

    def hessians(self) -> Tensor:
        """The dense H_i in the family's coordinates; n r^2 numbers.

        Returns:
            Shape (n, r, r).
        """
        weighted = self.factors if self.signs is None else self.factors * self.signs[:, :, None]
        return weighted.mT @ self.factors


def _refuse_indefinite(family: CurvatureFamily) -> None:
    if family.signs is not None:
        raise ValueError("coherence: expected positive semidefinite per-sample Hessians, got indefinite ones")


def _deviation(F: Tensor, h: Tensor) -> float:
    # ||F'F - diag(h)||_2 from below: the larger end of the spectrum, each end by Lanczos from F's own direction.
    start = torch.linalg.svd(F, full_matrices=False).Vh[0]
    top = torch.zeros_like(h)
    top[0] = 1.0  # H's own top direction

    def end(sign: float, begin: Tensor) -> float:
        operator = SymmetricOperator(lambda v: sign * (F.T @ (F @ v) - h * v), len(h), torch.float64, h.device)
        return float(lanczos(operator, tolerance=1e-8, max_steps=40, start=begin).values[0])

    return max(end(1.0, start), end(-1.0, top))


def _coordinates(K: Tensor, dtype: torch.dtype, n: int) -> Tensor:
    # Factors with the Gram matrix K, in orthonormal coordinates of their range, shape (n, C, r).
    lam, U = torch.linalg.eigh((K + K.T) / 2)
    kept = _range(lam, dtype, len(K))
    factors: Tensor = (U[:, kept] * lam[kept].sqrt()).reshape(n, len(K) // n, -1)
    return factors


def _range(eigenvalues: Tensor, dtype: torch.dtype, size: int) -> Tensor:
    # Which eigenvalues exceed the rounding of a matrix computed in `dtype`.
    top = eigenvalues.max().clamp_min(0)
    return (eigenvalues > torch.finfo(dtype).eps * size * top) & (eigenvalues > 0)


def _largest_eigenvalue(F: Tensor, signs: Tensor | None) -> Tensor:
    # lambda1(F_i' diag(signs_i) F_i) through the (C, C) or (r, r) matrix, whichever is smaller; shape (n,).
    n, C, r = F.shape
    if r == 0:
        return torch.zeros(n, dtype=torch.float64)
    if signs is None:
        small = F @ F.mT if r >= C else F.mT @ F
        top: Tensor = torch.linalg.eigvalsh(small)[:, -1].clamp_min(0)
    else:
        top = torch.linalg.eigvalsh((F * signs[:, :, None]).mT @ F)[:, -1]
    return top
