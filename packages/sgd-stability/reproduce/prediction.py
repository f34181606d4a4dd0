"""Does the monitor see an instability coming? A converged checkpoint is trained on at a rate that is too large.

    python packages/sgd-stability/reproduce/prediction.py [--quick] [--only checkpoint|scratch] [-o FOLDER]

A CNN that has learnt 64 digits to rounding (squared error), its weights perturbed a little, goes on with SGD.
Jumps: at a multiple of the exact threshold eta* from the start, where the monitor is asked before the first step. Rise:
from half of eta*, growing by a fixed factor per step, with a check every fortieth, where the full analysis settles what
the monitor's band leaves undecided. Noted are the first check that says "unstable", the first that the band alone
would have called so, the first with lambda1 > 2 / rate (the edge of full-batch training), and the first step after
which the loss over all samples exceeds `JUMP` times its greatest value so far below eta* (jumps: its value at the
start).

Also one run from scratch whose rate grows tenfold: training stabilises itself, and the sharpness follows its edge.
Writes `prediction.json`, `prediction.png` and `edge.png`; seeds that are in the file already are not repeated (delete
it to start anew).
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from _options import Options, options
from core_tensor.app.cli import progress
from core_tensor.app.files import read_json, write_json
from sgd_stability import Check, StabilityMonitor, analyze
from sgd_stability.demo import digits
from sgd_stability.report.nonlinear import interpolate
from torch import Tensor, nn

SEEDS = 3
SAMPLES, BATCH, EVERY, PERTURBATION = 64, 2, 40, 1e-4
FACTORS = (0.5, 0.8, 1.2, 1.5, 2.0)
AFTER = 400
"""Steps after a jump."""
GROWTH, RISE = 1.002, 700
"""Factor per step and steps of a rise: from half of the threshold to twice it."""
JUMP = 2.0
Losses = list[tuple[int, float]]


def network(seed: int) -> nn.Module:
    """Two convolutions and a linear layer, 5,642 parameters."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 24, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(24 * 16, 10),
    ).double()  # fmt: skip


class Training:
    """A network, its data, plain SGD, and the monitor that watches."""

    def __init__(self, seed: int, *, samples: int = SAMPLES, every: int = EVERY, every_cheap: int = 0) -> None:
        x, labels = digits(samples)
        self.x, self.y = x.reshape(-1, 1, 8, 8), nn.functional.one_hot(labels, 10).double()
        self.model = network(seed)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)
        self.monitor = StabilityMonitor(
            self.model, "squared_error", (self.x, self.y), batch_size=BATCH, every=every, every_cheap=every_cheap,
            on_unstable=None, directions=1, seed=seed,
        )  # fmt: skip
        self.generator = torch.Generator().manual_seed(seed)

    def loss(self, which: Tensor | slice = slice(None)) -> Tensor:
        """Half the squared error, mean over samples."""
        return (self.model(self.x[which]) - self.y[which]).square().sum(1).mean() / 2

    def run(self, lr: float, steps: int, *, growth: float = 1.0, stop: float = float("inf")) -> Losses:
        """Train, watched; the loss over all samples after every step, until it passes `stop`."""
        self.monitor.steps = 0
        self.monitor.history.clear()
        self.optimizer.param_groups[0]["lr"] = lr
        self.monitor.attach(self.optimizer).check()
        losses = []
        for step in range(1, steps + 1):
            self.optimizer.param_groups[0]["lr"] = lr * growth**step
            self.optimizer.zero_grad()
            self.loss(torch.randperm(len(self.x), generator=self.generator)[:BATCH]).backward()
            self.optimizer.step()
            with torch.no_grad():
                losses.append((step, float(self.loss())))
            if not losses[-1][1] < stop:
                break
        self.monitor.detach()
        return losses

    def first(self, event: Callable[[Check], bool]) -> int | None:
        """Step of the first check at which an event holds."""
        return next((c.step for c in self.monitor.history if event(c)), None)


