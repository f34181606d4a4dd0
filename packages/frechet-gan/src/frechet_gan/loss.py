r"""One loss for every transport plan: regress generated features towards the targets of a fixed plan.

For a batch f of n features with real features (or their statistics) the loss has the value of the plan's distance
and the gradient $\frac2n (f_i - m_i)$, so that it needs no matrix root's autograd, is exact under data parallelism
with plain gradient averaging, and can be split exactly into micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from core_tensor.checks import check_choice, check_number
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from frechet_gan.distance import OnceDifferentiable, check_sample, frechet_distance
from frechet_gan.distributed import gather_rows, world
from frechet_gan.encoders import Encoder, check_features
from frechet_gan.gaussian import GaussianMap, gaussian_map
from frechet_gan.plans import PLANS, PlanName, PlanOptions, Solution
from frechet_gan.populations import BatchPopulation, EMAPopulation, MovingMoments, Population, Queue, QueuePopulation
from frechet_gan.stats import FeatureStats
from frechet_gan.whitening import moments, whiten, whitener

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
        if normalize == "whiten" and isinstance(population, EMAPopulation) and reference is None:
            raise ValueError("normalize: expected a reference with whiten and moving averages")
        self.plan, self.population, self.normalize = plan, population, normalize
        self.reference = reference
        self.refresh_every, self.rescale = refresh_every, rescale
        self.encoder = encoder
        self.options = options or PlanOptions()
        self.constant, self.epsilon = constant, epsilon
        self.generator = torch.Generator().manual_seed(seed)
        self._steps = 0
        self._map: GaussianMap | None = None
        # reals have a population of their own where there is no reference
        self._states: list[MovingMoments | Queue] = []
        if isinstance(population, EMAPopulation):
            self._states = [MovingMoments(population) for _ in range(2)]
        elif isinstance(population, QueuePopulation):
            self._states = [Queue(population) for _ in range(2)]

    def forward(self, fake: Tensor, real: Tensor | None = None) -> Tensor:
        """The loss of one batch.

        Args:
            fake: Generated features, shape (n, d), or images (n, c, h, w) with an encoder.
            real: Real features or images, of their own number; needed without a reference. No gradient passes to them.

        Returns:
            A scalar in the dtype of the features, differentiable once in `fake`.

        Raises:
            ValueError: For features that are no sample, or a missing or superfluous `real`.
        """
        features, targets = self._features(fake, real)
        value, gradient, first = self._solve(features, targets)
        local = gradient[first : first + features.shape[0]] * world()[1]
        return self._surrogate(features, value, local)

    @torch.no_grad()
    def observe(self, fake: Tensor, real: Tensor | None = None) -> None:
        """Add a batch to the population without a loss: fills a queue or warms up moving averages.

        Args:
            fake: Generated features or images.
            real: Real features or images; needed without a reference.
        """
        features, targets = self._features(fake, real)
        sides = (features, targets)
        for state, rows in zip(self._states, sides, strict=False):
            if rows is not None:
                self._add(state, gather_rows(rows.detach().double())[0])

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

    def _features(self, fake: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if (real is None) == (self.reference is None):
            raise ValueError(
                "real: expected real features or a reference, got " + ("both" if real is not None else "neither")
            )
        if self.encoder is not None:
            fake = check_features(self.encoder(fake), fake.shape[0])
            if real is not None:
                with torch.no_grad():
                    real = check_features(self.encoder(real), real.shape[0])
        for name, side in (("fake", fake), ("real", real)):
            if side is not None and world()[1] == 1:
                check_sample(name, side)
        width = fake.shape[1]
        other = self.reference.dim if self.reference is not None else cast("Tensor", real).shape[1]
        if other != width:
            raise ValueError(f"real: expected features of width {width} as fake has, got {other}")
        if real is not None:
            real = real.detach()
        if self.normalize == "whiten":
            if real is None:
                return self._whitened_by_reference(fake), None
            mean, covariance = moments(gather_rows(real.double())[0])
            lower = whitener(covariance, self.epsilon)
            return whiten(fake, mean, lower), whiten(real, mean, lower)
        return fake, real

    def _whitened_by_reference(self, fake: Tensor) -> Tensor:
        reference = cast("FeatureStats", self.reference)
        lower = whitener(reference.covariance(0), self.epsilon)
        return whiten(fake, reference.mean.to(fake.device), lower.to(fake.device))

    @torch.no_grad()
    def _solve(self, fake: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor, int]:
        # distance and gradient over the rows of every rank, and the index of this rank's first row
        rows, first = gather_rows(fake.detach().double())
        check_sample("fake", rows)
        reals = None if real is None else gather_rows(real.double())[0]
        if isinstance(self.population, EMAPopulation):
            value, gradient = self._by_moving_averages(rows, reals)
        else:
            value, gradient = self._by_rows(rows, reals)
        return value, gradient, first

    def _by_rows(self, rows: Tensor, reals: Tensor | None) -> Solution:
        fakes = rows
        if isinstance(self.population, QueuePopulation):
            queues = cast("list[Queue]", self._states)
            fakes = queues[0].joined(rows)
            queues[0].push(rows)
            if reals is not None:
                joined = queues[1].joined(reals)
                queues[1].push(reals)
                reals = joined
        if reals is None:
            value, gradient = self._against_reference(fakes)
        elif self.plan == "gaussian" and isinstance(self.population, QueuePopulation):  # far more rows than features
            transport = gaussian_map(*moments(fakes), *moments(reals))
            value, gradient = transport.distance, 2 * (fakes - transport(fakes)) / fakes.shape[0]
        else:
            value, gradient = PLANS[self.plan](fakes, reals, self.options, self.generator)
        weight = rows.shape[0] / fakes.shape[0]  # 1 - beta
        return value, gradient[: rows.shape[0]] / (weight if self.rescale else 1.0)

    def _against_reference(self, fakes: Tensor) -> Solution:
        mean, covariance = self._reference_moments()
        reference = FeatureStats.from_moments(mean.to(fakes.device), covariance.to(fakes.device), 2, ddof=0)
        with torch.enable_grad():
            x = fakes.requires_grad_()
            value = frechet_distance(x, reference, ddof=0)
        return value.detach(), torch.autograd.grad(value, x)[0]

    def _by_moving_averages(self, rows: Tensor, reals: Tensor | None) -> Solution:
        states = cast("list[MovingMoments]", self._states)
        beta = states[0].mix(FeatureStats.from_features(rows))
        if reals is not None:
            states[1].mix(FeatureStats.from_features(reals))
        if self._map is None or self._steps % self.refresh_every == 0:
            real = self._reference_moments() if reals is None else states[1].moments()
            self._map = gaussian_map(*states[0].moments(), *real)
        self._steps += 1
        weight = 1.0 if self.rescale else 1 - beta
        return self._map.distance, weight * 2 * (rows - self._map(rows)) / rows.shape[0]

    def _reference_moments(self) -> tuple[Tensor, Tensor]:
        reference = cast("FeatureStats", self.reference)
        mean, covariance = reference.mean, reference.covariance(0)
        if self.normalize == "whiten":
            zero, lower = torch.zeros_like(mean), whitener(covariance, self.epsilon)
            once = whiten(covariance, zero, lower)  # rows of Sigma L^-T
            return zero, whiten(once.mT, zero, lower)
        return mean, covariance

    def _add(self, state: MovingMoments | Queue, rows: Tensor) -> None:
        if isinstance(state, Queue):
            state.push(rows)
        else:
            state.mix(FeatureStats.from_features(rows))

    def _surrogate(self, features: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        value = value.to(features.dtype)
        loss: Tensor = _Regression.apply(features, value, gradient.to(features.dtype))
        return loss / (value.abs() + self.constant) if self.normalize == "sg" else loss

    def get_extra_state(self) -> dict[str, Any]:
        """State of the population, the map and the random directions; part of `state_dict`.

        Returns:
            Tensors and numbers.
        """
        held = self._map
        return {
            "populations": [state.state() for state in self._states],
            "steps": self._steps,
            "map": None if held is None else [held.source, held.target, held.matrix, held.distance],
            "generator": self.generator.get_state(),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over a state.

        Args:
            state: What `get_extra_state` returned.
        """
        for own, saved in zip(self._states, state["populations"], strict=True):
            own.load(saved)
        self._steps = state["steps"]
        self._map = None if state["map"] is None else GaussianMap(*state["map"])
        self.generator.set_state(state["generator"])


