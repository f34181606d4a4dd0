r"""Estimators of the Frechet distance of two laws from finite samples; `rtd` comes with a confidence interval.

The plug-in (FID as commonly reported) is biased upwards by about $c\,d^2/n$. The others remove the bias:

- `fid_inf`: a line through plug-ins of growing subsets against 1/n, read at 1/n = 0.
- `vale2`: Richardson extrapolation that cancels the 1/n and the 1/n² term, from disjoint parts of n, n/2, n/4 rows.
- `rtd`: relative Taylor debiasing. One part of the data is a pilot; in its coordinates both covariances are the
  identity, and the Taylor expansion of the trace of the root is evaluated on the other part by U-statistics, whose
  terms are unbiased. With $h, k$ the relative deviations of the two covariances and $s$ the pilot's singular values,

$$ \operatorname{tr}(\Sigma_x\Sigma_y)^{1/2} \approx \sum_i s_i \bigl(1 + \tfrac12 (h_{ii} + k_{ii})\bigr)
   - \tfrac14 \sum_{ij} \frac{s_i s_j}{s_i + s_j} (h_{ij} - k_{ij})^2 . $$

The plug-in has no interval: around a biased number none would cover the truth. That of `rtd` adds two variances. The
first order is the influence function's, which vanishes where the laws coincide; the second order is that of the
U-statistic of the quadratic term, $2 E[K^2] / n^2$ with the kernel
$K(w, w') = \sum_{ij} \frac{s_i s_j}{s_i + s_j} (w_i w_j - \delta_{ij})(w'_i w'_j - \delta_{ij})$, estimated from random
pairs of rows. (The pilot's own error cancels to second order.)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from core_tensor.checks import check_choice, check_number
from torch import Tensor

from frechet_gan.choices import ESTIMATORS, Estimator
from frechet_gan.frechet.distance import check_sample, frechet_distance
from frechet_gan.frechet.gaussian import gaussian_map
from frechet_gan.frechet.stats import FeatureStats

_FOLDS = 4  # of rtd: the pilot is made of three quarters of the rows


@dataclass(frozen=True)
class Estimate:
    """An estimated Frechet distance.

    Attributes:
        value: The estimate; debiased ones may fall below zero when the laws are (nearly) equal.
        low: Lower end of the confidence interval; None for estimators without one.
        high: Upper end of the confidence interval; None for estimators without one.
        standard_error: Standard error, as far as the influence function gives it; of both orders for `rtd`.
        estimator: Which estimator.
        count_x: Rows of x.
        count_y: Rows of y (0 where its statistics do not say).
    """

    value: float
    low: float | None
    high: float | None
    standard_error: float
    estimator: str
    count_x: int
    count_y: int


def estimate_frechet(
    x: Tensor,
    y: Tensor | FeatureStats,
    estimator: Estimator = "plugin",
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Estimate the Frechet distance between the laws behind two samples.

    Args:
        x: Features, shape (n_x, d).
        y: Features, shape (n_y, d), or the statistics of a reference that is taken as exact.
        estimator: Which estimator; see the module's docstring.
        confidence: Coverage of the interval.
        seed: Shuffles the rows before they are split (`fid_inf`, `vale2` and `rtd`).

    Returns:
        Value, standard error and, for `rtd`, a confidence interval.

    Raises:
        ValueError: For an unknown estimator, bad features, or too few rows: 16 for `fid_inf`, 8 for `vale2`,
            and for `rtd` 4/3 (d + 1) and at least 8, so that its pilots have full rank.

    Source:
        arXiv 1911.07023 (FID∞); arXiv 2610.07114 names VALE and RTD, whose formulas here are derived anew.

    Departure:
        The interval is the delta method's of second order, not the bootstrap's: resampling repeats the plug-in's bias.
    """
    check_choice("estimator", estimator, ESTIMATORS)
    check_number("confidence", confidence, low=0, high=1, open_low=True, open_high=True)
    check_sample("x", x)
    if isinstance(y, Tensor):
        check_sample("y", y)
    generator = torch.Generator().manual_seed(seed)
    left = _shuffle(x, generator)
    right = y if isinstance(y, FeatureStats) else _shuffle(y, generator)
    rows = min(side.shape[0] for side in (left, right) if isinstance(side, Tensor))
    pilot = math.ceil((x.shape[1] + 1) * _FOLDS / (_FOLDS - 1))  # rows that leave every pilot with full rank
    least = {"plugin": 2, "fid_inf": 16, "vale2": 8, "rtd": max(8, pilot)}[estimator]
    if rows < least:
        raise ValueError(f"x, y: expected at least {least} samples for {estimator}, got {rows}")
    function: Callable[[Tensor, Tensor | FeatureStats], float] = {
        "plugin": _plugin,
        "fid_inf": _fid_inf,
        "vale2": _vale2,
        "rtd": _rtd,
    }[estimator]
    value = function(left, right)
    error = standard_error(left, right)
    count = right.count if isinstance(right, FeatureStats) else right.shape[0]
    if estimator != "rtd":
        return Estimate(value, None, None, error, estimator, left.shape[0], count)
    error = math.hypot(error, second_order_error(left, right, generator))
    half = math.sqrt(2) * float(torch.erfinv(torch.tensor(confidence, dtype=torch.float64))) * error
    return Estimate(value, value - half, value + half, error, estimator, left.shape[0], count)


