r"""Bayesian last layer ("neural linear"): a Gaussian posterior of the weights on a network's last hidden features.

Regression, $y = w^\top \phi + \varepsilon$ with $\varepsilon \sim N(0, \sigma^2 / u)$ for an event of weight u and the
prior $w \sim N(\mu_0, A_0^{-1})$:

$$ A = A_0 + \sum_i u_i \phi_i \phi_i^\top / \sigma^2, \qquad b = A_0 \mu_0 + \sum_i u_i y_i \phi_i / \sigma^2,
\qquad w \mid \text{data} \sim N(A^{-1} b, A^{-1}) , $$

so an update by batches equals one by all events. Clicks, $P(y = 1) = \sigma(w^\top \phi + o)$ with an offset o: the
Laplace approximation at the mode, whose precision is $A + \sum_i u_i p_i (1 - p_i) \phi_i \phi_i^\top$; the next batch
takes it as its prior, so batches are close to all events at once, not equal.

Sources: LiRank, arXiv 2402.06859, section 4.3; Riquelme, Tucker and Snoek, arXiv 1802.09127; Chapelle and Li 2011,
Alg. 3.
"""

import dataclasses
import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
from core_tensor.app.files import atomic_path, reading
from core_tensor.checks import check_number, check_tensor
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

_NEWTON_STEPS = 50
_NEWTON_TOLERANCE = 1e-10


