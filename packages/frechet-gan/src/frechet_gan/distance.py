r"""The Frechet distance of two samples, differentiable in both by a closed form.

$$ d^2 = \lVert\mu_x-\mu_y\rVert^2 + \operatorname{tr}\Sigma_x + \operatorname{tr}\Sigma_y
       - 2 \operatorname{tr}(\Sigma_x \Sigma_y)^{1/2}
     = \lVert\mu_x-\mu_y\rVert^2 + \min_{P} \lVert F_y - P F_x \rVert_F^2, $$

the minimum over partial isometries (orthogonal Procrustes). By the envelope theorem $P$ is not differentiated:
$\partial d^2 / \partial F_y = 2 (F_y - P F_x)$ with $P$ the polar factor of $F_y F_x^T$. Nothing is inverted, so the
gradient stays bounded and non-zero for collapsed samples, where every route over eigenvalues yields 0 or NaN.
"""

from typing import Literal

import torch
from core_tensor.checks import check_choice, check_tensor
from torch import Tensor
from torch.autograd.function import FunctionCtx

from frechet_gan.factors import Factor, factor_of_moments, factor_of_sample, polar_quintic, polar_svd
from frechet_gan.gaussian import frechet_distance_from_moments, gaussian_map
from frechet_gan.stats import FeatureStats

Method = Literal["auto", "svd", "eigh", "polar", "newton_schulz"]
METHODS: tuple[Method, ...] = ("auto", "svd", "eigh", "polar", "newton_schulz")