def seed_runs(seed: int, chosen: Options) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All jumps and the rise from one checkpoint."""
    training = Training(seed)
    interpolate(training.model, training.x, training.y)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in training.model.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=PERTURBATION)
        begin = float(training.loss())
    weights = {name: value.clone() for name, value in training.model.state_dict().items()}
    star = analyze(training.model, "squared_error", (training.x, training.y)).lr_threshold(BATCH).exact
    jumps = []
    for factor in FACTORS:
        training.model.load_state_dict(weights)
        losses = training.run(factor * star, 60 if chosen.quick else AFTER, stop=1e3 * begin)
        before = training.monitor.history[0]
        jumps.append(
            {
                "seed": seed,
                "factor": factor,
                "threshold": star,
                "verdict": band_verdict(before),
                "beyond_edge": before.lambda1 > before.edge,
                "loss_shows": events(training, losses, begin)["loss_shows"],
            }
        )
    training.model.load_state_dict(weights)
    training.monitor.settle = True
    losses = training.run(star / 2, RISE, growth=GROWTH, stop=1e-2)
    below = max(loss for step, loss in losses if GROWTH**step <= 2)  # rate up to the threshold
    rise = {"seed": seed, "threshold": star, **events(training, losses, below)}
    for name in ("alarm", "band_alarm", "sharpness_edge", "loss_shows"):
        rise[f"rate_at_{name}"] = None if rise[name] is None else GROWTH ** rise[name] / 2
    rise["lead"] = rise["loss_shows"] - rise["alarm"] if rise["alarm"] and rise["loss_shows"] else None
    if seed == 0:
        training.monitor.plot(chosen.out / "prediction.png", losses=losses)
    return jumps, rise


def band_verdict(check: Check) -> str:
    """What the band alone says of the rate: the state would wait for the loss to rise."""
    if check.lr > check.upper:
        return "unstable"
    return "stable" if check.lr < check.lower else "undecided"


def events(training: Training, losses: Losses, reference: float) -> dict[str, int | None]:
    """When the monitor, the sharpness and the loss spoke."""
    return {
        "alarm": training.first(lambda c: c.state in {"unstable", "diverged"}),
        "band_alarm": training.first(lambda c: c.lr > c.upper),
        "sharpness_edge": training.first(lambda c: c.lambda1 > c.edge),
        "loss_shows": next((step for step, loss in losses if not loss <= JUMP * reference), None),
    }


def table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over the seeds: what the monitor said before the first step after a jump, and when the loss showed it."""
    found = []
    for factor in FACTORS:
        chosen = [r for r in rows if r["factor"] == factor]
        steps = [r["loss_shows"] for r in chosen if r["loss_shows"] is not None]
        found.append(
            {
                "factor": factor,
                "runs": len(chosen),
                **{state: sum(r["verdict"] == state for r in chosen) for state in ("stable", "undecided", "unstable")},
                "beyond_edge": sum(r["beyond_edge"] for r in chosen),
                "loss_rises": len(steps),
                "median_step": statistics.median(steps) if steps else None,
            }
        )
    return found


def from_scratch(chosen: Options) -> None:
    """The sharpness follows its edge while the rate grows tenfold."""
    training = Training(0, samples=128, every=20, every_cheap=20)
    steps = 300 if chosen.quick else 2400
    losses = training.run(0.05, steps, growth=10 ** (1 / steps))
    training.monitor.plot(chosen.out / "edge.png", losses=losses)


def main() -> None:
    """All seeds, and the pictures."""
    chosen = options(__doc__, ("checkpoint", "scratch"))
    if "checkpoint" in chosen.only:
        from_checkpoints(chosen)
    if "scratch" in chosen.only:
        from_scratch(chosen)


def from_checkpoints(chosen: Options) -> None:
    """Jumps and rises of all seeds; those of an earlier call stay."""
    path = chosen.out / "prediction.json"
    held = read_json(path) if path.exists() else {"runs": [], "rises": []}
    jumps, rises = held["runs"], held["rises"]
    for seed in progress(range(1 if chosen.quick else SEEDS), "checkpoints", unit="seed"):
        if any(rise["seed"] == seed for rise in rises):
            continue
        found, rise = seed_runs(seed, chosen)
        jumps += found
        rises.append(rise)
        write_json(path, {"jumps": table(jumps), "rises": rises, "runs": jumps})


if __name__ == "__main__":
    main()
