r"""Gaussians by a factor of their covariance, and the trace of the root of a product of two covariances.

A sample $X$ (n x d) is held as its mean and a factor $F$ (k x d, $k \le \min(n, d)$) with

$$ \Sigma = F^T F, \qquad X - \mathbf 1 \mu^T = \sqrt{n - \mathrm{ddof}} \; Q F, \qquad Q^T Q = I. $$

With two factors the trace of the root is a nuclear norm,
$\operatorname{tr}(\Sigma_x \Sigma_y)^{1/2} = \lVert F_y F_x^T \rVert_*$, so neither a covariance nor the root of a
non-symmetric product is ever formed and the condition number is never squared.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factor:
    """A Gaussian by its mean and a factor of its covariance, in float64.

    Attributes:
        mean: Mean, shape (d,).
        factor: F with covariance FᵀF, shape (k, d).
        basis: Q of a sample of more rows than columns, shape (n, k); None stands for the identity.
        scale: sqrt(n - ddof) of a sample; 1 for a Gaussian given by its moments.
    """

    mean: Tensor
    factor: Tensor
    basis: Tensor | None = None
    scale: float = 1.0

    def to_rows(self, gradient: Tensor, towards: Tensor) -> Tensor:
        """Chain a gradient in the factor and in the mean to a gradient in the sample.

        Args:
            gradient: Gradient in the factor, shape (k, d).
            towards: Gradient in the mean, shape (d,).

        Returns:
            Gradient in the sample, shape (n, d).
        """
        rows = gradient if self.basis is None else self.basis @ gradient  # (n, d)
        return (rows - rows.mean(0)) / self.scale + towards / rows.shape[0]


def factor_of_sample(x: Tensor, ddof: int, with_basis: bool = True) -> Factor:
    """Factor of a sample: the centred rows themselves when n <= d, the R of their QR decomposition otherwise.

    Args:
        x: Sample, shape (n, d), any floating dtype.
        ddof: The covariance's divisor is n - ddof.
        with_basis: Whether Q is wanted (it carries gradients back to the rows).

    Returns:
        Mean, factor and basis in float64.
    """
    x = x.detach().double()
    n, d = x.shape
    mean = x.mean(0)
    centred = x - mean
    correction = centred.mean(0)  # a second pass: with a mean of 1e8 the first leaves 1e-8 behind
    centred -= correction
    scale = float(n - ddof) ** 0.5
    centred /= scale
    if n <= d:
        return Factor(mean + correction, centred, None, scale)
    if not with_basis:
        return Factor(mean + correction, torch.linalg.qr(centred, mode="r").R, None, scale)
    q, r = torch.linalg.qr(centred)  # (n, d), (d, d)
    return Factor(mean + correction, r, q, scale)


def factor_of_moments(mean: Tensor, covariance: Tensor) -> Factor:
    """Factor of a Gaussian given by its moments: Cholesky, or a clamped eigendecomposition where that fails.

    Args:
        mean: Mean, shape (d,).
        covariance: Covariance, shape (d, d), symmetric; negative eigenvalues are taken as round-off of zero.

    Returns:
        Mean and factor in float64.
    """
    mean, covariance = mean.detach().double(), covariance.detach().double()
    lower, info = torch.linalg.cholesky_ex(covariance)
    if int(info) == 0:
        return Factor(mean, lower.mT)
    values, vectors = torch.linalg.eigh((covariance + covariance.mT) / 2)
    return Factor(mean, (vectors * values.clamp_min(0).sqrt()).mT)


def polar_svd(cross: Tensor) -> tuple[Tensor, Tensor]:
    """Nuclear norm and polar factor of a matrix by an SVD without truncation.

    Dropping small singular values would leave directions without a gradient: with every generated sample alike the
    cross matrix is zero, and only an untruncated decomposition still yields an orthogonal factor to descend by.

    Args:
        cross: Matrix, shape (k, l).

    Returns:
        Nuclear norm, a scalar, and the polar factor UVᵀ, shape (k, l).
    """
    u, s, vh = torch.linalg.svd(cross, full_matrices=False)
    return s.sum(), u @ vh


# Minimax odd quintics x(a + b x^2 + c x^4) that drive [1e-3, 1] to 1 in a few steps (Polar Express, arXiv 2505.16932).
_QUINTIC = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
)
_POLISH = (1.875, -1.25, 0.375)  # the quintic Newton-Schulz step: fixed point 1, order 3


def polar_quintic(cross: Tensor, steps: int = 12) -> tuple[Tensor, Tensor]:
    """Nuclear norm and polar factor by matrix products alone, for devices where an SVD is slow.

    Singular values below about 1e-4 of the largest keep a factor below one, so the value is right to 1e-3 and
    the norm is underestimated, never over; zero singular values stay zero (a collapsed sample gets no escape).

    Args:
        cross: Matrix, shape (k, l).
        steps: Iterations, of three matrix products each.

    Returns:
        Nuclear norm, a scalar, and the approximate polar factor, shape (k, l).
    """
    x = cross.mT if cross.shape[0] > cross.shape[1] else cross
    x = x / (x.norm() * 1.01).clamp_min(torch.finfo(x.dtype).tiny)
    for step in range(steps):
        a, b, c = _QUINTIC[step] if step < len(_QUINTIC) else _POLISH
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    polar = x.mT if cross.shape[0] > cross.shape[1] else x
    return (polar * cross).sum(), polar
