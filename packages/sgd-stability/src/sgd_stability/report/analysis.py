"""`analyze`: from a model, a loss and data to a stability report."""

from collections.abc import Iterable
from typing import Literal

import torch
from core_tensor.checks import check_choice, check_number, check_tensor
from torch import Tensor, nn

from sgd_stability.curvature.data import Data, collect, sharing
from sgd_stability.curvature.gauss_newton import gauss_newton_operator
from sgd_stability.curvature.ghost import gradient_norms, gram
from sgd_stability.curvature.jacobian import weighted_jacobian
from sgd_stability.curvature.losses import LossValues, resolve_loss
from sgd_stability.curvature.network import Network, make_network
from sgd_stability.curvature.sample_curvature import sample_curvature, sample_directions
from sgd_stability.curvature.spectra import exact_gauss_newton_trace, hutch_plus_plus
from sgd_stability.curvature.truncated import (
    default_directions,
    loss_hessian_operator,
    projected_family,
    projected_hessians,
    top_eigenvectors,
)
from sgd_stability.report.report import StabilityReport
from sgd_stability.theory.dynamics import SGD, Update
from sgd_stability.theory.family import CurvatureFamily
from sgd_stability.theory.sampling import SCHEMES, Scheme

Method = Literal["auto", "gram", "jacobian", "truncated"]
_GRAM_ROWS = 3072  # an eigendecomposition of this size takes about ten seconds on one core
_DENSE_NUMBERS = 50_000_000
_EXACT_TRACE = 64  # outputs per sample; the exact trace back-propagates each of them


def analyze(
    model: nn.Module,
    loss: str | nn.Module | LossValues,
    data: Data,
    *,
    curvature: Literal["ggn", "hessian"] = "ggn",
    sampling: Scheme = "without_replacement",
    update: Update = SGD,
    preconditioner: Tensor | None = None,
    method: Method = "auto",
    k: int | None = None,
    max_samples: int | None = 512,
    parameters: Iterable[str] | None = None,
    interpolation_tolerance: float = 1e-3,
    distributed: bool = False,
    seed: int = 0,
) -> StabilityReport:
    """Measure the per-sample curvature of a model at its current parameters.

    Args:
        model: The model, in the mode it is trained in but without layers that mix samples or draw random numbers.
        loss: `"squared_error"` (||z - y||^2 / 2), `"mse"` (torch's), `"cross_entropy"`, torch's loss modules, or a
            function `(outputs, targets) -> per-sample losses (n,)`. Training minimises the mean over the batch.
        data: Loader, data set, or tensors (inputs, targets): the training data.
        curvature: `"ggn"` (positive semidefinite, equal to the Hessian at an interpolating minimum) or `"hessian"`.
        sampling: How minibatches are drawn.
        update: Update rule, such as `Update(momentum=0.9)`.
        preconditioner: Diagonal P of an adaptive optimizer (`sgd_stability.optimizers.adam_preconditioner`), shape
            (d,) in the order of the parameters; infinite for parameters that do not move.
        method: `"gram"` (exact, ghost route), `"jacobian"` (exact, explicit), `"truncated"` (k eigenvectors: a band
            instead of a number), or `"auto"`: the cheaper exact route while one is small enough.
        k: Dimension of the truncated route: three quarters eigenvectors of H, a quarter directions of single samples.
            If absent 40, fewer above 7 million parameters.
        max_samples: Most samples to analyse; fewer than all gives estimates, and the report says so.
        parameters: Names of the parameters to include; all that require a gradient if absent.
        interpolation_tolerance: Largest relative residual (see the report) at which the point counts as an
            interpolating minimum.
        distributed: Share the work over the ranks of the default process group. Every rank must call this, with the
            same model and the same whole data set; the Gram route is computed on every rank.
        seed: Seed of the subsample and of Lanczos.

    Returns:
        The report.

    Raises:
        ValueError: If an argument or the data do not fit, the loss is not a finite sum over samples, or the model has
            no trainable parameters.
        TypeError: If parameters are not real.
    """
    check_choice("curvature", curvature, ("ggn", "hessian"))
    check_choice("sampling", sampling, SCHEMES)
    check_choice("method", method, ("auto", "gram", "jacobian", "truncated"))
    if k is not None:
        check_number("k", k, low=1, integer=True)
    ranks = sharing(distributed)
    samples = collect(data, max_samples=max_samples, seed=seed, like=next(model.parameters(), None), ranks=ranks)
    network = make_network(model, resolve_loss(loss), samples.inputs, samples.targets, parameters, ranks)
    scale = None
    if preconditioner is not None:
        check_tensor("preconditioner", preconditioner, shape=(network.size,))
        if not bool((preconditioner > 0).all()):
            raise ValueError("preconditioner: expected positive values, got others")
        if bool(preconditioner.isinf().all()):
            raise ValueError("preconditioner: expected at least one parameter that moves, got only infinite values")
        scale = preconditioner.rsqrt()
    k = default_directions(network.size) if k is None else k
    family, used, converged = _family(network, curvature, method, k, scale, seed)
    slopes = gradient_norms(network)
    rms = float(slopes.square().mean().sqrt())
    relative = network.relative_residual()
    return StabilityReport(
        family=family,
        n=samples.n,
        ids=samples.ids,
        targets=samples.targets,
        sampling=sampling,
        update=update,
        curvature=curvature,
        method=used,
        mean_loss=network.mean_loss(),
        gradient_rms=rms,
        relative_residual=relative,
        interpolating=relative <= interpolation_tolerance,
        trace=_trace(network, curvature, scale) if family.truncated else family.trace,
        spectrum_converged=converged,
        derivatives=network.known.get("derivatives", "backward"),
    )