class VirtualBatch:
    """The two passes of `TransportLoss.virtual_batch`.

    Args:
        loss: The loss.
    """

    def __init__(self, loss: TransportLoss) -> None:
        self._loss = loss
        self._seen: list[tuple[Tensor, Tensor | None]] = []
        self._solution: tuple[Tensor, Tensor, Tensor] | None = None
        self._next = 0

    @torch.no_grad()
    def observe(self, fake: Tensor, real: Tensor | None = None) -> None:
        """First pass: remember a micro-batch's features.

        Args:
            fake: Generated features or images.
            real: Real features or images that belong to the batch; needed without a reference.

        Raises:
            RuntimeError: If the second pass has begun.
            ValueError: If the loss whitens by the batch's own reals, of which a micro-batch has only a part.
        """
        if self._solution is not None:
            raise RuntimeError("virtual_batch: observe every micro-batch before the first loss")
        if self._loss.normalize == "whiten" and real is not None:
            raise ValueError(
                "virtual_batch: whiten needs a reference, because a micro-batch's reals are not the batch's"
            )
        features, reals = self._loss._features(fake, real)
        self._seen.append((features.detach().double(), None if reals is None else reals.double()))

    def loss(self, fake: Tensor) -> Tensor:
        """Second pass: the part of the loss that belongs to the next micro-batch.

        Args:
            fake: The same images or features as in the first pass, now with a graph.

        Returns:
            A scalar; over the micro-batches, values and gradients add up to the whole batch's.

        Raises:
            ValueError: If the features are not those of the first pass, or there are more of them.
        """
        if self._solution is None:
            self._solution = self._solve()
        value, gradient, rows = self._solution
        loss = self._loss
        features = fake if loss.encoder is None else check_features(loss.encoder(fake), fake.shape[0])
        if loss.normalize == "whiten":
            features = loss._whitened_by_reference(features)
        start, stop = self._next, self._next + features.shape[0]
        if stop > rows.shape[0]:
            raise ValueError(f"fake: expected at most {rows.shape[0] - start} more features, got {features.shape[0]}")
        gap = float((features.detach().double() - rows[start:stop]).abs().max())
        if not gap <= 1e-4 * float(rows.abs().max()):
            raise ValueError(
                f"fake: expected the features of the first pass, got a difference of {gap:.3g}; batch normalisation "
                "in training mode or another random state between the passes makes virtual batches inexact"
            )
        self._next = stop
        share = features.shape[0] / rows.shape[0]
        local: Tensor = _Regression.apply(
            features, (value * share).to(features.dtype), gradient[start:stop].to(features.dtype)
        )
        return local / (float(value.abs()) + loss.constant) if loss.normalize == "sg" else local

    def finish(self) -> None:
        """Check that the second pass saw every feature of the first.

        Raises:
            RuntimeError: If it did not.
        """
        total = sum(f.shape[0] for f, _ in self._seen)
        if self._next != total:
            raise RuntimeError(f"virtual_batch: the second pass saw {self._next} of {total} features")

    def _solve(self) -> tuple[Tensor, Tensor, Tensor]:
        if not self._seen:
            raise ValueError("virtual_batch: observe at least one micro-batch before the first loss")
        fake = torch.cat([f for f, _ in self._seen])
        reals = [r for _, r in self._seen if r is not None]
        value, gradient, first = self._loss._solve(fake, torch.cat(reals) if reals else None)
        return value, gradient[first : first + fake.shape[0]] * world()[1], fake


class MultiEncoderLoss(nn.Module):
    """Sum of losses in several feature spaces, usually each normalised by `sg` so that none dominates.

    Args:
        losses: Losses with encoders of their own.
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
        total = fake.new_zeros(())
        for weight, loss in zip(self.weights, self.losses, strict=True):
            given = real if cast("TransportLoss", loss).reference is None else None
            total = total + weight * loss(fake, given).to(total.dtype)
        return total


class _Regression(torch.autograd.Function):
    """A value with a gradient that was computed beside it."""

    @staticmethod
    def forward(ctx: FunctionCtx, features: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient, features)
        return value.clone()

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradient, features = ctx.saved_tensors  # type: ignore[attr-defined]
        return OnceDifferentiable.apply(gradient * grad, features), None, None
