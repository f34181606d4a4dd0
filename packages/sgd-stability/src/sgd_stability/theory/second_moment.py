r"""The exact second moment of linearised SGD: its operator, its radius and the threshold learning rate.

Linearised SGD is `delta <- (I - eta G) delta`, G the minibatch Hessian. `M = E[delta delta']` obeys

    T(M) = M - eta (H M + M H) + eta^2 [ a H M H + s (1/n) sum_i H_i M H_i ].

T is self-adjoint in tr(AB) and completely positive. So its spectral radius is its largest eigenvalue, with a positive
semidefinite eigenvector: Lanczos from a positive definite start cannot miss it, and every Ritz value is a certified
lower bound. T has radius below 1 exactly if eta Q < D, with Q(M) = a H M H + s mean(H_i M H_i) and D(M) = H M + M H,
which gives the threshold without a search over eta:

    eta* = 1 / lambda_max( D^(-1/2) Q D^(-1/2) ),   D = diag(h_a + h_b) in the eigenbasis of H.

The mean-square threshold is not the almost-sure one: see `sgd_stability.theory.almost_sure`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from core_tensor.checks import check_number, check_tensor
from core_tensor.linalg.spectrum import SymmetricOperator, lanczos
from torch import Tensor

from sgd_stability.theory.family import CurvatureFamily
from sgd_stability.theory.sampling import Sampling

_NEGATIVE = 1e-10  # relative size below which a nonpositive eigenvalue of H counts as zero


@dataclass(frozen=True)
class Extreme:
    """A number obtained from a largest eigenvalue, with the quality of that eigenvalue.

    Attributes:
        value: The number.
        relative_residual: ||A x - theta x|| / |theta| of the eigenpair behind it; its error is of second order in it.
        converged: Whether the residual met the tolerance.
        products: Applications of the second-moment operator spent.
    """

    value: float
    relative_residual: float
    converged: bool
    products: int


def second_moment_step(family: CurvatureFamily, M: Tensor, lr: float, sampling: Sampling) -> Tensor:
    """One application of T.

    Args:
        family: The per-sample Hessians.
        M: Symmetric matrix in the family's coordinates, shape (r, r).
        lr: Learning rate eta.
        sampling: Minibatch scheme.

    Returns:
        T(M), shape (r, r).
    """
    check_tensor("M", M, shape=(len(family.h), len(family.h)))
    h = family.h
    mean = M * torch.outer(1 - lr * h, 1 - lr * h)  # (I - eta H) M (I - eta H)
    if sampling.a == 1.0 and sampling.s == 0.0:
        return mean
    return mean + lr**2 * ((sampling.a - 1) * M * torch.outer(h, h) + sampling.s * family.noise(M))


def second_moment_radius(
    family: CurvatureFamily, lr: float, sampling: Sampling, *, tolerance: float = 1e-8, max_steps: int = 300
) -> Extreme:
    """Spectral radius of T on the range: E||delta||^2 grows like radius^k if it is above 1.

    Args:
        family: The per-sample Hessians.
        lr: Learning rate eta.
        sampling: Minibatch scheme.
        tolerance: Relative residual of Lanczos.
        max_steps: Most applications of T.

    Returns:
        The radius; 1 for a family of zero matrices, on which T is the identity.

    Raises:
        ValueError: If the learning rate is not positive.

    Source:
        arXiv 2401.12332, sec. 2 (E||J_k...J_1||_F^2 = tr T^k(I)).
    """
    return radius_from(family, lr, sampling, critical_mode(family, sampling), tolerance=tolerance, max_steps=max_steps)


def radius_from(
    family: CurvatureFamily,
    lr: float,
    sampling: Sampling,
    critical: tuple[Extreme, Tensor | None],
    *,
    tolerance: float,
    max_steps: int = 300,
) -> Extreme:
    """`second_moment_radius`, when the threshold is known, as it is for many learning rates of one batch size.

    The top of T is one of two modes, or near it: the flattest direction's, whose factor is just below 1, and the one
    that the threshold is about. Lanczos starts from both; from elsewhere the cluster of flat directions costs hundreds
    of steps, or passes for the top at a loose tolerance.

    Args:
        family: The per-sample Hessians.
        lr: Learning rate eta.
        sampling: Minibatch scheme.
        critical: What `critical_mode` returns for the family and the scheme.
        tolerance: Relative residual of Lanczos.
        max_steps: Most applications of T.

    Returns:
        The radius.
    """
    check_number("lr", lr, low=0, open_low=True)
    r = len(family.h)
    if r == 0:
        return Extreme(1.0, 0.0, True, 0)
    threshold, mode = critical
    flat = torch.zeros(r, r, dtype=torch.float64, device=family.h.device)
    flattest = int(family.h.abs().argmin())
    flat[flattest, flattest] = 1.0
    factor = float(second_moment_step(family, flat, lr, sampling)[flattest, flattest])
    if mode is not None and lr < threshold.value and 0.0 <= 1.0 - factor <= tolerance:
        return Extreme(factor, 1.0 - factor, True, 1)  # the radius is between the two: nothing is left to iterate for
    start = torch.diag(family.h.abs().clamp_min(_NEGATIVE * float(family.h.abs().max())))
    if mode is not None:
        mode, start = mode / mode.norm(), start / start.norm()
        # Above the threshold another mode may overtake: it must have its full share of the start.
        start = mode + start if lr >= threshold.value else mode + flat + 1e-3 * start
    return largest_eigenvalue(lambda M: second_moment_step(family, M, lr, sampling), start, tolerance, max_steps)[0]


def lr_threshold(
    family: CurvatureFamily, sampling: Sampling, *, tolerance: float = 1e-6, max_steps: int = 300
) -> Extreme:
    """The exact learning rate eta* at which linearised SGD loses mean-square stability.

    Args:
        family: The per-sample Hessians. If truncated, the result is a certified upper bound on eta*.
        sampling: Minibatch scheme.
        tolerance: Relative residual of Lanczos; the error of eta* is of second order in it.
        max_steps: Most applications of the second-moment operator.

    Returns:
        eta*: the second moment is bounded below it and diverges above. Infinite for a family of zero matrices; zero if
        H has a negative eigenvalue, or noise acts where H is flat (possible with indefinite H_i only).
    """
    return critical_mode(family, sampling, tolerance=tolerance, max_steps=max_steps)[0]


def critical_mode(
    family: CurvatureFamily, sampling: Sampling, *, tolerance: float = 1e-6, max_steps: int = 300
) -> tuple[Extreme, Tensor | None]:
    """The threshold of `lr_threshold` and the second moment that stops decaying there.

    Args:
        family: The per-sample Hessians.
        sampling: Minibatch scheme.
        tolerance: Relative residual of Lanczos.
        max_steps: Most applications of the second-moment operator.

    Returns:
        eta* and the eigenvector M of T(eta*) to 1, shape (r, r); None where eta* follows without one.
    """
    h, a, s = family.h, sampling.a, sampling.s
    scale = float(h.abs().max()) if len(h) else 0.0
    if scale == 0.0 and (s == 0.0 or len(h) == 0):
        return Extreme(math.inf, 0.0, True, 0), None
    if bool((h < -_NEGATIVE * scale).any()):
        return Extreme(0.0, 0.0, True, 0), None
    if family.signs is not None and bool((h <= _NEGATIVE * scale).any()):
        if s > 0:
            return Extreme(0.0, 0.0, True, 0), None
        h = h.clamp_min(_NEGATIVE * scale)
    if s == 0.0:
        return Extreme(2.0 / float(h.max()), 0.0, True, 0), None
    root = (h[:, None] + h[None, :]).rsqrt()  # D^(-1/2)
    outer = torch.outer(h, h)

    def pencil(M: Tensor) -> Tensor:
        N = root * M
        return root * (a * outer * N + s * family.noise(N))

    top, vector = largest_eigenvalue(pencil, torch.diag(h), tolerance, max_steps)
    mode = root * vector
    mode = mode if float(mode.trace()) >= 0 else -mode  # a second moment: positive semidefinite
    return Extreme(1.0 / top.value, top.relative_residual, top.converged, top.products), mode


def largest_eigenvalue(
    operator: Callable[[Tensor], Tensor], start: Tensor, tolerance: float, max_steps: int
) -> tuple[Extreme, Tensor]:
    """Largest eigenvalue of a self-adjoint positive map on symmetric matrices.

    Args:
        operator: The map, (r, r) -> (r, r).
        start: Positive definite start, so that the semidefinite eigenvector sought cannot be orthogonal to it.
        tolerance: Relative residual of Lanczos.
        max_steps: Most applications.

    Returns:
        The eigenvalue and its eigenvector (r, r).
    """
    r = len(start)
    if r == 1:  # the monitor asks for this at every check
        one = torch.ones_like(start)
        return Extreme(float(operator(one)), 0.0, True, 1), one

    def product(flat: Tensor) -> Tensor:
        image = operator(flat.reshape(r, r))
        return ((image + image.T) / 2).reshape(-1)  # rounding must not leave the symmetric matrices

    found = lanczos(
        SymmetricOperator(product, r * r, torch.float64, start.device),
        tolerance=tolerance,
        max_steps=max_steps,
        start=start.reshape(-1),
    )
    value = float(found.values[0])
    residual = float(found.residuals[0]) / max(abs(value), 1e-300)
    return Extreme(value, residual, found.converged, found.products), found.vectors[:, 0].reshape(r, r)