@dataclass(frozen=True)
class Posterior(ABC):
    """A Gaussian belief about d weights; updates return a new one.

    Attributes:
        mean: Mean, shape (d,), float64.
        precision: Inverse covariance A, shape (d, d), float64, symmetric positive definite.
        prior_mean: Mean of the prior, to which forgetting leads back, shape (d,), float64.
        prior_precision: Inverse covariance of the prior, shape (d, d), float64.
    """

    mean: Tensor
    precision: Tensor
    prior_mean: Tensor
    prior_precision: Tensor

    def __post_init__(self) -> None:
        """Refuse shapes that do not fit."""
        d = len(self.mean)
        for name in ("mean", "prior_mean"):
            check_tensor(name, getattr(self, name), shape=(d,), dtype=torch.float64, finite=True)
        for name in ("precision", "prior_precision"):
            check_tensor(name, getattr(self, name), shape=(d, d), dtype=torch.float64, finite=True)

    @classmethod
    def prior(cls, width: int, precision: float = 1.0, mean: Tensor | None = None, **options: float) -> Self:
        """The belief before any event.

        Args:
            width: Number d of features.
            precision: Precision of every weight; large where weights are known to be small.
            mean: Mean, such as the last layer of the trained network, shape (d,); None for zero.
            options: Further attributes of the class.

        Returns:
            The prior as a posterior of no events.
        """
        check_number("width", width, low=1, integer=True)
        check_number("precision", precision, low=0, open_low=True, high=math.inf, open_high=True)
        start = torch.zeros(width, dtype=torch.float64) if mean is None else mean.detach().double()
        scale = precision * torch.eye(width, dtype=torch.float64)
        return cls(start, scale, start, scale, **options)

    @cached_property
    def _cholesky(self) -> Tensor:
        factor: Tensor = torch.linalg.cholesky(self.precision)
        return factor

    @abstractmethod
    def updated(self, features: Tensor, targets: Tensor, weights: Tensor | None = None) -> Self:
        """The belief after some more events.

        Args:
            features: Last hidden layer of each event, shape (n, d), any float dtype.
            targets: What came of it, shape (n,).
            weights: Weight of each event, shape (n,), not negative; None for 1.

        Returns:
            The new posterior.
        """

    def forgotten(self, keep: float) -> Self:
        r"""Let old events count less: $A \leftarrow \gamma A + (1 - \gamma) A_0$ and likewise for $A \mu$.

        Args:
            keep: Share $\gamma$ of the evidence that stays, in (0, 1]; 0.5 per day halves it every day.

        Returns:
            The new posterior, closer to the prior in mean and precision.
        """
        check_number("keep", keep, low=0, high=1, open_low=True)
        precision = keep * self.precision + (1 - keep) * self.prior_precision
        information = keep * (self.precision @ self.mean) + (1 - keep) * (self.prior_precision @ self.prior_mean)
        mean = torch.cholesky_solve(information[:, None], torch.linalg.cholesky(precision))[:, 0]
        return dataclasses.replace(self, mean=mean, precision=precision)

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        r"""Draw weights, $w = \mu + L^{-\top} \epsilon$ with $A = L L^\top$.

        Args:
            count: Number of draws.
            generator: Source of randomness; None for torch's own.

        Returns:
            Weights, shape (count, d).
        """
        noise = torch.randn(len(self.mean), count, dtype=torch.float64, generator=generator)
        deviations: Tensor = torch.linalg.solve_triangular(self._cholesky.T, noise, upper=True).T
        return self.mean + deviations

    def variance(self, features: Tensor) -> Tensor:
        r"""Variance of the score, $\phi^\top A^{-1} \phi = \lVert L^{-1} \phi \rVert^2$.

        Args:
            features: Shape (n, d).

        Returns:
            Variances, shape (n,).
        """
        check_tensor("features", features, shape=(None, len(self.mean)))
        whitened: Tensor = torch.linalg.solve_triangular(self._cholesky, features.double().T, upper=False)
        return whitened.square().sum(0)

    def score(self, features: Tensor) -> Tensor:
        r"""Score at the mean, $\mu^\top \phi$.

        Args:
            features: Shape (n, d).

        Returns:
            Scores, shape (n,); logits where the targets are clicks.
        """
        check_tensor("features", features, shape=(None, len(self.mean)))
        return features.double() @ self.mean

    def save(self, path: str | os.PathLike[str], about: Mapping[str, str] | None = None) -> None:
        """Write a safetensors file.

        Args:
            path: File to write.
            about: What it belongs to, such as the run.
        """
        tensors = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.type is Tensor}
        numbers = {f.name: repr(getattr(self, f.name)) for f in dataclasses.fields(self) if f.type is not Tensor}
        plain = {name: value.contiguous() for name, value in tensors.items()}
        with atomic_path(path) as temporary:
            save_file(plain, temporary, {"kind": type(self).__name__, "about": json.dumps(about or {}), **numbers})

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "Posterior":
        """Read what `save` wrote.

        Args:
            path: File to read.

        Returns:
            The posterior, of the class that was saved.

        Raises:
            ValueError: If the file holds none.
        """
        return Posterior.read(path)[0]

    @staticmethod
    def read(path: str | os.PathLike[str]) -> tuple["Posterior", dict[str, str]]:
        """Read a posterior with what it belongs to.

        Args:
            path: File to read.

        Returns:
            The posterior, and what `save` was told.

        Raises:
            ValueError: If the file holds none.
        """
        kinds = {cls.__name__: cls for cls in (GaussianPosterior, LogisticPosterior)}
        with reading(path, "a posterior of lirank"), safe_open(path, "pt") as file:
            numbers = dict(file.metadata() or {})
            cls, about = kinds[numbers.pop("kind")], json.loads(numbers.pop("about"))
            if not isinstance(about, dict):
                raise ValueError("about: expected names and texts")
            values: dict[str, Any] = {name: float(text) for name, text in numbers.items()}
            values |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            found = cls(**values)
            torch.linalg.cholesky(torch.stack([found.precision, found.prior_precision]))
            return found, about


@dataclass(frozen=True)
class GaussianPosterior(Posterior):
    """Regression on a real target (dwell time, a rating, the residual of another model): exact.

    Attributes:
        noise: Standard deviation of the target around its mean.
    """

    noise: float = 1.0

    def __post_init__(self) -> None:
        """Refuse shapes and noise that do not fit."""
        super().__post_init__()
        check_number("noise", self.noise, low=0, open_low=True, high=math.inf, open_high=True)

    def updated(self, features: Tensor, targets: Tensor, weights: Tensor | None = None) -> Self:
        """The belief after some more events: the same in one batch or many, and in any order.

        Args:
            features: Shape (n, d), any float dtype.
            targets: Real numbers, shape (n,).
            weights: Shape (n,), not negative; None for 1.

        Returns:
            The new posterior.
        """
        phi, y, u = _events(self, features, targets, weights)
        scaled = phi * (u / self.noise**2)[:, None]
        precision = self.precision + scaled.T @ phi
        information = self.precision @ self.mean + scaled.T @ y
        mean = torch.cholesky_solve(information[:, None], torch.linalg.cholesky(precision))[:, 0]
        return dataclasses.replace(self, mean=mean, precision=precision)


