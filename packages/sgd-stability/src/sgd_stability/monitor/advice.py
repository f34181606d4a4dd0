"""Which rate, which batch size, which samples: a short pilot run under the scheduler, summed up."""

import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from core_tensor.checks import check_number
from torch import nn

from sgd_stability.curvature.data import Data, collect
from sgd_stability.curvature.losses import LossValues, resolve_loss
from sgd_stability.curvature.network import call, take
from sgd_stability.monitor.monitor import StabilityMonitor
from sgd_stability.monitor.scheduler import StabilityScheduler
from sgd_stability.report.check import Check
from sgd_stability.report.optimizers import read_optimizer
from sgd_stability.theory.bounds import momentum_stability
from sgd_stability.theory.sampling import Sampling, powers_of_two

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1.0),
    "momentum": lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=1.0),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1.0),
}
"""Optimizers by the name that the command line knows them by; keep in line with `cli.OPTIMIZERS`."""


@dataclass(frozen=True)
class Advice:
    """What a pilot run found.

    Attributes:
        lr: Learning rate to use: where the scheduler settled.
        low: Tenth percentile of the rates that single checks would have asked for.
        high: Ninetieth percentile.
        warmup: Steps over which to warm up to it.
        batch_size: Batch size of the pilot.
        largest_batch_size: Largest batch size that pays: up to here twice the batch bears at least 1.5 times the rate.
        culprits: Samples that cap the rate: how many of the checks named each, most often first.
        checks: Number of checks behind this.
        start_loss: Loss of the probe before the pilot.
        loss: After it.
        confidence: `"high"` if single checks agree within a factor of 2 and the loss fell, `"low"` if it did not fall
            or they differ by more than 8, else `"medium"`.
    """

    lr: float
    low: float
    high: float
    warmup: int
    batch_size: int
    largest_batch_size: int
    culprits: dict[int, int]
    checks: int
    start_loss: float
    loss: float
    confidence: str

    def to_dict(self) -> dict[str, Any]:
        """The advice as JSON-ready values.

        Returns:
            Values by name.
        """
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}

    def __str__(self) -> str:
        caps = ", ".join(f"#{i} ({count} of {self.checks} checks)" for i, count in list(self.culprits.items())[:5])
        return (
            f"learning rate      {self.lr:.2g} (single checks: {self.low:.2g} to {self.high:.2g})\n"
            f"warmup             {self.warmup} steps, from a tenth of it\n"
            f"batch size         {self.largest_batch_size} is the largest that pays (pilot: {self.batch_size})\n"
            f"samples to look at {caps or '-'}\n"
            f"confidence         {self.confidence}: {self.checks} checks; loss {self.start_loss:.3g} -> {self.loss:.3g}"
        )


