r"""The Frechet distance of two samples, differentiable in both by a closed form.

$$ d^2 = \lVert\mu_x-\mu_y\rVert^2 + \operatorname{tr}\Sigma_x + \operatorname{tr}\Sigma_y
       - 2 \operatorname{tr}(\Sigma_x \Sigma_y)^{1/2}
     = \lVert\mu_x-\mu_y\rVert^2 + \min_{P} \lVert F_y - P F_x \rVert_F^2, $$

the minimum over partial isometries (orthogonal Procrustes). By the envelope theorem $P$ is not differentiated:
$\partial d^2 / \partial F_y = 2 (F_y - P F_x)$ with $P$ the polar factor of $F_y F_x^T$. Nothing is inverted, so the
gradient stays bounded and non-zero for collapsed samples, where every route over eigenvalues yields 0 or NaN.
"""

from collections.abc import Callable
from typing import Literal

import torch
from core_tensor.checks import check_choice, check_tensor
from torch import Tensor
from torch.autograd.function import FunctionCtx

from frechet_gan.frechet.factors import Factor, factor_of_sample, polar_gram, polar_quintic, polar_svd
from frechet_gan.frechet.gaussian import distance_to_root, frechet_distance_from_moments, gaussian_map
from frechet_gan.frechet.regression import once, wide
from frechet_gan.frechet.stats import FeatureStats

Method = Literal["auto", "svd", "eigh", "polar", "newton_schulz"]
METHODS: tuple[Method, ...] = ("auto", "svd", "eigh", "polar", "newton_schulz")


def frechet_distance(
    x: Tensor | FeatureStats, y: Tensor | FeatureStats, *, method: Method = "auto", ddof: int = 1
) -> Tensor:
    """Frechet distance between two samples, or between a sample and stored statistics.

    Wherever a sample is involved, `auto` and `svd` decompose the cross matrix of the factors (the centred sample itself
    for n - 1 <= d, its QR otherwise): `svd` by LAPACK's SVD, `auto` by eigenvectors of its Gram matrix, corrected to
    the SVD's accuracy, and by the SVD where it is nearly rank-deficient. Between two `FeatureStats` the symmetric
    eigenvalues of moments are taken. `eigh` forms float64 covariances
    (cheaper for n far above d; its gradient vanishes in collapsed directions), `polar` needs matrix products only
    (value right to 1e-3, for GPUs) and `newton_schulz` is the iteration on the product of the covariances, kept for
    comparison: it is inaccurate and slow. The arithmetic is float64 whatever the dtype of the samples.

    Args:
        x: Sample, shape (n_x, d), floating; or statistics of width d.
        y: Sample, shape (n_y, d), floating; or statistics of width d.
        method: Engine.
        ddof: Divisor of the covariances is n - ddof: 1 as in FID, 0 as in the losses of this package.

    Returns:
        The distance (squared 2-Wasserstein), a non-negative scalar in the dtype of the samples, at least float32.

    Raises:
        ValueError: For fewer than two rows, different widths, NaN or infinite features, or an unknown method.
        TypeError: If an argument is neither a floating tensor nor `FeatureStats`.

    Source:
        arXiv 2003.11774 (the loss); the closed-form gradient is the orthogonal Procrustes problem's.

    Departure:
        The paper's own matrix root is not published; `newton_schulz` is our reading of it. `auto` never takes it.
    """
    check_choice("method", method, METHODS)
    check_choice("ddof", ddof, (0, 1))
    for name, side in (("x", x), ("y", y)):
        if not isinstance(side, FeatureStats):
            check_sample(name, side)
    width_x, width_y = _width(x), _width(y)
    if width_x != width_y:
        raise ValueError(f"y: expected features of width {width_x} as x has, got {width_y}")
    if isinstance(x, FeatureStats) and isinstance(y, FeatureStats):
        return distance_to_root(y.mean, y.covariance(ddof), x.factor(ddof))
    if method == "newton_schulz":
        return _newton_schulz(*_moments(x, ddof), *_moments(y, ddof))
    wanted = tuple(torch.is_grad_enabled() and isinstance(side, Tensor) and side.requires_grad for side in (x, y))
    value: Tensor = _Frechet.apply(x, y, method, ddof, wanted)
    return value


def value_and_gradient(x: Tensor, y: Tensor | Factor, ddof: int) -> tuple[Tensor, Tensor]:
    """The distance and its gradient in x at once, for callers that regress to it instead of differentiating.

    Args:
        x: Sample, shape (n_x, d).
        y: Sample, shape (n_y, d), or a Gaussian by its factor.
        ddof: Divisor of the covariances is n - ddof.

    Returns:
        The distance, a float64 scalar, and the gradient, shape (n_x, d).
    """
    value, (gradient, _) = _by_factors(x, y, ddof, (True, False), polar_gram)
    assert gradient is not None
    return value, gradient


def check_sample(name: str, sample: Tensor) -> None:
    """Refuse what is no sample of features: not (n >= 2, d >= 1), not floating, or not finite.

    Args:
        name: The argument's name, for the message.
        sample: What the caller passed.

    Raises:
        ValueError: If the shape or a value does not fit.
        TypeError: If it is no floating tensor.
    """
    check_tensor(name, sample, ndim=2, finite=True)
    if not sample.dtype.is_floating_point:
        raise TypeError(f"{name}: expected floating features, got {sample.dtype}")
    if sample.shape[0] < 2 or sample.shape[1] < 1:
        raise ValueError(f"{name}: expected at least two samples of width one, got shape {tuple(sample.shape)}")


