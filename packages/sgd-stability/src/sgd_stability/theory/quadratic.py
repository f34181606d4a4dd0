r"""Families of quadratics: constructions with chosen sharpness and coherence, exact growth, simulation.

The losses are l_i(w) = w'H_i w / 2 with the common minimum 0, on which linearised SGD is SGD itself.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from core_tensor.checks import check_choice, check_number, check_tensor
from torch import Tensor

from sgd_stability.theory.family import CurvatureFamily
from sgd_stability.theory.sampling import Sampling
from sgd_stability.theory.second_moment import second_moment_step

Alignment = Literal["isotropic", "aligned", "clustered", "dominant"]


def grouped_hessians(n: int, sigma: int, lambda1: float = 1.0) -> Tensor:
    """Theorem 2's family: floor(n / sigma) groups of sigma identical rank-one H_i; left-over samples have H_i = 0.

    Its Bernoulli threshold is 2 sigma / (lambda1 (sigma + n/B - 1)) exactly.

    Args:
        n: Number of samples.
        sigma: Coherence, a whole number from 1 to n.
        lambda1: Largest eigenvalue of H.

    Returns:
        H_i = (n lambda1 / sigma) e_g e_g', shape (n, n // sigma, n // sigma).

    Source:
        arXiv 2401.12332, Theorem 2 (proof).
    """
    check_number("n", n, low=1, integer=True)
    check_number("sigma", sigma, low=1, high=n, integer=True)
    check_number("lambda1", lambda1, low=0, open_low=True)
    groups = n // sigma
    H = torch.zeros(n, groups, groups, dtype=torch.float64)
    for i in range(groups * sigma):
        H[i, i // sigma, i // sigma] = n * lambda1 / sigma
    return H


def make_hessians(n: int, d: int, sigma: float, lambda1: float = 1.0, *, seed: int = 0) -> Tensor:
    """Rank-one H_i of any coherence: directions on a cone that closes around a common axis as sigma grows.

    Args:
        n: Number of samples.
        d: Dimension.
        sigma: Coherence; from 1 (orthogonal, needs d >= n) to n (identical). The least reachable value for d < n is
            n / d on average and depends on the directions drawn.
        lambda1: Largest eigenvalue of H.
        seed: Seed of the directions.

    Returns:
        Hessians with exactly this coherence and sharpness, float64, shape (n, d, d).

    Raises:
        ValueError: If no cone of these directions has so small a coherence.
    """
    check_number("n", n, low=1, integer=True)
    check_number("d", d, low=1, integer=True)
    check_number("sigma", sigma, low=1, high=n)
    check_number("lambda1", lambda1, low=0, open_low=True)
    generator = torch.Generator().manual_seed(seed)
    square, _ = torch.linalg.qr(torch.randn(max(n, d), max(n, d), generator=generator, dtype=torch.float64))
    away = square[:n, :d] / square[:n, :d].norm(dim=1, keepdim=True)  # orthonormal if d >= n
    axis = away.sum(0) / away.sum(0).norm()

    def directions(t: float) -> Tensor:
        x: Tensor = (1 - t) * away + t * axis  # (n, d)
        unit: Tensor = x / x.norm(dim=1, keepdim=True)
        return unit

    def coherence(t: float) -> float:
        return float(torch.linalg.eigvalsh((directions(t) @ directions(t).T).abs())[-1])  # S for unit rank-one H_i

    low, high = 0.0, 1.0
    if coherence(low) > sigma * (1 + 1e-9):
        raise ValueError(f"sigma: expected at least {coherence(low):.4g} at n = {n}, d = {d}, seed {seed}, got {sigma}")
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if coherence(middle) < sigma else (low, middle)
    x = directions(high)
    scale = lambda1 / float(torch.linalg.eigvalsh(x.T @ x / n)[-1])
    return scale * x[:, :, None] * x[:, None, :]


def random_hessians(n: int, d: int, rank: int, alignment: Alignment, *, seed: int = 0) -> Tensor:
    """Random positive semidefinite families that probe different regimes of the bounds.

    Args:
        n: Number of samples.
        d: Dimension.
        rank: Rank of every H_i, 1 to d.
        alignment: `"isotropic"`, `"aligned"` (one shared direction), `"clustered"` (three shared directions) or
            `"dominant"` (sizes over several orders of magnitude).
        seed: Seed.

    Returns:
        Hessians, float64, shape (n, d, d).
    """
    check_choice("alignment", alignment, ("isotropic", "aligned", "clustered", "dominant"))
    check_number("rank", rank, low=1, high=d, integer=True)
    generator = torch.Generator().manual_seed(seed)
    Z = torch.randn(n, rank, d, generator=generator, dtype=torch.float64)
    if alignment == "aligned":
        Z = 0.2 * Z + torch.randn(1, 1, d, generator=generator, dtype=torch.float64)
    elif alignment == "clustered":
        centres = torch.randn(3, rank, d, generator=generator, dtype=torch.float64)
        Z = 0.05 * Z + centres[torch.randint(3, (n,), generator=generator)]
    elif alignment == "dominant":
        Z = Z * torch.exp(1.5 * torch.randn(n, 1, 1, generator=generator, dtype=torch.float64))
    return Z.mT @ Z


def second_moment_matrix(hessians: Tensor, lr: float, sampling: Sampling) -> Tensor:
    """T as a dense d^2 x d^2 matrix, the ground truth for small d.

    Args:
        hessians: H_i, shape (n, d, d).
        lr: Learning rate eta.
        sampling: Minibatch scheme.

    Returns:
        Matrix acting on vec(M), shape (d^2, d^2).
    """
    check_tensor("hessians", hessians, ndim=3, finite=True)
    n, d, _ = hessians.shape
    H, eye = hessians.mean(0), torch.eye(d, dtype=hessians.dtype)
    noise = torch.einsum("iab,icd->acbd", hessians, hessians).reshape(d * d, d * d) / n
    return (
        torch.eye(d * d, dtype=hessians.dtype)
        - lr * (torch.kron(H, eye) + torch.kron(eye, H))
        + lr**2 * (sampling.a * torch.kron(H, H) + sampling.s * noise)
    )


@dataclass(frozen=True)
class Growth:
    """E||delta_t||^2 for t = 0..steps from a standard normal start on the range of H, divided by its value at t = 0.

    Attributes:
        exact: tr T^t(I) / r, shape (steps + 1,).
        simulated: Mean over the paths, shape (steps + 1,).
        standard_error: Of that mean, shape (steps + 1,).
    """

    exact: Tensor
    simulated: Tensor
    standard_error: Tensor


def simulate(
    family: CurvatureFamily, lr: float, sampling: Sampling, *, steps: int, paths: int = 1000, seed: int = 0
) -> Growth:
    """Run linearised SGD and set its second moment beside the exact one.

    Args:
        family: The per-sample Hessians.
        lr: Learning rate eta.
        sampling: Minibatch scheme; its n is the family's.
        steps: Steps per path.
        paths: Independent paths.
        seed: Seed of starts and minibatches.

    Returns:
        Both growth curves.

    Raises:
        ValueError: If the sampling's n is not the family's.
    """
    check_number("lr", lr, low=0, open_low=True)
    check_number("steps", steps, low=1, integer=True)
    check_number("paths", paths, low=2, integer=True)
    if sampling.n != family.n:
        raise ValueError(f"sampling: expected n = {family.n}, the family's, got {sampling.n}")
    r = len(family.h)
    generator = torch.Generator().manual_seed(seed)
    delta = torch.randn(paths, r, generator=generator, dtype=torch.float64)
    M = torch.eye(r, dtype=torch.float64)
    exact, mean, error = [1.0], [], []
    for step in range(steps + 1):
        squares = delta.square().sum(1) / r
        mean.append(float(squares.mean()))
        error.append(float(squares.std()) / math.sqrt(paths))
        if step < steps:
            M = second_moment_step(family, M, lr, sampling)
            exact.append(float(M.trace()) / r)
            delta = delta - lr * minibatch_product(family, sampling.draw(paths, generator), delta)
    return Growth(*(torch.tensor(values, dtype=torch.float64) for values in (exact, mean, error)))


def minibatch_product(family: CurvatureFamily, weights: Tensor, delta: Tensor) -> Tensor:
    """G delta for one minibatch per path.

    Args:
        family: The per-sample Hessians.
        weights: Minibatch weights of `Sampling.draw`, shape (paths, n).
        delta: One vector per path, shape (paths, r).

    Returns:
        sum_i w_i H_i delta, shape (paths, r).
    """
    n, C, r = family.factors.shape
    flat = family.factors.reshape(n * C, r)
    images = (delta @ flat.T).reshape(-1, n, C) * weights[:, :, None]  # (paths, n, C)
    if family.signs is not None:
        images = images * family.signs
    return images.reshape(len(delta), n * C) @ flat