def standard_error(x: Tensor, y: Tensor | FeatureStats) -> float:
    r"""Standard error of the plug-in by its influence function.

    $\varphi_x(u) = 2(\mu_x-\mu_y)^T(u-\mu_x) + (u-\mu_x)^T (I - T_x) (u-\mu_x)$, and likewise for y;
    the variance is $\operatorname{var}\varphi_x / n_x + \operatorname{var}\varphi_y / n_y$.

    Args:
        x: Features, shape (n_x, d).
        y: Features, shape (n_y, d), or statistics taken as exact.

    Returns:
        Standard error.
    """
    sides = [_as_stats(x), _as_stats(y)]
    variance = 0.0
    for sample, own, other in ((x, sides[0], sides[1]), (y, sides[1], sides[0])):
        if isinstance(sample, FeatureStats):
            continue
        transport = gaussian_map(own.mean, own.covariance(), other.mean, other.covariance())
        rows = sample.double() - own.mean
        influence = 2 * rows @ (own.mean - other.mean) + (rows * (rows - rows @ transport.matrix)).sum(1)
        variance += float(influence.var()) / sample.shape[0]
    return math.sqrt(variance)


_PAIRS = 2000  # of rows, over which a squared kernel is averaged


def second_order_error(x: Tensor, y: Tensor | FeatureStats, generator: torch.Generator) -> float:
    """Standard error of `rtd` where the influence function vanishes, from its quadratic term.

    Args:
        x: Features, shape (n_x, d), float64.
        y: Features, shape (n_y, d), float64, or statistics taken as exact.
        generator: Draws pairs of rows.

    Returns:
        Standard error.
    """
    # coordinates in which both covariances are the identity, and the weights of the quadratic term
    stats_x, stats_y = _as_stats(x), _as_stats(y)
    lower = torch.linalg.cholesky(_regular(stats_y.covariance()))
    values, vectors = torch.linalg.eigh(lower.mT @ _regular(stats_x.covariance()) @ lower)
    s = values.clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    weight = s[:, None] * s / (s[:, None] + s)

    def drawn(rows: Tensor | FeatureStats, is_x: bool) -> Tensor:
        assert isinstance(rows, Tensor)
        chosen = torch.randint(0, rows.shape[0], (_PAIRS,), generator=generator).to(rows.device)
        if is_x:
            white: Tensor = (rows[chosen] - stats_x.mean) @ (lower @ vectors) / s
            return white
        solved: Tensor = torch.linalg.solve_triangular(lower, (rows[chosen] - stats_y.mean).mT, upper=False)
        turned: Tensor = solved.mT @ vectors
        return turned

    def kernel_square(a: Tensor, b: Tensor) -> float:
        product, diagonal = a * b, weight.diagonal()
        kernel = ((product @ weight) * product).sum(1) + diagonal.sum()
        kernel -= (a.square() + b.square()) @ diagonal
        return float(kernel.square().mean())

    # the quadratic term is half of U(x, x) + U(y, y) - 2 U(x, y), each averaged over the folds' disjoint held-out rows
    n = x.shape[0]
    variance = _FOLDS * kernel_square(drawn(x, True), drawn(x, True)) / (2 * n**2)
    if isinstance(y, Tensor):
        m = y.shape[0]
        variance += _FOLDS * kernel_square(drawn(y, False), drawn(y, False)) / (2 * m**2)
        variance += _FOLDS * kernel_square(drawn(x, True), drawn(y, False)) / (n * m)
    return math.sqrt(variance)


def debiased_split_distance(x: Tensor, x_other: Tensor, y: Tensor, y_other: Tensor) -> Tensor:
    r"""Energy-like form $d^2(x, y) - \frac12 d^2(x, x') - \frac12 d^2(y, y')$ of four independent samples.

    The bias of the three terms cancels to first order; the value may be negative, and a bias remains for few rows.

    Args:
        x: Sample of the first law, shape (n, d).
        x_other: Another one, independent of x, shape (n, d).
        y: Sample of the second law, shape (n, d).
        y_other: Another one, independent of y, shape (n, d).

    Returns:
        A scalar, differentiable in all four.
    """
    return frechet_distance(x, y) - frechet_distance(x, x_other) / 2 - frechet_distance(y, y_other) / 2


def _shuffle(x: Tensor, generator: torch.Generator) -> Tensor:
    return x.detach()[torch.randperm(x.shape[0], generator=generator).to(x.device)].double()


def _as_stats(x: Tensor | FeatureStats) -> FeatureStats:
    return x if isinstance(x, FeatureStats) else FeatureStats.from_features(x)


def _plugin(x: Tensor, y: Tensor | FeatureStats) -> float:
    return float(frechet_distance(_as_stats(x), _as_stats(y)))


