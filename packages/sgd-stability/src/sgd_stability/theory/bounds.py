r"""Cheap bounds on the threshold eta*, each with the side it certifies and the schemes it holds for.

Symbols as in `sgd_stability.theory.second_moment`; lambda1 = lambda1(H), L = max_i lambda1(H_i), sigma the coherence,
r = n/B - 1, c = s/n with n the size of the whole data set. All need positive semidefinite H_i.

A bound certifies only for the data it saw: on a subsample L is an underestimate, and every bound is an estimate.

Departure: Theorems 1 and 2 of the paper are for Bernoulli sampling; without replacement Theorem 1 fails, and with
replacement the stability bounds with a = 1 fail. The forms here carry a and s and hold for all three schemes;
`tests/test_stability_bounds.py` shows a counterexample to the paper's form.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from core_tensor.checks import check_tensor
from core_tensor.linalg.spectrum import SymmetricOperator, lanczos
from torch import Tensor

from sgd_stability.theory.dynamics import Update
from sgd_stability.theory.family import CurvatureFamily
from sgd_stability.theory.sampling import Sampling

Side = Literal["stable_below", "unstable_above", "heuristic"]


@dataclass(frozen=True)
class Bound:
    """A learning rate and what it says about stability.

    Attributes:
        name: Which bound.
        lr: The learning rate.
        side: `"stable_below"`: every rate below is mean-square stable. `"unstable_above"`: every rate above is
            unstable. `"heuristic"`: no guarantee under this sampling scheme.
    """

    name: str
    lr: float
    side: Side


def _over(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else math.inf


def gradient_descent_edge(lambda1: float) -> Bound:
    """Unstable above 2 / lambda1(H), whatever the batch size.

    Args:
        lambda1: Largest eigenvalue of H.

    Returns:
        The bound.
    """
    return Bound("gradient_descent", _over(2, lambda1), "unstable_above")


def curvature_stability(lambda1: float, L: float, sampling: Sampling) -> Bound:
    """Stable if eta < 2 / (a lambda1 + s L): two numbers suffice (bound 2).

    For Bernoulli sampling this is Theorem 2's formula 2 sigma~ / (lambda1 (sigma~ + r)) with sigma~ = n lambda1 / L,
    a guarantee for every family, where the theorem states existence.

    Args:
        lambda1: Largest eigenvalue of H.
        L: Largest eigenvalue of any H_i.
        sampling: Minibatch scheme.

    Returns:
        The bound.
    """
    return Bound("curvature", _over(2, sampling.a * lambda1 + sampling.s * L), "stable_below")


def momentum_stability(lambda1: float, L: float, sampling: Sampling, update: Update) -> Bound:
    """Stable if s L h K_hh(eta) < 1 for all 0 < h <= lambda1, and eta is below the full-batch edge.

    Follows from N(I) <= s L H and the response kernel K being positive semidefinite. For heavy ball with dampening tau
    that is eta (1 - tau) (lambda1 + s L (1 + beta) / (1 - beta)) < 2 (1 + beta); for Nesterov momentum and weight decay
    the first crossing is found on a grid.

    Args:
        lambda1: Largest eigenvalue of H.
        L: Largest eigenvalue of any H_i.
        sampling: Minibatch scheme.
        update: Update rule.

    Returns:
        The bound.
    """
    if update.plain:
        return curvature_stability(lambda1, L, sampling)
    return Bound("curvature", stable_below(lambda1 * _GRID, sampling.s * L, update), "stable_below")


_GRID = torch.logspace(-6, 0, 61, dtype=torch.float64)
"""Shares of lambda1 at which the response of all smaller eigenvalues is looked at."""


def stable_below(h: Tensor, noise: float, update: Update) -> float:
    """The least rate at which noise * max_h h K_hh(eta) reaches 1; the edge of full-batch training at most.

    Args:
        h: Eigenvalues, the largest of them last, shape (m,).
        noise: Gain of the noise, s L.
        update: Update rule.

    Returns:
        The rate: in closed form for heavy ball, from below on a grid for Nesterov momentum and weight decay.
    """
    top = float(h[-1])
    if not update.nesterov and update.weight_decay == 0:
        beta = update.momentum
        return _over(2 * (1 + beta), (1 - update.dampening) * (top + max(noise, 0.0) * (1 + beta) / (1 - beta)))
    edge = update.edge(top)
    if noise <= 0 or top <= 0 or math.isinf(edge):
        return edge
    low, high = -14.0, 14.0  # of x in eta = edge / (1 + exp(-x)), in which the gain is nearly a straight line
    for _ in range(3):
        x = torch.linspace(low, high, 57, dtype=torch.float64)
        crossed = (noise * _gains(h, edge * torch.sigmoid(x), update) >= 1).nonzero()
        if len(crossed) == 0:
            low = high  # below the edge nothing crosses
            break
        first = int(crossed[0])
        low, high = float(x[max(first - 1, 0)]), float(x[first])
    return edge / (1 + math.exp(-low))


def noise_limit(lambda1: float, lr: float, update: Update) -> float:
    """The gain of the noise s L below which `momentum_stability` calls a rate stable, for all batch sizes at once.

    Args:
        lambda1: Largest eigenvalue of H.
        lr: Learning rate.
        update: Update rule, not plain SGD.

    Returns:
        The limit; not above 0 where even the full batch is unstable.
    """
    edge = update.edge(lambda1)
    if lr <= 0 or math.isinf(edge):
        return math.inf
    if lr >= edge:
        return 0.0
    if not update.nesterov and update.weight_decay == 0:
        beta = update.momentum
        return (2 * (1 + beta) / (lr * (1 - update.dampening)) - lambda1) * (1 - beta) / (1 + beta)
    rates = edge * torch.sigmoid(torch.linspace(-14.0, math.log(lr / (edge - lr)), 57, dtype=torch.float64))
    return 1 / float(_gains(lambda1 * _GRID, rates, update).max())


def _gains(h: Tensor, rates: Tensor, update: Update) -> Tensor:
    """Max over h of h K_hh, shape of the rates."""
    return (h * update.response_to_itself(rates[:, None], h)).amax(1)


def lyapunov_stability(family: CurvatureFamily, sampling: Sampling) -> Bound:
    """Stable if eta < 2 / lambda1(H^(-1/2) (a H^2 + s mean(H_i^2)) H^(-1/2)) on range(H) (bound 3).

    Args:
        family: The per-sample Hessians, positive semidefinite and not truncated.
        sampling: Minibatch scheme.

    Returns:
        The bound.

    Raises:
        ValueError: If the family is indefinite or truncated.
    """
    _check_psd(family)
    if family.truncated:
        raise ValueError("family: expected all eigenvectors of H, a truncated family certifies no stability")
    if len(family.h) == 0:
        return Bound("lyapunov", math.inf, "stable_below")
    root = family.h.rsqrt()
    matrix = sampling.a * torch.diag(family.h) + sampling.s * root[:, None] * family.mean_square * root
    operator = SymmetricOperator(lambda v: matrix @ v, len(matrix), torch.float64, matrix.device)
    start = torch.ones_like(root) + matrix.diagonal()
    top = lanczos(operator, tolerance=1e-10, max_steps=200, start=start)
    largest = float(top.values[0] + top.residuals[0])  # from above, as a certificate of stability must be
    return Bound("lyapunov", 2 / largest, "stable_below")


def rayleigh_instability(v_H_v: Tensor, forms: Tensor, sampling: Sampling) -> Bound:
    """Unstable if eta > 2 v'Hv / (a (v'Hv)^2 + s mean (v'H_i v)^2), for any unit v (bound 4); the best v wins.

    Args:
        v_H_v: v'Hv for m unit vectors, shape (m,).
        forms: v'H_i v, shape (n, m).
        sampling: Minibatch scheme.

    Returns:
        The bound.

    Raises:
        ValueError: If shapes do not fit.
    """
    check_tensor("forms", forms, ndim=2, nonempty=True)
    check_tensor("v_H_v", v_H_v, shape=(forms.shape[1],))
    denominator = sampling.a * v_H_v.square() + sampling.s * forms.square().mean(0)
    rates = torch.where(denominator > 0, 2 * v_H_v / denominator, math.inf)
    return Bound("rayleigh", max(float(rates.min()), 0.0), "unstable_above")


def sample_instability(family: CurvatureFamily, sampling: Sampling) -> Bound:
    """Unstable if one sample alone throws the iterate out (bound 1).

    Bernoulli: eta > n / (L sqrt(r)). Otherwise: eta > 1 / (sqrt(c) max_i ||H_i - H||_2).

    Args:
        family: The per-sample Hessians; compressing them to a subspace of H keeps the bound valid.
        sampling: Minibatch scheme.

    Returns:
        The bound.
    """
    if sampling.s == 0.0 or len(family.h) == 0:
        return Bound("sample", math.inf, "unstable_above")
    weight = math.sqrt(sampling.n / sampling.s)
    if sampling.scheme == "bernoulli":
        return Bound("sample", _over(weight, family.max_sample_curvature), "unstable_above")
    return Bound("sample", _over(weight, family.largest_deviation), "unstable_above")


def paper_instability(lambda1: float, sigma: float, sampling: Sampling) -> Bound:
    """Theorem 1: diverges if lambda1 > 2/eta or lambda1 > (sigma/eta) (n/B - 1)^(-1/2).

    Strict: n = 2, B = 1, H_i = e_i e_i', eta = 2 meets the second with equality and stays bounded.

    Args:
        lambda1: Largest eigenvalue of H.
        sigma: Coherence.
        sampling: Minibatch scheme; the theorem is about Bernoulli sampling and a heuristic otherwise.

    Returns:
        The bound.

    Source:
        arXiv 2401.12332, Theorem 1.
    """
    rates = [_over(2, lambda1)]
    if sampling.r > 0 and lambda1 > 0:
        rates.append(sigma / (lambda1 * math.sqrt(sampling.r)))
    return Bound("paper_theorem1", min(rates), "unstable_above" if sampling.scheme == "bernoulli" else "heuristic")


def paper_stability(lambda1: float, sigma: float, sampling: Sampling) -> Bound:
    """Theorem 2: below 2 sigma / (lambda1 (sigma + n/B - 1)) some family of this lambda1 and sigma is stable.

    Args:
        lambda1: Largest eigenvalue of H.
        sigma: Coherence.
        sampling: Minibatch scheme.

    Returns:
        The rate; an existence statement, so never a guarantee for the family at hand.

    Source:
        arXiv 2401.12332, Theorem 2.
    """
    return Bound("paper_theorem2", _over(2 * sigma, lambda1 * (sigma + sampling.r)), "heuristic")


def all_bounds(family: CurvatureFamily, sampling: Sampling, *, vectors: int = 8) -> tuple[Bound, ...]:
    """Every bound that applies to a family, best certificates included.

    Args:
        family: The per-sample Hessians, positive semidefinite. If truncated, no bound certifies stability.
        sampling: Minibatch scheme.
        vectors: How many eigenvectors of H, and top eigenvectors of the most curved H_i, the Rayleigh bound tries.

    Returns:
        The bounds.
    """
    _check_psd(family)
    lambda1, L = family.lambda_max, family.max_sample_curvature
    bounds = [gradient_descent_edge(lambda1), sample_instability(family, sampling)]
    if len(family.h):
        v = rayleigh_vectors(family, vectors)
        bounds.append(
            rayleigh_instability((v.square() * family.h[:, None]).sum(0), family.quadratic_forms(v), sampling)
        )
    if not family.truncated:
        bounds += [curvature_stability(lambda1, L, sampling), lyapunov_stability(family, sampling)]
    if not math.isnan(family.coherence):
        sigma = family.coherence
        bounds += [paper_instability(lambda1, sigma, sampling), paper_stability(lambda1, sigma, sampling)]
    return tuple(bounds)


def rayleigh_vectors(family: CurvatureFamily, count: int) -> Tensor:
    """Unit vectors worth trying: top eigenvectors of H, and the top eigenvector of each of the most curved H_i.

    Args:
        family: The per-sample Hessians.
        count: How many of either kind.

    Returns:
        Columns, shape (r, at most 2 count).
    """
    r = len(family.h)
    of_mean = torch.eye(r, min(count, r), dtype=torch.float64, device=family.h.device)
    worst = family.sample_curvature.topk(min(count, family.n)).indices
    of_samples = torch.linalg.svd(family.factors[worst], full_matrices=False).Vh[:, 0].T  # (r, count)
    return torch.cat([of_mean, of_samples], 1)


def _check_psd(family: CurvatureFamily) -> None:
    if family.signs is not None:
        raise ValueError("family: expected positive semidefinite per-sample Hessians, got indefinite ones")