def advise(
    model: nn.Module,
    loss: str | nn.Module | LossValues,
    data: Data,
    *,
    optimizer: str | Callable[[Any], torch.optim.Optimizer] = "adamw",
    batch_size: int = 32,
    steps: int = 300,
    max_samples: int = 4096,
    probe_batch: int = 128,
    seed: int = 0,
) -> Advice:
    """Train a copy of the parameters for a while under `StabilityScheduler`, and sum up what it found.

    The model is left as it was.

    Args:
        model: The model, as it is before training.
        loss: As in `analyze`.
        data: Training data, as in `analyze`.
        optimizer: `"sgd"`, `"momentum"` (0.9), `"adam"`, `"adamw"`, or a function from parameters to an optimizer that
            the monitor understands.
        batch_size: Samples per step.
        steps: Steps of the pilot; it costs about half more than as many steps of training a small model.
        max_samples: Samples that the pilot trains on.
        probe_batch: Samples in the monitor's probe.
        seed: Seed of probe and batches.

    Returns:
        The advice.

    Raises:
        ValueError: If an argument is out of range, or no check of the pilot was possible.
    """
    check_number("steps", steps, low=20, integer=True)
    check_number("batch_size", batch_size, low=1, integer=True)
    build = OPTIMIZERS.get(optimizer) if isinstance(optimizer, str) else optimizer
    if build is None:
        raise ValueError(f"optimizer: expected one of {', '.join(OPTIMIZERS)} or a function, got {optimizer!r}")
    samples = collect(data, max_samples=max_samples, seed=seed, like=next(model.parameters(), None))
    parameters = [p for p in model.parameters() if p.requires_grad]
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    monitor = StabilityMonitor(
        model, loss, (samples.inputs, samples.targets), batch_size=batch_size, probe_batch=probe_batch, directions=1,
        on_unstable=None, seed=seed,
    )  # fmt: skip
    monitor.set_size(samples.n)
    try:
        engine = build(parameters)
        # no decay at the end: the rate that the last third of the run settles at is what is asked for
        scheduler = StabilityScheduler(engine, monitor, total_steps=steps, every=max(1, steps // 20), decay=0.0)
        resolved = resolve_loss(loss)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            which = torch.randperm(len(samples.targets), generator=generator)[: monitor.batch_size]
            engine.zero_grad()
            outputs = call(model, take(samples.inputs, which))
            resolved.values(outputs, samples.targets[which]).mean().backward()
            engine.step()
            scheduler.step()
        return _summary(monitor, scheduler, engine, samples.ids.tolist())
    finally:
        monitor.detach()
        model.load_state_dict(before)
        model.zero_grad()


def _summary(
    monitor: StabilityMonitor, scheduler: StabilityScheduler, optimizer: torch.optim.Optimizer, ids: list[int]
) -> Advice:
    """From the checks of the last two thirds of the run."""
    useful = [c for c in monitor.history if c.state != "diverged" and 0 < c.lower < math.inf]
    late = [c for c in useful if c.step >= scheduler.total_steps / 3] or useful
    if not late:
        raise ValueError("model: expected a pilot run with a check that succeeds, got none; its loss was not finite")
    asked = sorted(scheduler.share * c.lower for c in late)
    rate = statistics.geometric_mean(scheduler.rates[-max(1, len(scheduler.rates) // 3) :])
    warmup = next((i for i, r in enumerate(scheduler.rates) if r >= 0.7 * rate), len(scheduler.rates))
    names: dict[int, int] = {}
    for check in late:
        for place in check.culprits[:3]:
            names[ids[place]] = names.get(ids[place], 0) + 1
    start, end = monitor.start_loss, monitor.history[-1].average_loss
    low, high = asked[len(asked) // 10], asked[-1 - len(asked) // 10]
    spread = high / low
    fell = end < start
    return Advice(
        lr=rate,
        low=low,
        high=high,
        warmup=warmup,
        batch_size=monitor.batch_size,
        largest_batch_size=_largest_that_pays(late, monitor, optimizer),
        culprits=dict(sorted(names.items(), key=lambda entry: -entry[1])),
        checks=len(late),
        start_loss=start,
        loss=end,
        confidence="low" if not fell or spread > 8 else "high" if spread <= 2 else "medium",
    )


def _largest_that_pays(late: list[Check], monitor: StabilityMonitor, optimizer: torch.optim.Optimizer) -> int:
    """The last doubling of the batch that bears at least 1.5 times the rate, by the median curvatures."""
    update = read_optimizer(optimizer, monitor.parameters).update
    lambda1 = statistics.median(c.lambda1 for c in late)
    L = statistics.median(c.max_sample_curvature for c in late)
    sizes = powers_of_two(monitor.n)
    bears = [momentum_stability(lambda1, L, Sampling(monitor.n, B, monitor.sampling), update).lr for B in sizes]
    largest = sizes[0]
    for B, a, b in zip(sizes[1:], bears[:-1], bears[1:], strict=True):
        if b < 1.5 * a:
            break
        largest = B
    return largest