@dataclass(frozen=True)
class LogisticPosterior(Posterior):
    """Clicks and other binary targets: Laplace's approximation."""

    def updated(
        self, features: Tensor, targets: Tensor, weights: Tensor | None = None, offset: Tensor | None = None
    ) -> Self:
        """The belief after some more events: the mode of the posterior with the present belief as prior.

        Args:
            features: Shape (n, d), any float dtype.
            targets: 0 or 1, shape (n,).
            weights: Shape (n,), not negative; None for 1.
            offset: Logit that the weights add to, shape (n,); None for 0.

        Returns:
            The new posterior.

        Raises:
            ValueError: If a target is neither 0 nor 1.
        """
        phi, y, u = _events(self, features, targets, weights)
        if not bool(((y == 0) | (y == 1)).all()):
            raise ValueError("targets: expected 0 or 1")
        base = torch.zeros_like(y) if offset is None else offset.double()
        check_tensor("offset", base, shape=tuple(y.shape), finite=True)

        def objective(w: Tensor) -> Tensor:
            logit = phi @ w + base
            losses = torch.nn.functional.binary_cross_entropy_with_logits(logit, y, weight=u, reduction="sum")
            return losses + (w - self.mean) @ self.precision @ (w - self.mean) / 2

        w, value = self.mean, objective(self.mean)
        for _ in range(_NEWTON_STEPS):
            p = torch.sigmoid(phi @ w + base)
            gradient = phi.T @ (u * (p - y)) + self.precision @ (w - self.mean)
            hessian = self.precision + phi.T @ (phi * (u * p * (1 - p))[:, None])
            direction = torch.cholesky_solve(gradient[:, None], torch.linalg.cholesky(hessian))[:, 0]
            decrement = float(gradient @ direction)
            if decrement <= _NEWTON_TOLERANCE:
                break
            # a full step can overshoot where the labels are separable: halve until the objective falls
            step = 1.0
            while (moved := objective(w - step * direction)) > value - 1e-4 * step * decrement and step > 1e-10:
                step /= 2
            w, value = w - step * direction, moved
        p = torch.sigmoid(phi @ w + base)
        return dataclasses.replace(self, mean=w, precision=self.precision + phi.T @ (phi * (u * p * (1 - p))[:, None]))


def _events(posterior: Posterior, features: Tensor, targets: Tensor, weights: Tensor | None) -> tuple[Tensor, ...]:
    """Features, targets and weights in float64, checked."""
    check_tensor("features", features, shape=(None, len(posterior.mean)), finite=True)
    check_tensor("targets", targets, shape=(len(features),), finite=True)
    u = torch.ones(len(features), dtype=torch.float64) if weights is None else weights.double()
    check_tensor("weights", u, shape=(len(features),), finite=True)
    if bool((u < 0).any()):
        raise ValueError("weights: expected none below 0")
    return features.detach().double(), targets.double(), u


def rebuilt(prior: Posterior, events: Iterable[tuple[Tensor, Tensor, Tensor | None]]) -> Posterior:
    """The belief for a network that was trained anew: its features differ, so the old precision means nothing.

    The window of recent events is passed through the new network once, oldest first; weights that fall with age do what
    forgetting does.

    Args:
        prior: The prior; its mean can be the new last layer.
        events: Batches of new features (n, d), targets (n,) and weights (n,) or None.

    Returns:
        The posterior.
    """
    posterior = prior
    for features, targets, weights in events:
        posterior = posterior.updated(features, targets, weights)
    return posterior
