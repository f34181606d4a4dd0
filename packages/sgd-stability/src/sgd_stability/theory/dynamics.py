r"""The exact threshold for momentum, Nesterov momentum and weight decay (and Adam, at a fixed preconditioner).

In the eigenbasis of H the mean dynamics of every such update splits into scalar recursions, one per eigenvalue h,

    delta_{t+1} = p delta_t - q delta_{t-1} - gain (b0 xi_t + b1 xi_{t-1}),    xi_t = (G_t - H) delta_t,

in which the minibatch noise xi enters as an input. With u_a(t) the response of mode a to a unit input, the noise
covariance N(M) = (a - 1) H M H + s mean(H_i M H_i) returns after the mean dynamics as K o N(M), elementwise, with

    K_ab = sum_t u_a(t) u_b(t).

So the second moment is bounded exactly if the mean dynamics is stable and the map M -> K o N(M) has radius below 1.
K has positive entries, which makes sqrt(K) o N(sqrt(K) o .) self-adjoint: Lanczos again, on r x r matrices.

Departure: the specification doubles the state to (delta_t, delta_{t-1}) and iterates a non-self-adjoint map of four
times the size; this form is exact, self-adjoint and of the size of plain SGD. `tests/test_update_dynamics.py`
compares both.
"""

import math
from dataclasses import dataclass, replace

import torch
from core_tensor.checks import check_number
from scipy.optimize import brentq
from torch import Tensor

from sgd_stability.theory.family import CurvatureFamily
from sgd_stability.theory.sampling import Sampling
from sgd_stability.theory.second_moment import Extreme, largest_eigenvalue, lr_threshold


@dataclass(frozen=True)
class Update:
    """The update rule of `torch.optim.SGD`; with `momentum = dampening = beta1` Adam's, at a fixed preconditioner.

    Attributes:
        momentum: beta.
        dampening: Share of the gradient that does not enter the velocity.
        nesterov: Nesterov's variant; needs a momentum and no dampening.
        weight_decay: lambda.
        decoupled: Whether the decay multiplies the weights directly (SGDW, AdamW) instead of joining the gradient.
    """

    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    decoupled: bool = False

    def __post_init__(self) -> None:
        check_number("momentum", self.momentum, low=0, high=1, open_high=True)
        check_number("dampening", self.dampening, low=0, high=1, open_high=True)
        check_number("weight_decay", self.weight_decay, low=0)
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError("nesterov: expected a momentum above 0 and dampening 0, as torch does")
        if self.nesterov and self.decoupled:
            raise ValueError("decoupled: expected weight decay in the gradient with Nesterov momentum")

    @property
    def plain(self) -> bool:
        """Whether this is SGD without momentum and weight decay."""
        return self.momentum == 0 and self.weight_decay == 0

    def edge(self, lambda1: float) -> float:
        """The learning rate at which full-batch training becomes unstable along curvature lambda1.

        Args:
            lambda1: Curvature.

        Returns:
            2 (1 + beta) / ((1 - dampening) lambda1) without decay; Adam's 2 (1 + beta1) / ((1 - beta1) lambda1).
        """
        beta, decay = self.momentum, self.weight_decay
        if self.decoupled:  # (1 - dampening) lr h + lr decay (1 + beta) = 2 (1 + beta)
            slope = (1 - self.dampening) * lambda1 + decay * (1 + beta)
        else:
            slope = (1 - self.dampening) * (lambda1 + decay) * ((1 + 2 * beta) if self.nesterov else 1.0)
        return 2 * (1 + beta) / slope if slope > 0 else math.inf

    def modes(self, lr: float | Tensor, h: Tensor) -> tuple[Tensor, Tensor, float | Tensor, float, float]:
        """Coefficients of the scalar recursions.

        Args:
            lr: Learning rate; a tensor broadcasts against h.
            h: Eigenvalues of H, shape (r,).

        Returns:
            q and u = 1 + q - p, shape (r,) (u is small where h is, and would drown in p), gain, b0, b1.
        """
        beta, decay = self.momentum, self.weight_decay
        if self.nesterov:
            step = lr * (h + decay)
            return beta * (1 - step), step, lr, 1 + beta, -beta
        gain = lr * (1 - self.dampening)
        if self.decoupled:
            return beta * (1 - lr * decay) + 0 * h, gain * h + lr * decay * (1 - beta), gain, 1.0, 0.0
        return torch.full_like(h, beta), gain * (h + decay), gain, 1.0, 0.0

    def response_to_itself(self, lr: Tensor, h: Tensor) -> Tensor:
        """The diagonal K_hh of the kernel, for many rates and eigenvalues at once.

        Args:
            lr: Learning rates below the full-batch edge, shape (m, 1).
            h: Eigenvalues, shape (r,).

        Returns:
            Shape (m, r).
        """
        q, u, gain, b0, b1 = self.modes(lr, h)
        r0 = (1 + q) / (u * (2 * (1 - q * q) - (1 - q) * u))
        r1 = 2 * (1 + q - u) / (1 + q) * r0
        return gain**2 * ((b0**2 + b1**2) * r0 + b0 * b1 * r1)

    def response(self, lr: float, h: Tensor) -> Tensor:
        """The kernel K_ab = sum_t u_a(t) u_b(t), in closed form.

        Args:
            lr: Learning rate, below the full-batch edge.
            h: Eigenvalues of H, shape (r,).

        Returns:
            Shape (r, r).
        """
        q, u, gain, b0, b1 = self.modes(lr, h)
        p = 1 + q - u
        q1, q2, u1, u2, p1, p2 = q[:, None], q[None], u[:, None], u[None], p[:, None], p[None]
        E = 1 - q1 * q2
        denominator = E * (u1 * (1 - q2) + u2 * (1 - q1)) - (1 + q1 * q2) * u1 * u2 + q2 * u1**2 + q1 * u2**2
        r0 = E / denominator  # sum_t w_a(t) w_b(t) of the autoregressive part
        r1 = (p1 * (1 - q2) + p2 * (1 - q1)) / E * r0  # the two sums with one step between them
        return gain**2 * ((b0**2 + b1**2) * r0 + b0 * b1 * r1)