def frechet_distance(
    x: Tensor | FeatureStats, y: Tensor | FeatureStats, *, method: Method = "auto", ddof: int = 1
) -> Tensor:
    """Frechet distance between two samples, or between a sample and stored statistics.

    `auto` takes `svd` wherever a sample is involved (the factor is the centred sample itself for n <= d, its QR
    otherwise) and the symmetric eigenvalues of moments between two `FeatureStats`. `eigh` forms float64 covariances
    (cheaper for n far above d; its gradient vanishes in collapsed directions), `polar` needs matrix products only
    (value right to 1e-3, for GPUs) and `newton_schulz` is the iteration on the product of the covariances, kept for
    comparison: it is inaccurate and slow. The arithmetic is float64 whatever the dtype of the samples.

    Args:
        x: Sample, shape (n_x, d), floating; or statistics of width d.
        y: Sample, shape (n_y, d), floating; or statistics of width d.
        method: Engine.
        ddof: Divisor of the covariances is n - ddof: 1 as in FID, 0 as in the losses of this package.

    Returns:
        The distance (squared 2-Wasserstein), a non-negative scalar in the dtype of the samples.

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
        return frechet_distance_from_moments(x.mean, x.covariance(ddof), y.mean, y.covariance(ddof))
    if method == "newton_schulz":
        return _newton_schulz(*_moments(x, ddof), *_moments(y, ddof))
    sides = (*_unwrap(x, ddof), *_unwrap(y, ddof))
    wanted = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in (sides[0], sides[2]))
    value: Tensor = _Frechet.apply(*sides, method, ddof, wanted)
    return value


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
        x: Tensor,
        covariance_x: Tensor | None,
        y: Tensor,
        covariance_y: Tensor | None,
        method: Method,
        ddof: int,
        wanted: tuple[bool, bool],
    ) -> Tensor:
        engine = _by_moments if method == "eigh" else _by_factors
        value, gradients = engine((x, covariance_x), (y, covariance_y), method, ddof, wanted)
        ctx.save_for_backward(*gradients, x, y)  # type: ignore[arg-type]  # None is allowed
        dtype = x.dtype if covariance_x is None else y.dtype
        return value.to(dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradient_x, gradient_y, x, y = ctx.saved_tensors  # type: ignore[attr-defined]
        out_x = None if gradient_x is None else OnceDifferentiable.apply(gradient_x * grad, x)
        out_y = None if gradient_y is None else OnceDifferentiable.apply(gradient_y * grad, y)
        return out_x, None, out_y, None, None, None, None


class OnceDifferentiable(torch.autograd.Function):
    """Passes a closed-form gradient on and refuses to be differentiated: silence would mean a wrong second derivative.

    torch's `once_differentiable` only refuses where the incoming gradient itself has a graph.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, gradient: Tensor, at: Tensor) -> Tensor:
        """The gradient, as depending on the point it was taken at.

        Args:
            ctx: Torch's context.
            gradient: Closed-form gradient.
            at: The point.

        Returns:
            The gradient.
        """
        del ctx, at
        return gradient.clone()

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Refuse.

        Args:
            ctx: Torch's context.
            grad: Incoming gradient.

        Raises:
            NotImplementedError: Always.
        """
        del ctx, grad
        raise NotImplementedError("the closed-form gradient of frechet_gan's distances has no second derivative")


_Side = tuple[Tensor, Tensor | None]  # a sample and None, or a mean and a covariance
_Gradients = tuple[Tensor | None, Tensor | None]


def _by_factors(x: _Side, y: _Side, method: Method, ddof: int, wanted: tuple[bool, bool]) -> tuple[Tensor, _Gradients]:
    fx, fy = _factor(x, ddof, wanted[0]), _factor(y, ddof, wanted[1])
    shift = fy.mean - fx.mean
    scale = torch.stack([fx.factor.abs().max(), fy.factor.abs().max(), shift.abs().max()]).max()
    scale = torch.where(scale > 0, scale, 1.0)  # keeps squares of 1e-200 and 1e200 in range
    a, b, shift = fx.factor / scale, fy.factor / scale, shift / scale
    cross = b @ a.mT  # (k_y, k_x)
    if not any(wanted):
        norm, polar = torch.linalg.svdvals(cross).sum(), None
    else:
        norm, polar = (polar_quintic if method == "polar" else polar_svd)(cross)
    covariance_part = (a.square().sum() + b.square().sum() - 2 * norm).clamp_min(0)
    value = (shift.square().sum() + covariance_part) * scale * scale
    gradients: list[Tensor | None] = [None, None]
    if polar is not None:
        if wanted[0]:
            gradients[0] = (fx.to_rows(2 * (a - polar.mT @ b), -2 * shift) * scale).to(x[0].dtype)
        if wanted[1]:
            gradients[1] = (fy.to_rows(2 * (b - polar @ a), 2 * shift) * scale).to(y[0].dtype)
    return value, (gradients[0], gradients[1])


def _by_moments(x: _Side, y: _Side, method: Method, ddof: int, wanted: tuple[bool, bool]) -> tuple[Tensor, _Gradients]:
    del method
    (mean_x, covariance_x), (mean_y, covariance_y) = _side_moments(x, ddof), _side_moments(y, ddof)
    if not any(wanted):
        return frechet_distance_from_moments(mean_x, covariance_x, mean_y, covariance_y), (None, None)
    value = torch.zeros(())
    gradients: list[Tensor | None] = [None, None]
    sides = ((x, mean_x, covariance_x, mean_y, covariance_y), (y, mean_y, covariance_y, mean_x, covariance_x))
    for i, (side, mean, covariance, other_mean, other_covariance) in enumerate(sides):
        if wanted[i]:
            transport = gaussian_map(mean, covariance, other_mean, other_covariance)
            value = transport.distance
            rows = side[0].double() - mean
            n = rows.shape[0]
            pulled = 2 * (rows - rows @ transport.matrix) / (n - ddof)
            gradients[i] = (pulled - pulled.mean(0) + 2 * (mean - other_mean) / n).to(side[0].dtype)
    return value, (gradients[0], gradients[1])


def _factor(side: _Side, ddof: int, with_basis: bool) -> Factor:
    sample, covariance = side
    return factor_of_sample(sample, ddof, with_basis) if covariance is None else factor_of_moments(sample, covariance)


def _side_moments(side: _Side, ddof: int) -> tuple[Tensor, Tensor]:
    sample, covariance = side
    if covariance is not None:
        return sample.double(), covariance.double()
    return _moments(sample.detach(), ddof)


def _unwrap(side: Tensor | FeatureStats, ddof: int) -> _Side:
    return (side.mean, side.covariance(ddof)) if isinstance(side, FeatureStats) else (side, None)


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
