r"""Gaussians by a factor of their covariance, and the polar factor of a matrix.

A Gaussian is held as its mean, a factor $F$ (k x d) and a scale $s$ with $\Sigma = F^T F / s^2$: n - 1 rows that a
Householder reflection makes of n centred ones, their QR factor, or a Cholesky factor, so that $F$ has full rank unless
the sample itself is degenerate. With two of them the trace of the root is a nuclear norm,
$\operatorname{tr}(\Sigma_x \Sigma_y)^{1/2} = \lVert F_y F_x^T \rVert_* / (s_x s_y)$, so neither a covariance nor the
root of a non-symmetric product is ever formed.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factor:
    """A Gaussian by its mean and a factor of its covariance, in float64.

    Attributes:
        mean: Mean, shape (d,).
        factor: F with covariance FᵀF / scale², shape (k, d).
        scale: s: sqrt(n - ddof) for the factor of n centred rows, 1 for a factor of the covariance itself.
        basis: Q of a sample of more than d + 1 rows (rows = QF), shape (n, k); None for one of fewer rows.
    """

    mean: Tensor
    factor: Tensor
    scale: float = 1.0
    basis: Tensor | None = None

    def trace(self) -> Tensor:
        """Trace of the covariance.

        Returns:
            A scalar.
        """
        flat = self.factor.flatten()
        return flat.dot(flat) / self.scale**2

    def size(self) -> float:
        """Largest absolute entry of the factor of the covariance.

        Returns:
            A number, 0 for a point mass.
        """
        low, high = self.factor.aminmax()  # one pass, a tenth of the time of the infinity norm
        return max(-float(low), float(high)) / self.scale

    def divided(self, unit: float) -> "Factor":
        """The same Gaussian in another unit.

        Args:
            unit: The new unit, in old ones.

        Returns:
            Mean and factor divided by the unit.
        """
        return replace(self, mean=self.mean / unit, factor=self.factor / unit)

    def to_rows(self, gradient: Tensor, towards: Tensor) -> Tensor:
        """Chain a gradient in the factor of a sample, and one in its mean, to a gradient in the sample.

        Args:
            gradient: Gradient in the factor, shape (k, d).
            towards: Gradient in the mean, shape (d,).

        Returns:
            Gradient in the sample, shape (n, d).
        """
        if self.basis is not None:
            rows = self.basis @ gradient  # (n, d)
            return rows.add_(towards / rows.shape[0] - rows.mean(0))
        n = gradient.shape[0] + 1
        first = gradient.sum(0) / n**0.5  # the reflection is its own inverse, and its result is centred
        rows = gradient.new_empty(n, gradient.shape[1])
        torch.add(towards / n, first, out=rows[0])
        torch.add(gradient, towards / n - first / (n**0.5 - 1), out=rows[1:])
        return rows


def factor_of_sample(x: Tensor, ddof: int, with_basis: bool = True) -> Factor:
    r"""Factor of a sample: n - 1 reflected rows when n - 1 <= d, the R of the centred rows' QR decomposition otherwise.

    The Householder reflection that takes $(1, \dots, 1) / \sqrt n$ to the first axis takes the centred rows to a zero
    row, which is left out, and to $x_i - \bar x + (x_1 - \bar x) / (\sqrt n - 1)$, $i > 1$: the same scatter without
    the direction that centring empties.

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
    rest = centred.mean(0)  # a second pass: with a mean of 1e8 the first leaves 1e-8 behind
    mean, scale = mean + rest, float(n - ddof) ** 0.5
    if n - 1 <= d:
        return Factor(mean, centred[1:].add_((centred[0] - rest) / (n**0.5 - 1) - rest), scale)
    centred -= rest
    if not with_basis:
        return Factor(mean, torch.linalg.qr(centred, mode="r").R, scale)
    q, r = torch.linalg.qr(centred)  # (n, d), (d, d)
    return Factor(mean, r, scale, q)


def triangular_root(covariance: Tensor) -> Tensor:
    """Upper triangular F with FᵀF = Σ: Cholesky, or the clamped eigendecomposition's QR where that fails.

    Args:
        covariance: Covariance, shape (d, d), symmetric; negative eigenvalues are taken as round-off of zero.

    Returns:
        F, shape (d, d), float64.
    """
    covariance = covariance.detach().double()
    lower, info = torch.linalg.cholesky_ex(covariance)
    root: Tensor = lower.mT
    if int(info):
        values, vectors = torch.linalg.eigh((covariance + covariance.mT) / 2)
        root = torch.linalg.qr((vectors * values.clamp_min(0).sqrt()).mT, mode="r").R
    return root


def congruence(root: Tensor, covariance: Tensor) -> Tensor:
    """The lower triangle of F Σ Fᵀ for an upper triangular F, at 2/5 of the flops of two full products.

    Args:
        root: F, upper triangular, shape (d, d).
        covariance: Σ, symmetric, shape (d, d).

    Returns:
        Shape (d, d); entries above the diagonal blocks are zero.
    """
    d = root.shape[0]
    step = max(64, -(-d // 8))
    panels = [slice(j, j + step) for j in range(0, d, step)]
    half = torch.empty_like(covariance)  # Σ Fᵀ
    for panel in panels:
        half[:, panel] = covariance[:, panel.start :] @ root[panel, panel.start :].mT
    product = torch.zeros_like(covariance)
    for panel in panels:
        product[panel, : panel.stop] = root[panel, panel.start :] @ half[panel.start :, : panel.stop]
    return product


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


_NARROW, _OVERLAP = 3e-4, 1e-5


def polar_gram(cross: Tensor) -> tuple[Tensor, Tensor]:
    r"""Nuclear norm and polar factor from the eigenvectors V of CᵀC, or by an SVD where C is nearly rank-deficient.

    The columns of $W = C V = U D$ (D their lengths) are orthogonal up to round-off times the squared condition number,
    $U^T U = I + E$. The nuclear norm is the sum of the lengths up to $E^2$, the polar factor $U V^T$ up to E, and
    $U (I - E \circ [d_i / (d_i + d_j)]) V^T$ up to $E^2$. So the factor is corrected where E may exceed 1e-9 (a
    condition number above 3e3), and left to the SVD where it exceeds 1e-5 (above some 1e5, or a zero column).

    Args:
        cross: Matrix, shape (k, l).

    Returns:
        Nuclear norm, a scalar, and the polar factor, shape (k, l).
    """
    if cross.shape[0] < cross.shape[1]:
        norm, polar = polar_gram(cross.mT)
        return norm, polar.mT
    vectors = torch.linalg.eigh(cross.mT @ cross).eigenvectors
    u = cross @ vectors
    lengths = torch.linalg.vector_norm(u, dim=0)
    u /= lengths
    if not float(lengths.min() / lengths.max()) > _NARROW:
        overlap = u.mT @ u  # NaN for a column of zeros
        overlap.diagonal().sub_(1)
        if not float(overlap.abs().max()) <= _OVERLAP:
            return polar_svd(cross)
        u -= u @ overlap.mul_(lengths[:, None] / (lengths[:, None] + lengths))
    return lengths.sum(), u @ vectors.mT


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
    tiny = torch.finfo(x.dtype).tiny
    x = x / x.abs().max().clamp_min(tiny)  # first, because the norm of 1e-200 is zero
    x = x / (x.norm() * 1.01).clamp_min(tiny)
    for step in range(steps):
        a, b, c = _QUINTIC[step] if step < len(_QUINTIC) else _POLISH
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    polar = x.mT if cross.shape[0] > cross.shape[1] else x
    return (polar * cross).sum(), polar