def _trace(network: Network, curvature: str, scale: Tensor | None) -> float:
    # Of the whole H, where the family is truncated: exactly for few outputs, else by Hutch++.
    if curvature == "ggn" and scale is None and network.rank <= _EXACT_TRACE:
        return exact_gauss_newton_trace(network)
    build = gauss_newton_operator if curvature == "ggn" else loss_hessian_operator
    return hutch_plus_plus(build(network, scale=scale), 30, generator=torch.Generator().manual_seed(0)).value


def _family(
    network: Network, curvature: str, method: str, k: int, scale: Tensor | None, seed: int
) -> tuple[CurvatureFamily, str, bool]:
    # The family by the cheapest exact route that fits, else the truncated one.
    n, d = network.n, network.size
    if curvature == "hessian":
        if method == "gram":
            raise ValueError("method: expected 'jacobian', 'truncated' or 'auto' with curvature='hessian', got 'gram'")
        if method == "jacobian" or (method == "auto" and n * d * d <= _DENSE_NUMBERS):
            eye = torch.eye(d, dtype=network.dtype, device=network.device)
            return projected_hessians(network, eye, scale=scale), "jacobian", True
        pairs = top_eigenvectors(loss_hessian_operator(network, scale=scale), k, seed=seed)
        return projected_hessians(network, pairs.vectors, scale=scale), "truncated", pairs.converged
    R = network.rank
    indefinite = not network.convex
    if method == "auto":
        fits = n * R * d <= _DENSE_NUMBERS and min(n * R, d) <= _GRAM_ROWS
        method = "jacobian" if fits else "truncated"
        if scale is None and not indefinite and n * R <= min(d, _GRAM_ROWS):
            method = "gram"
    if method == "gram":
        if scale is not None or indefinite:
            raise ValueError("method: expected 'jacobian' or 'truncated' with a preconditioner or a nonconvex loss")
        return CurvatureFamily.from_gram(gram(network), n), method, True
    if method == "jacobian":
        Z = weighted_jacobian(network, chunk=64)
        Z = Z if scale is None else Z * scale
        return CurvatureFamily.from_factors(Z.double(), network.factor.signs), method, True
    k = min(k, d)
    pairs = top_eigenvectors(gauss_newton_operator(network, scale=scale), k - k // 4, seed=seed)
    curvatures = sample_curvature(network, scale=scale)
    basis = [pairs.vectors]
    if k // 4:
        basis.append(sample_directions(network, curvatures, k // 4, scale=scale))
    V, _ = torch.linalg.qr(torch.cat(basis, 1))
    return projected_family(network, V, scale=scale, curvature=curvatures), method, pairs.converged
