r"""Transport plans: each maps a generated and a real sample to a distance and its gradient in the generated one.

Every loss here is a regression, $\nabla_{f_i} L = \frac2n (f_i - m_i)$, towards targets $m_i$ that are held fixed:
the image under the Gaussian map, the assigned real feature, the barycentre under a coupling, the matched quantiles.
So the matrix roots, assignments and fixed-point iterations are never differentiated. All arithmetic is float64.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from core_tensor import assignment
from torch import Tensor

from frechet_gan.choices import PlanName
from frechet_gan.frechet.distance import value_and_gradient
from frechet_gan.transport.mmd import GaussianKernel, mmd, squared_distances


@dataclass(frozen=True)
class PlanOptions:
    """Settings of the plans that have any.

    Attributes:
        epsilon: Sinkhorn's regularisation, relative to the mean squared distance between real features.
        iterations: Most Sinkhorn iterations.
        tolerance: Marginal error at which Sinkhorn stops.
        directions: Random directions of the sliced plans.
        ascent_steps: Power steps that sharpen the direction of `max_sliced`.
    """

    epsilon: float = 0.05
    iterations: int = 500
    tolerance: float = 1e-6
    directions: int = 256
    ascent_steps: int = 20


Solution = tuple[Tensor, Tensor]  # distance (scalar) and gradient in the generated sample (n, d)
Plan = Callable[[Tensor, Tensor], Solution]  # of generated (n, d) and real features (m, d), float64


def gaussian_plan(fake: Tensor, real: Tensor) -> Solution:
    """Frechet distance with divisor n.

    Args:
        fake: Generated features, shape (n, d), float64.
        real: Real features, shape (m, d), float64.

    Returns:
        Distance and gradient.
    """
    return value_and_gradient(fake, real, ddof=0)


def mean_plan(fake: Tensor, real: Tensor) -> Solution:
    """Squared distance of the means, the first part of the Frechet distance.

    Args:
        fake: Generated features, shape (n, d), float64.
        real: Real features, shape (m, d), float64.

    Returns:
        Distance and gradient.
    """
    shift = fake.mean(0) - real.mean(0)
    return shift.square().sum(), (2 * shift / fake.shape[0]).expand_as(fake).clone()


def bures_plan(fake: Tensor, real: Tensor) -> Solution:
    """Bures distance of the covariances, the second part of the Frechet distance.

    Args:
        fake: Generated features, shape (n, d), float64.
        real: Real features, shape (m, d), float64.

    Returns:
        Distance and gradient.
    """
    return gaussian_plan(fake - fake.mean(0), real - real.mean(0))


def assignment_plan(fake: Tensor, real: Tensor) -> Solution:
    r"""Exact optimal transport $\min_\sigma \frac1n\sum_i \lVert f_i - r_{\sigma(i)}\rVert^2$.

    Args:
        fake: Generated features, shape (n, d), float64.
        real: Real features, shape (m, d), float64; one number of rows must divide the other.

    Returns:
        Distance and gradient (envelope theorem: the assignment is held fixed).

    Raises:
        ValueError: If neither number of rows divides the other.
    """
    n, m = fake.shape[0], real.shape[0]
    if max(n, m) % min(n, m):
        raise ValueError(f"real: expected a number of rows that divides or is divided by {n}, got {m}")
    rows = max(n, m)
    cost = squared_distances(fake, real)
    if n != m:  # every point of the smaller sample carries several units of mass
        cost = cost.repeat_interleave(rows // n, 0).repeat_interleave(rows // m, 1)
    columns = assignment(cost)
    target = real[columns // (rows // m)]  # (rows, d)
    target = target.view(n, rows // n, -1).mean(1)
    value = cost.gather(1, columns[:, None]).mean()
    return value, 2 * (fake - target) / n


def sinkhorn_plan(fake: Tensor, real: Tensor, *, options: PlanOptions) -> Solution:
    r"""Debiased Sinkhorn divergence $OT_\epsilon(f, r) - \frac12 OT_\epsilon(f, f) - \frac12 OT_\epsilon(r, r)$.

    Args:
        fake: Generated features, shape (n, d), float64.
        real: Real features, shape (m, d), float64.
        options: Regularisation, iterations, tolerance.

    Returns:
        Distance and gradient (of the converged problem, by the envelope theorem).

    Source:
        arXiv 1810.08278.
    """
    between_reals = squared_distances(real, real)
    epsilon = max(options.epsilon * float(between_reals.mean()), torch.finfo(torch.float64).tiny)
    value, coupling = _entropic(squared_distances(fake, real), epsilon, options)
    own_fake, coupling_fake = _entropic(squared_distances(fake, fake), epsilon, options)
    own_real, _ = _entropic(between_reals, epsilon, options)
    own_target = coupling_fake @ fake + fake * (1 / fake.shape[0] - coupling_fake.sum(1, keepdim=True))
    cross_target = coupling @ real + fake * (1 / fake.shape[0] - coupling.sum(1, keepdim=True))
    return value - (own_fake + own_real) / 2, 2 * (own_target - cross_target)


def _entropic(cost: Tensor, epsilon: float, options: PlanOptions) -> Solution:
    # log-domain Sinkhorn with annealed epsilon; the coupling's columns are exact, its rows to the tolerance
    n, m = cost.shape
    f, g = cost.new_zeros(n), cost.new_zeros(m)
    log_n, log_m = np.log(n), np.log(m)
    level = max(float(cost.max()), epsilon)
    for _ in range(options.iterations):
        level = max(level / 2, epsilon)
        f_new = -level * (torch.logsumexp((g - cost) / level, 1) - log_m)
        moved = (f_new - f).abs().max()
        f = f_new
        g = -level * (torch.logsumexp((f[:, None] - cost) / level, 0) - log_n)
        if level == epsilon and moved <= options.tolerance * epsilon:
            break
    coupling = ((f[:, None] + g - cost) / epsilon - log_n - log_m).exp()
    return f.mean() + g.mean(), coupling


def sliced_plan(fake: Tensor, real: Tensor, *, options: PlanOptions, generator: torch.Generator) -> Solution:
    """Sliced 2-Wasserstein distance: the mean over random directions of the squared distance of sorted projections.

    Args:
        fake: Generated features, shape (n, d), float64.
        real: Real features, shape (m, d), float64; one number of rows must divide the other.
        options: Number of directions.
        generator: Draws the directions.

    Returns:
        Distance and gradient.
    """
    directions = _directions(fake, options.directions, generator)
    return _along(fake, real, directions)


def max_sliced_plan(fake: Tensor, real: Tensor, *, options: PlanOptions, generator: torch.Generator) -> Solution:
    """Max-sliced 2-Wasserstein distance: the best of random directions, sharpened by power steps that improve it.

    Args:
        fake: Generated features, shape (n, d), float64.
        real: Real features, shape (m, d), float64; one number of rows must divide the other.
        options: Number of starts and of steps.
        generator: Draws the starts.

    Returns:
        Distance and gradient along the direction found (a local maximum: a lower bound of the distance).

    Source:
        arXiv 1904.05877.
    """
    shift = real.mean(0) - fake.mean(0)
    starts = torch.cat([_directions(fake, options.directions, generator), _unit(shift)[None]])
    values = _matched(fake @ starts.mT, real @ starts.mT)[0].square().mean(0)
    direction, best = starts[values.argmax()], values.max()
    for _ in range(options.ascent_steps):
        residual, order_fake, order_real = _matched((fake @ direction)[:, None], (real @ direction)[:, None])
        moved = fake[order_fake[:, 0]] - real[order_real[:, 0]]  # (rows, d)
        candidate = _unit(moved.mT @ residual[:, 0])
        value = _matched((fake @ candidate)[:, None], (real @ candidate)[:, None])[0].square().mean()
        if value <= best * (1 + 1e-9):
            break
        direction, best = candidate, value
    return _along(fake, real, direction[None])


def _directions(like: Tensor, count: int, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(count, like.shape[1], dtype=torch.float64, generator=generator).to(like.device)
    directions: Tensor = drawn / drawn.norm(dim=1, keepdim=True)
    return directions


def _unit(vector: Tensor) -> Tensor:
    unit: Tensor = vector / vector.norm().clamp_min(torch.finfo(vector.dtype).tiny)
    return unit


def _matched(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # differences of the sorted columns, and which row each came from; the smaller sample is repeated
    n, m = x.shape[0], y.shape[0]
    if max(n, m) % min(n, m):
        raise ValueError(f"real: expected a number of rows that divides or is divided by {n}, got {m}")
    rows = max(n, m)
    sorted_x, order_x = x.sort(0)
    sorted_y, order_y = y.sort(0)
    sorted_x, order_x = (t.repeat_interleave(rows // n, 0) for t in (sorted_x, order_x))
    sorted_y, order_y = (t.repeat_interleave(rows // m, 0) for t in (sorted_y, order_y))
    return sorted_x - sorted_y, order_x, order_y


def _along(fake: Tensor, real: Tensor, directions: Tensor) -> Solution:
    residual, order, _ = _matched(fake @ directions.mT, real @ directions.mT)  # (rows, directions)
    rows = residual.shape[0]
    back = residual.new_zeros(fake.shape[0], directions.shape[0]).scatter_add_(0, order, residual)
    gradient = 2 / (rows * directions.shape[0]) * back @ directions
    return residual.square().mean(), gradient


def mmd_plan(fake: Tensor, real: Tensor) -> Solution:
    """Unbiased squared MMD with Gaussian kernels around the median distance of the real features.

    Args:
        fake: Generated features, shape (n, d), float64.
        real: Real features, shape (m, d), float64.

    Returns:
        Distance (may be negative) and gradient.
    """
    kernel = GaussianKernel.from_median(real)
    with torch.enable_grad():
        x = fake.detach().requires_grad_()
        value = mmd(x, real, kernel)
    return value.detach(), torch.autograd.grad(value, x)[0]


_WITHOUT_OPTIONS: dict[PlanName, Plan] = {
    "gaussian": gaussian_plan,
    "mean": mean_plan,
    "bures": bures_plan,
    "assignment": assignment_plan,
    "mmd": mmd_plan,
}


def make_plan(name: PlanName, options: PlanOptions, generator: torch.Generator) -> Plan:
    """A plan with its options bound.

    Args:
        name: One of `choices.PLANS`.
        options: Settings of the plans that have any.
        generator: Draws the directions of the sliced plans.

    Returns:
        A function of generated and real features.
    """
    if name == "sinkhorn":
        return partial(sinkhorn_plan, options=options)
    if name == "sliced":
        return partial(sliced_plan, options=options, generator=generator)
    if name == "max_sliced":
        return partial(max_sliced_plan, options=options, generator=generator)
    return _WITHOUT_OPTIONS[name]
