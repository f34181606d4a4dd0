r"""One loss for every transport plan: regress generated features towards the targets of a fixed plan.

For a batch f of n features with real features (or their statistics) the loss has the value of the plan's distance
and the gradient $\frac2n (f_i - m_i)$, so that it needs no matrix root's autograd, is exact under data parallelism
with plain gradient averaging, and can be split exactly into micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, cast

import torch
from core_tensor.app import ranks
from core_tensor.checks import check_choice, check_number, check_tensor
from torch import Tensor, nn

from frechet_gan.choices import PLANS, PlanName
from frechet_gan.encoders.frozen import Encoder, check_features
from frechet_gan.frechet.distance import value_and_gradient
from frechet_gan.frechet.factors import Factor
from frechet_gan.frechet.gaussian import GaussianMap, gaussian_map, map_to_root
from frechet_gan.frechet.regression import regress, wide
from frechet_gan.frechet.stats import FeatureStats
from frechet_gan.frechet.whitening import moments, whiten, whitener
from frechet_gan.transport.plans import PlanOptions, Solution, make_plan
from frechet_gan.transport.populations import (
    BatchPopulation,
    EMAPopulation,
    LazyMap,
    MovingMoments,
    Population,
    Queue,
    QueuePopulation,
)
from frechet_gan.transport.virtual_batch import VirtualBatch

Normalize = Literal["none", "sg", "whiten"]


class TransportLoss(nn.Module):
    """Distance between generated and real features under a transport plan, as a loss of the generator.

    Under an initialised process group the population is the union of the ranks' batches (of any sizes), the value
    is the same on every rank, and averaging the ranks' gradients, as DistributedDataParallel does, gives exactly
    the gradient of one process with the whole batch.

    Args:
        plan: `gaussian` (Frechet distance), its parts `mean` and `bures`, `assignment` (exact optimal transport),
            `sinkhorn`, `sliced`, `max_sliced` or `mmd`.
        reference: Statistics of the real features, used instead of a real batch (`gaussian` only).
        population: Whose features the plan compares. A queue serves every plan, moving averages `gaussian`.
        normalize: `none`; `sg` divides by the loss's own detached value plus `constant`; `whiten` maps both samples
            by the real features' inverse root covariance first.
        refresh_every: The Gaussian map of a moving average is computed anew every so many steps; in between, the
            features regress to the targets of the last map.
        rescale: Divide the gradient by 1 - β, the batch's weight in the population, so that β does not set the step.
        encoder: Maps images to features; without it the loss takes features.
        options: Settings of the plans.
        constant: c of `sg`.
        epsilon: Ridge of `whiten`, relative to the mean variance.
        seed: Seed of the random directions of the sliced plans, the same on every rank.

    Raises:
        ValueError: For combinations that have no meaning.

    Source:
        arXiv 2003.11774 (both losses), 2604.28190 (populations, `sg`), 2608.11205 (`whiten`).

    Departure:
        The paper differentiates through the matrix root or the transport cost; here the gradient is the regression's,
        which equals it (test_regression_identity).
    """

    def __init__(
        self,
        plan: PlanName = "gaussian",
        *,
        reference: FeatureStats | None = None,
        population: Population | None = None,
        normalize: Normalize = "none",
        refresh_every: int = 1,
        rescale: bool = False,
        encoder: Encoder | None = None,
        options: PlanOptions | None = None,
        constant: float = 0.01,
        epsilon: float = 1e-3,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_choice("plan", plan, PLANS)
        check_choice("normalize", normalize, ("none", "sg", "whiten"))
        check_number("refresh_every", refresh_every, low=1, integer=True)
        check_number("constant", constant, low=0)
        check_number("epsilon", epsilon, low=0, open_low=True)
        population = population or BatchPopulation()
        if isinstance(population, EMAPopulation) and plan != "gaussian":
            raise ValueError(f"population: expected a batch or a queue with plan {plan!r}, got moving averages")
        if reference is not None and plan != "gaussian":
            raise ValueError(f"reference: expected real features with plan {plan!r}, got statistics")
        if refresh_every > 1 and not isinstance(population, EMAPopulation):
            raise ValueError("refresh_every: expected 1 without an EMAPopulation: another batch needs another map")
        if normalize == "whiten" and not isinstance(population, BatchPopulation) and reference is None:
            raise ValueError(
                "normalize: expected a reference with whiten and a past: every batch would whiten otherwise"
            )
        self.plan, self.population, self.normalize = plan, population, normalize
        self.reference, self.encoder = reference, encoder
        self.rescale = rescale
        self.options = options or PlanOptions()
        self.constant, self.epsilon = constant, epsilon
        self.generator = torch.Generator().manual_seed(seed)
        self._plan = make_plan(plan, self.options, self.generator)
        # generated and real features, which have their own population where there is no reference
        self.states = nn.ModuleList()
        if isinstance(population, EMAPopulation):
            self.states.extend(MovingMoments(population) for _ in range(2))
        elif isinstance(population, QueuePopulation):
            self.states.extend(Queue(population) for _ in range(2))
        self.lazy_map = LazyMap(refresh_every)
        self._prepared: tuple[Tensor, torch.device, Tensor | None, Factor] | None = None

    def forward(self, fake: Tensor, real: Tensor | None = None) -> Tensor:
        """The loss of one batch.

        Args:
            fake: Generated features, shape (n, d), or images (n, c, h, w) with an encoder.
            real: Real features or images, of any number; needed without a reference. No gradient passes to them.

        Returns:
            A scalar in the dtype of the features, at least float32, differentiable once in `fake`.

        Raises:
            ValueError: For features that are no sample, or a missing or superfluous `real`.
        """
        features, reals = self.encoded(fake, real)
        white = self.whitening(features, reals)
        features, reals = self.whitened(features, white), None if reals is None else self.whitened(reals, white)
        return self.normalised(regress(features, *self.solve(features, reals)))

    @torch.no_grad()
    def observe(self, fake: Tensor, real: Tensor | None = None) -> None:
        """Add a batch to the population without a loss: fills a queue or warms up moving averages.

        Args:
            fake: Generated features or images.
            real: Real features or images; needed without a reference.
        """
        features, reals = self.encoded(fake, real)
        white = self.whitening(features, reals)
        for state, side in zip(self.states, (features, reals), strict=False):
            if side is not None:
                rows = ranks.current().gather_rows(self.whitened(side, white).double())[0]
                state.push(rows) if isinstance(state, Queue) else cast("MovingMoments", state).mix(rows)

    @contextmanager
    def virtual_batch(self) -> Iterator[VirtualBatch]:
        """Exact gradients of one large batch from micro-batches, in two passes.

        First every micro-batch goes through `observe` (without a graph), then again, in the same order, through
        `loss`, whose results are to be backpropagated one by one: their gradients add up to the whole batch's.
        Both passes must see the same features, so there must be no batch normalisation in training mode across
        micro-batches, and the same random state in both; features that differ are refused.

        Yields:
            An object with `observe(fake, real=None)` and `loss(fake)`.
        """
        batch = VirtualBatch(self)
        yield batch
        batch.finish()  # not reached, and not wanted, after an exception

    def encoded(self, fake: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Features of both sides, checked.

        Args:
            fake: Generated features or images.
            real: Real features or images, or None with a reference.

        Returns:
            Generated features with their graph, real features without one.

        Raises:
            ValueError: For features that are no sample, of two widths, or a missing or superfluous `real`.
        """
        if (real is None) == (self.reference is None):
            came = "both" if real is not None else "neither"
            raise ValueError(f"real: expected real features or a reference, got {came}")
        features = self.encode("fake", fake)
        with torch.no_grad():
            reals = None if real is None else self.encode("real", real).detach()
        width = self.reference.dim if reals is None else reals.shape[1]  # type: ignore[union-attr]
        if width != features.shape[1]:
            raise ValueError(f"real: expected features of width {features.shape[1]} as fake has, got {width}")
        return features, reals

    def encode(self, name: str, side: Tensor) -> Tensor:
        """Features of one side.

        Args:
            name: Its name, for messages.
            side: Features or images.

        Returns:
            Features, shape (n, d).
        """
        features = side if self.encoder is None else check_features(self.encoder(side), side.shape[0])
        check_tensor(name, features, ndim=2, finite=True, nonempty=True)
        return features

    @torch.no_grad()
    def whitening(self, features: Tensor, reals: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """What both samples are whitened by.

        Args:
            features: Generated features of this rank.
            reals: Real features of this rank, or None with a reference.

        Returns:
            Mean (d,) and factor L (d, d) of the real features of every rank, or None without `whiten`.
        """
        if self.normalize != "whiten":
            return None
        if reals is None:
            lower = cast("Tensor", self._target(features.device)[0])
            return cast("FeatureStats", self.reference).mean, lower
        mean, covariance = moments(ranks.current().gather_rows(reals.double())[0])
        return mean, whitener(covariance, self.epsilon)

    def whitened(self, rows: Tensor, white: tuple[Tensor, Tensor] | None) -> Tensor:
        """Features in the space in which they are compared.

        Args:
            rows: Features, shape (n, d).
            white: What `whitening` returned.

        Returns:
            Features, shape (n, d).
        """
        return rows if white is None else whiten(rows, *(t.to(rows.device) for t in white))

    @torch.no_grad()
    def solve(self, features: Tensor, reals: Tensor | None) -> Solution:
        """Distance of the populations and its gradient, after the batch has been added to them.

        Args:
            features: Generated features of this rank, whitened if they are to be, shape (n, d).
            reals: Real features of this rank, or None with a reference.

        Returns:
            Distance, the same on every rank, and the gradient in this rank's rows times the number of ranks, (n, d).

        Raises:
            ValueError: If all ranks together have fewer than two rows.
        """
        rows, first = ranks.current().gather_rows(features.double())
        everyone = None if reals is None else ranks.current().gather_rows(reals.double())[0]
        for name, side in (("fake", rows), ("real", everyone)):
            if side is not None and side.shape[0] < 2:
                raise ValueError(f"{name}: expected at least two samples, got shape {tuple(side.shape)}")
        by = self._by_moving_averages if isinstance(self.population, EMAPopulation) else self._by_rows
        value, gradient = by(rows, everyone)
        return value, gradient[first : first + features.shape[0]] * ranks.current().size

    def normalised(self, loss: Tensor, value: Tensor | None = None) -> Tensor:
        """`sg`: the loss over its own detached value plus the constant.

        Args:
            loss: The loss.
            value: Its value, where `loss` is only a part of it.

        Returns:
            The loss as it is differentiated.
        """
        if self.normalize != "sg":
            return loss
        return loss / ((loss if value is None else value.to(loss)).detach().abs() + self.constant)

    def _by_rows(self, rows: Tensor, reals: Tensor | None) -> Solution:
        fakes, n = rows, rows.shape[0]
        queued = isinstance(self.population, QueuePopulation)
        if queued:
            fakes = cast("Queue", self.states[0]).push(rows)
            reals = None if reals is None else cast("Queue", self.states[1]).push(reals)
        if queued and self.plan == "gaussian":  # far more rows than features: moments are cheaper than factors
            target = self._target(rows.device)[1] if reals is None else FeatureStats.from_features(reals).factor(0)
            transport = map_to_root(*moments(fakes), target)
            value, gradient = transport.distance, 2 * (rows - transport(rows)) / fakes.shape[0]
        elif reals is None:
            value, gradient = value_and_gradient(fakes, self._target(rows.device)[1], ddof=0)
        else:
            value, gradient = self._plan(fakes, reals)
        weight = n / fakes.shape[0] if self.rescale else 1.0  # 1 - beta
        return value, gradient[:n] / weight

    def _by_moving_averages(self, rows: Tensor, reals: Tensor | None) -> Solution:
        own, other = (cast("MovingMoments", state) for state in self.states)
        beta = own.mix(rows)
        if reals is not None:
            other.mix(reals)

        def fresh() -> GaussianMap:
            if reals is None:
                return map_to_root(own.mean, own.covariance, self._target(rows.device)[1])
            return gaussian_map(own.mean, own.covariance, other.mean, other.covariance)

        transport = self.lazy_map.get(fresh)
        weight = 1.0 if self.rescale else 1 - beta
        return transport.distance, weight * 2 * (rows - transport(rows)) / rows.shape[0]

    def _target(self, device: torch.device) -> tuple[Tensor | None, Factor]:
        # the reference as it is compared with, and its whitener; computed once for as long as it stays the same
        reference = cast("FeatureStats", self.reference)
        if self._prepared is None or self._prepared[0] is not reference.scatter or self._prepared[1] != device:
            factor, lower = reference.factor(0), None
            mean, root = factor.mean, factor.factor / factor.scale
            if self.normalize == "whiten":
                lower = whitener(reference.covariance(0), self.epsilon)
                mean, root = torch.zeros_like(mean), whiten(root, torch.zeros_like(mean), lower)  # F L^-T
                lower = lower.to(device)
            self._prepared = reference.scatter, device, lower, Factor(mean.to(device), root.to(device))
        return self._prepared[2:]

    def get_extra_state(self) -> Tensor:
        """State of the random directions; part of `state_dict`, as the populations' buffers are.

        Returns:
            The generator's state, uint8.
        """
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Take over a state.

        Args:
            state: What `get_extra_state` returned.
        """
        self.generator.set_state(state.cpu())


class MultiEncoderLoss(nn.Module):
    """Sum of losses in several feature spaces, usually each normalised by `sg` so that none dominates.

    Args:
        losses: Losses, each with its own encoder.
        weights: Weight of each; 1 by default.

    Source:
        arXiv 2604.28190.
    """

    def __init__(self, losses: Sequence[TransportLoss], weights: Sequence[float] | None = None) -> None:
        super().__init__()
        if not losses:
            raise ValueError("losses: expected at least one, got none")
        if weights is not None and len(weights) != len(losses):
            raise ValueError(f"weights: expected {len(losses)} numbers, got {len(weights)}")
        self.losses = nn.ModuleList(losses)
        self.weights = list(weights or [1.0] * len(losses))

    def forward(self, fake: Tensor, real: Tensor | None = None) -> Tensor:
        """Weighted sum of the losses.

        Args:
            fake: Generated images.
            real: Real images; needed by losses without a reference, ignored by the others.

        Returns:
            A scalar.
        """
        total = fake.new_zeros((), dtype=wide(fake.dtype))
        for weight, loss in zip(self.weights, self.losses, strict=True):
            given = real if cast("TransportLoss", loss).reference is None else None
            total = total + weight * loss(fake, given).to(total.dtype)
        return total