def _part(side: Tensor | FeatureStats, parts: int, index: int) -> Tensor | FeatureStats:
    return side if isinstance(side, FeatureStats) else side.tensor_split(parts)[index]


def _average(x: Tensor, y: Tensor | FeatureStats, parts: int) -> float:
    # Mean plug-in over disjoint parts of both samples
    values = []
    for i in range(parts):
        part = _part(x, parts, i)
        assert isinstance(part, Tensor)
        values.append(_plugin(part, _part(y, parts, i)))
    return sum(values) / parts


def _fid_inf(x: Tensor, y: Tensor | FeatureStats) -> float:
    fractions = torch.linspace(0.25, 1.0, 10, dtype=torch.float64).tolist()
    values = []
    for f in fractions:
        head = x[: math.ceil(f * x.shape[0])]
        values.append(_plugin(head, y if isinstance(y, FeatureStats) else y[: math.ceil(f * y.shape[0])]))
    design = torch.tensor([[1.0, 1 / f] for f in fractions], dtype=torch.float64)
    solution = torch.linalg.lstsq(design, torch.tensor(values, dtype=torch.float64)[:, None]).solution
    return float(solution[0, 0])


def _vale2(x: Tensor, y: Tensor | FeatureStats) -> float:
    # F + a/n + b/n^2 at n, n/2 and n/4: the weights that keep F and cancel a and b
    return 8 / 3 * _average(x, y, 1) - 2 * _average(x, y, 2) + 1 / 3 * _average(x, y, 4)


def _rtd(x: Tensor, y: Tensor | FeatureStats) -> float:
    # Cross-fitted: every fold is evaluated with the rest as pilot, and the folds are averaged
    full_x, full_y = _as_stats(x), _as_stats(y)
    shift = full_x.mean - full_y.mean
    root = 0.0
    for i in range(_FOLDS):
        held_x, pilot_x = _hold_out(x, _FOLDS, i)
        held_y, pilot_y = (y, y) if isinstance(y, FeatureStats) else _hold_out(y, _FOLDS, i)
        root += _root_trace(held_x, pilot_x, held_y, pilot_y) / _FOLDS
    value = float(shift.square().sum()) - 2 * root
    for stats, side in ((full_x, x), (full_y, y)):
        trace = float(stats.covariance().diagonal().sum())
        value += trace
        if isinstance(side, Tensor):
            value -= trace / side.shape[0]  # E|mean|^2 exceeds |mean|^2 by tr(Sigma)/n
    return value


def _hold_out(x: Tensor, folds: int, index: int) -> tuple[Tensor, FeatureStats]:
    parts = list(x.tensor_split(folds))
    held = parts.pop(index)
    return held, FeatureStats.from_features(torch.cat(parts))


def _root_trace(held_x: Tensor, pilot_x: FeatureStats, held_y: Tensor | FeatureStats, pilot_y: FeatureStats) -> float:
    # Second-order relative Taylor estimate of tr(Sigma_x Sigma_y)^(1/2) around the pilot
    lower = torch.linalg.cholesky(_regular(pilot_y.covariance()))  # R with pilot covariance of y = R R'
    values, vectors = torch.linalg.eigh(lower.mT @ _regular(pilot_x.covariance()) @ lower)
    s = values.clamp_min(torch.finfo(torch.float64).tiny).sqrt()  # singular values of the pilot
    h, hh = _deviations((held_x - pilot_x.mean) @ (lower @ vectors) / s)
    if isinstance(held_y, FeatureStats):
        k, kk = torch.zeros_like(h), torch.zeros_like(h)
    else:
        rows = torch.linalg.solve_triangular(lower, (held_y - pilot_y.mean).mT, upper=False).mT
        k, kk = _deviations(rows @ vectors)
    weight = s[:, None] * s / (s[:, None] + s)
    first = (s * (1 + (h.diagonal() + k.diagonal()) / 2)).sum()
    return float(first - (weight * (hh + kk - 2 * h * k)).sum() / 4)


def _regular(covariance: Tensor) -> Tensor:
    # The pilot is only a point to expand around, so a ridge at round-off level makes it invertible at no bias
    ridge = covariance.diagonal().mean() * covariance.shape[0] * torch.finfo(torch.float64).eps
    return covariance + ridge * torch.eye(covariance.shape[0], dtype=covariance.dtype, device=covariance.device)


def _deviations(w: Tensor) -> tuple[Tensor, Tensor]:
    # Unbiased estimates of H and of the entries H_ij^2, H = cov(w) - I, the second by pairs of distinct rows
    n = w.shape[0]
    w = w - w.mean(0)
    second = w.mT @ w
    h = second / (n - 1)
    h -= torch.eye(w.shape[1], dtype=w.dtype, device=w.device)
    # sum over rows i of (w w' - I)_ab^2, to be taken from the square of the sum over rows
    total = second - n * torch.eye(w.shape[1], dtype=w.dtype, device=w.device)
    squares = w.square()
    diagonal = torch.diag_embed(2 * squares.sum(0) - n)
    own = squares.mT @ squares - diagonal
    return h, (total.square() - own) / (n * (n - 1))