SGD = Update()


def noise_gain(
    family: CurvatureFamily,
    lr: float,
    sampling: Sampling,
    update: Update,
    *,
    start: Tensor | None = None,
    tolerance: float = 1e-6,
    max_steps: int = 300,
) -> tuple[Extreme, Tensor]:
    """Radius of the noise's way through the mean dynamics: stable exactly if it is below 1 (and the mean is stable).

    Args:
        family: The per-sample Hessians, with a positive definite mean.
        lr: Learning rate below the full-batch edge.
        sampling: Minibatch scheme.
        update: Update rule.
        start: Start of Lanczos, shape (r, r).
        tolerance: Relative residual of Lanczos.
        max_steps: Most applications.

    Returns:
        The radius and its eigenvector (r, r).
    """
    h = family.h
    root = update.response(lr, h).sqrt()
    outer = (sampling.a - 1) * torch.outer(h, h)

    def loop(M: Tensor) -> Tensor:
        N = root * M
        return root * (outer * N + sampling.s * family.noise(N))

    return largest_eigenvalue(loop, torch.diag(h) if start is None else start, tolerance, max_steps)


def update_threshold(
    family: CurvatureFamily,
    sampling: Sampling,
    update: Update = SGD,
    *,
    tolerance: float = 1e-6,
    max_steps: int = 300,
) -> Extreme:
    """The exact learning rate at which an update rule loses mean-square stability.

    Args:
        family: The per-sample Hessians (for Adam, preconditioned).
        sampling: Minibatch scheme.
        update: Update rule.
        tolerance: Relative accuracy of Lanczos' residuals; the threshold is bisected to its square.
        max_steps: Most applications of the second-moment operator per learning rate.

    Returns:
        The smallest rate at which the second moment stops being bounded.

    Raises:
        ValueError: If weight decay meets an indefinite family.
    """
    plain = lr_threshold(family, sampling, tolerance=tolerance, max_steps=max_steps)
    if update.plain or (plain.value in {0.0, math.inf} and update.weight_decay == 0):
        return plain
    if plain.value == 0.0:
        raise ValueError("family: expected positive semidefinite Hessians with weight decay, got indefinite ones")
    edge = update.edge(family.lambda_max)
    if sampling.s == 0.0 or len(family.h) == 0:
        return Extreme(edge, 0.0, True, 0)
    return _bisect(family, sampling, update, edge, tolerance, max_steps)


def _bisect(
    family: CurvatureFamily, sampling: Sampling, update: Update, edge: float, tolerance: float, max_steps: int
) -> Extreme:
    # The crossing gain(lr) = 1: log gain against log(lr / (edge - lr)) is nearly a straight line.
    spent = 0
    last = Extreme(math.nan, 0.0, True, 0)
    start: Tensor | None = None

    def rate(x: float) -> float:
        return edge / (1 + math.exp(-x))

    def log_gain(x: float) -> float:
        nonlocal start, spent, last
        last, vector = noise_gain(
            family, rate(x), sampling, update, start=start, tolerance=tolerance, max_steps=max_steps
        )
        spent += last.products
        # The eigenvector is semidefinite; a little of the identity keeps the next start positive definite.
        vector = vector * torch.sign(vector.trace())
        start = vector + 1e-3 * torch.eye(len(vector), dtype=vector.dtype, device=vector.device) / len(vector) ** 0.5
        return math.log(max(last.value, 1e-300))

    low, high = -2.0, 2.0
    while log_gain(low) >= 0:
        low, high = low - 4, low
    while log_gain(high) < 0:
        low, high = high, high + 4
        if high > 30:  # the noise never matters: the full-batch edge decides
            return replace(last, value=edge, products=spent)
    root = float(brentq(log_gain, low, high, xtol=max(tolerance**2, 1e-9), rtol=1e-12))
    return replace(last, value=rate(root), products=spent)
