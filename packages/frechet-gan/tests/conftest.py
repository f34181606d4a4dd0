"""Oracles and samples that several test files share."""

import mpmath
import pytest
import torch


def _mp_distance(x, y, ddof):
    """Frechet distance in 60 digits: eigenvalues of C C' for the cross matrix C of the centred samples."""
    sides = []
    for rows in (x, y):
        m = mpmath.matrix(rows)
        mean = [mpmath.fsum(m[i, j] for i in range(m.rows)) / m.rows for j in range(m.cols)]
        scale = mpmath.sqrt(m.rows - ddof)
        sides.append((mean, mpmath.matrix(m.rows, m.cols)))
        for i in range(m.rows):
            for j in range(m.cols):
                sides[-1][1][i, j] = (m[i, j] - mean[j]) / scale
    (mean_x, a), (mean_y, b) = sides
    cross = a * b.T if a.rows <= b.rows else b * a.T
    values = mpmath.eigsy(cross * cross.T, eigvals_only=True)
    root = mpmath.fsum(mpmath.sqrt(max(v, mpmath.mpf(0))) for v in values)
    squares = mpmath.fsum(v * v for m in (a, b) for v in m)
    return mpmath.fsum((p - q) ** 2 for p, q in zip(mean_x, mean_y, strict=True)) + squares - 2 * root


@pytest.fixture(scope="session")
def mp_frechet():
    """Value and gradient in y of the Frechet distance, in 60 digits, as float64 tensors."""

    def oracle(x, y, ddof=1):
        with mpmath.workdps(60):
            xs, ys = x.double().tolist(), y.double().tolist()
            value = _mp_distance(xs, ys, ddof)
            gradient = torch.empty(y.shape, dtype=torch.float64)
            step = mpmath.mpf(10) ** -15
            for i in range(len(ys)):
                for j in range(len(ys[0])):
                    ends = []
                    for sign in (1, -1):
                        moved = [list(map(mpmath.mpf, row)) for row in ys]
                        moved[i][j] += sign * step
                        ends.append(_mp_distance(xs, moved, ddof))
                    gradient[i, j] = float((ends[0] - ends[1]) / (2 * step))
            return float(value), gradient

    return oracle


@pytest.fixture(scope="session")
def samples():
    """Two Gaussian samples with a decaying spectrum and different means."""

    def make(n, m, d, seed=0, dtype=torch.float64):
        generator = torch.Generator().manual_seed(seed)
        spectrum = torch.arange(1, d + 1, dtype=torch.float64) ** -0.5
        x = torch.randn(n, d, dtype=torch.float64, generator=generator) * spectrum
        y = torch.randn(m, d, dtype=torch.float64, generator=generator) * spectrum.flip(0) * 1.2 + 0.3
        return x.to(dtype), y.to(dtype)

    return make