def check_pair(x: Tensor, y: Tensor) -> None:
    """Refuse two samples that cannot be compared.

    Args:
        x: Sample, shape (n, d).
        y: Sample, shape (m, d).

    Raises:
        ValueError: If one is no sample, or the widths differ.
    """
    check_sample("x", x)
    check_sample("y", y)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"y: expected features of width {x.shape[1]} as x has, got {y.shape[1]}")


class _Frechet(torch.autograd.Function):
    """Value forward, closed-form gradient backward; a second derivative is refused by torch."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor | FeatureStats,
        y: Tensor | FeatureStats,
        method: Method,
        ddof: int,
        wanted: tuple[bool, bool],
    ) -> Tensor:
        if method == "eigh":
            value, gradients = _by_moments(x, y, ddof, wanted)
        else:
            decompose = {"polar": polar_quintic, "svd": polar_svd}.get(method, polar_gram)
            value, gradients = _by_factors(x, y, ddof, wanted, decompose)
        ctx.save_for_backward(*gradients, *(s if isinstance(s, Tensor) else None for s in (x, y)))  # type: ignore[arg-type]
        return value.to(wide(x.dtype if isinstance(x, Tensor) else y.dtype))  # type: ignore[union-attr]

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradient_x, gradient_y, x, y = ctx.saved_tensors  # type: ignore[attr-defined]
        out_x = None if gradient_x is None else once(gradient_x * grad, x)
        out_y = None if gradient_y is None else once(gradient_y * grad, y)
        return out_x, out_y, None, None, None


_Side = Tensor | FeatureStats | Factor
_Gradients = tuple[Tensor | None, Tensor | None]


def _by_factors(
    x: _Side,
    y: _Side,
    ddof: int,
    wanted: tuple[bool, bool],
    decompose: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, _Gradients]:
    fx, fy = _factor(x, ddof, wanted[0]), _factor(y, ddof, wanted[1])
    unit = max(fx.size(), fy.size(), float((fy.mean - fx.mean).abs().max()))
    if unit == 0 or 1e-60 < unit < 1e60:
        unit = 1.0
    else:  # fourth powers of 1e-100 and 1e100 leave the range
        fx, fy = fx.divided(unit), fy.divided(unit)
    shift = fy.mean - fx.mean
    cross = fy.factor @ fx.factor.mT  # (k_y, k_x)
    scale = fx.scale * fy.scale
    gradients: list[Tensor | None] = [None, None]
    if not any(wanted):
        norm = torch.linalg.svdvals(cross).sum()
    else:
        norm, polar = decompose(cross)
        pulls = ((fx, polar.mT, fy, -2 * shift), (fy, polar, fx, 2 * shift))
        for i, (own, p, other, towards) in enumerate(pulls):
            if wanted[i]:
                pull = torch.addmm(own.factor, p, other.factor, beta=2 / own.scale**2, alpha=-2 / scale)
                gradients[i] = own.to_rows(pull, towards).mul_(unit).to((x, y)[i].dtype)  # type: ignore[union-attr]
    value = shift.dot(shift) + (fx.trace() + fy.trace() - 2 * norm / scale).clamp_min(0)
    return value * unit * unit, (gradients[0], gradients[1])


def _by_moments(
    x: Tensor | FeatureStats, y: Tensor | FeatureStats, ddof: int, wanted: tuple[bool, bool]
) -> tuple[Tensor, _Gradients]:
    moments = (_moments(x, ddof), _moments(y, ddof))
    if not any(wanted):
        return frechet_distance_from_moments(*moments[0], *moments[1]), (None, None)
    gradients: list[Tensor | None] = [None, None]
    for i, side in enumerate((x, y)):
        if wanted[i] and isinstance(side, Tensor):
            transport = gaussian_map(*moments[i], *moments[1 - i])
            rows = side.detach().double() - transport.source
            n = rows.shape[0]
            pulled = 2 * (rows - rows @ transport.matrix) / (n - ddof)
            shift = transport.source - transport.target
            gradients[i] = (pulled - pulled.mean(0) + 2 * shift / n).to(side.dtype)
    return transport.distance, (gradients[0], gradients[1])


def _factor(side: _Side, ddof: int, with_basis: bool) -> Factor:
    if isinstance(side, Factor):
        return side
    return side.factor(ddof) if isinstance(side, FeatureStats) else factor_of_sample(side, ddof, with_basis)


def _width(side: Tensor | FeatureStats) -> int:
    return side.dim if isinstance(side, FeatureStats) else side.shape[1]


def _moments(side: Tensor | FeatureStats, ddof: int) -> tuple[Tensor, Tensor]:
    if isinstance(side, FeatureStats):
        return side.mean, side.covariance(ddof)
    sample = side.double()
    mean = sample.mean(0)
    centred = sample - mean
    return mean, centred.mT @ centred / (sample.shape[0] - ddof)


def _newton_schulz(
    mean_x: Tensor, covariance_x: Tensor, mean_y: Tensor, covariance_y: Tensor, steps: int = 15
) -> Tensor:
    # Coupled Newton-Schulz root of the product, differentiated through its iterations
    product = covariance_x @ covariance_y
    norm = product.norm().clamp_min(torch.finfo(torch.float64).tiny)
    identity = torch.eye(product.shape[0], dtype=product.dtype, device=product.device)
    root, inverse = product / norm, identity
    for _ in range(steps):
        step = 1.5 * identity - 0.5 * inverse @ root
        root, inverse = root @ step, step @ inverse
    trace = root.diagonal().sum() * norm.sqrt()
    covariance_part = covariance_x.diagonal().sum() + covariance_y.diagonal().sum() - 2 * trace
    distance: Tensor = (mean_x - mean_y).square().sum() + covariance_part
    return distance
