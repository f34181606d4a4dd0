"""Bars of training: what the monitor costs, whether it warns in time and not in vain, and the scheduler."""

import functools
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from core_tensor.dev.benchmarking import compare, seconds
from sgd_stability import StabilityMonitor, StabilityScheduler
from sgd_stability.demo import digits
from torch import Tensor, nn


@functools.cache
def digits_cnn() -> tuple[nn.Module, Tensor, Tensor]:
    """A CNN of three convolutions, 19,178 parameters, trained for an epoch on the digits."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip
    x, y = digits(1797)
    x = x.float().reshape(-1, 1, 8, 8)
    sgd = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for batch in torch.randperm(len(x)).split(32):
        sgd.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        sgd.step()
    return model, x, y


def mlp670k() -> tuple[nn.Module, Tensor, Tensor]:
    """784-512-512-10, 669,706 parameters, on generated inputs."""
    torch.manual_seed(0)
    layers = [nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)]
    return nn.Sequential(*layers), torch.randn(2048, 784), torch.randint(0, 10, (2048,))


class TokenModel(nn.Module):
    """Two pre-norm encoder layers of width 64 under a causal mask, 64 positions, 256 tokens: 137,000 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(256, 64), nn.Parameter(0.02 * torch.randn(64, 64))
        layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(64), enable_nested_tensor=False)
        self.out = nn.Linear(64, 256)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(64), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (n, T, V) of tokens (n, T)."""
        return self.out(self.layers(self.embed(tokens) + self.place, mask=self.mask, is_causal=True))


def token_model() -> tuple[nn.Module, Tensor, Tensor]:
    """The token model and 512 sequences of a random walk on the tokens."""
    torch.manual_seed(0)
    walk = (torch.randint(0, 256, (512, 1)) + torch.randint(-4, 5, (512, 65)).cumsum(1)) % 256
    return TokenModel(), walk[:, :-1], walk[:, 1:].contiguous()


OVERHEADS: dict[str, tuple[Callable[[], tuple[nn.Module, Tensor, Tensor]], str, Any]] = {
    "cnn_sgd": (lambda: digits_cnn(), "cross_entropy", functools.partial(torch.optim.SGD, lr=0.02, momentum=0.9)),
    "mlp670k_sgd": (mlp670k, "cross_entropy", functools.partial(torch.optim.SGD, lr=0.01)),
    "mlp670k_adam": (mlp670k, "cross_entropy", functools.partial(torch.optim.Adam, lr=1e-4)),
    "transformer_adam_tokens": (token_model, "token_cross_entropy", functools.partial(torch.optim.Adam, lr=1e-3)),
}
"""Model with its data, loss, and optimizer."""
EVERY = 200


def overhead(name: str, quick: bool) -> Mapping[str, Any]:
    """What a check costs over 200 training steps: batch 32, a probe of 256, all settings at their defaults.

    A check and ten steps are timed in turn: as a difference of two trainings a few per cent would drown in the
    machine's own ups and downs. The ratio is that of the sums, over as many checks as lie between two measurements of
    the sharper upper end, so that one of these is in it.
    """
    build, loss, optimize = OVERHEADS[name]
    model, x, y = build()
    optimizer = optimize(model.parameters())
    watcher = StabilityMonitor(model, loss, (x, y), batch_size=32, every=EVERY, on_unstable=None)
    generator = torch.Generator().manual_seed(0)

    def train() -> None:
        for _ in range(10):
            batch = torch.randint(len(x), (32,), generator=generator)
            optimizer.zero_grad()
            z = model(x[batch])
            nn.functional.cross_entropy(z.flatten(0, -2), y[batch].flatten()).backward()
            optimizer.step()

    def watch() -> None:
        for _ in range(EVERY):
            watcher._before_step()
            watcher._after_step()

    train()
    watcher.attach(optimizer)
    first = seconds(watcher.check)
    watcher.detach()
    hooks = watcher.attach(optimizer)._handles
    for handle in hooks:  # called by hand
        handle.remove()
    timing = compare(watch, train, pairs=4 if quick else 16)
    key = f"monitor_overhead_{name}"
    return {
        key: sum(timing.ours) / sum(timing.peer) * 10 / EVERY,
        f"{key}_detail": {
            **timing.spread(),
            "first_check_s": first,
            "parameters": sum(p.numel() for p in model.parameters()),
            "states": dict(Counter(check.state for check in watcher.history)),
        },
    }


SETTINGS: dict[str, tuple[Any, float, tuple[float, ...]]] = {
    "momentum": (functools.partial(torch.optim.SGD, momentum=0.9), 1.0, tuple(2.0**k for k in range(-7, -2))),
    "sgd": (torch.optim.SGD, 1.0, tuple(2.0**k for k in range(-3, 1))),
    "adam": (torch.optim.Adam, 1.0, tuple(2.0**k for k in range(-9, -4))),
    "sgd, inputs times 4": (torch.optim.SGD, 4.0, tuple(2.0**k for k in range(-6, 0))),
    "adam, inputs times 4": (torch.optim.Adam, 4.0, tuple(2.0**k for k in range(-10, -5))),
}
"""Optimizer, scale of the inputs, and a grid of rates that holds the best one inside."""
SEEDS = (5, 6, 7)
"""Of the scheduler's runs; its constants were chosen on others."""
STEPS, DECAY = 600, 0.3


def noisy_teacher(seed: int, scale: float) -> tuple[nn.Module, Tensor, Tensor]:
    """A ReLU network of 26,122 parameters, and 4,096 inputs with a decaying spectrum labelled by a noisy teacher."""
    g = torch.Generator().manual_seed(1000 + seed)
    spectrum = torch.arange(1, 65).float() ** -0.75
    x = torch.randn(4096, 64, generator=g) * spectrum * 8 / spectrum.norm()
    hidden = torch.tanh(x @ torch.randn(64, 64, generator=g) * 1.5 / 8)
    y = torch.multinomial((hidden @ torch.randn(64, 10, generator=g) * 4.5 / 8).softmax(1), 1, generator=g)[:, 0]
    torch.manual_seed(seed)
    layers = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)]
    return nn.Sequential(*layers), x * scale, y


def full_loss(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Training loss of all samples; infinite if it is not a number."""
    with torch.no_grad():
        loss = float(nn.functional.cross_entropy(model(x), y))
    return loss if np.isfinite(loss) else float("inf")


def trained(name: str, seed: int, lr: float | None) -> tuple[float, float]:
    """Loss after 600 steps of batch 32, at a fixed rate or (None) under the scheduler, and the CPU seconds it took."""
    build, scale, _ = SETTINGS[name]
    model, x, y = noisy_teacher(seed, scale)
    optimizer = build(model.parameters(), lr=1.0 if lr is None else lr)
    start = time.process_time()
    scheduler = None
    if lr is None:
        watcher = StabilityMonitor(
            model, "cross_entropy", (x, y), batch_size=32, probe_batch=128, directions=1, on_unstable=None, seed=seed
        )
        scheduler = StabilityScheduler(optimizer, watcher, total_steps=STEPS, decay=DECAY)
    g = torch.Generator().manual_seed(seed)
    for step in range(1, STEPS + 1):
        batch = torch.randint(len(x), (32,), generator=g)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        elif lr is not None:
            optimizer.param_groups[0]["lr"] = lr * min(1.0, (STEPS - step) / (STEPS * DECAY))
    spent = time.process_time() - start
    return full_loss(model, x, y), spent


def scheduler_run(name: str, seed: int, pairs: int) -> dict[str, Any]:
    """Loss under the scheduler over that of the best rate of the grid, and the CPU time over that of a fixed run.

    The latter is the median of pairs of runs that take turns.
    """
    grid = SETTINGS[name][2]
    best = min(trained(name, seed, lr)[0] for lr in grid)
    runs = [(trained(name, seed, None), trained(name, seed, grid[len(grid) // 2])) for _ in range(pairs)]
    cost = float(np.median([ours / fixed for (_, ours), (_, fixed) in runs]))
    return {"run": f"{name}, seed {seed}", "loss_over_best": runs[0][0][0] / best, "cost": cost}


def scheduler_summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Median and worst of the runs."""
    losses, costs = ([run[key] for run in runs] for key in ("loss_over_best", "cost"))
    return {
        "median": float(np.median(losses)),
        "worst": max(losses),
        "cost": float(np.median(costs)),
        "cost_worst": max(costs),
    }


def scheduler_bars(quick: bool) -> Mapping[str, Any]:
    """The scheduler's training loss over that of the best fixed rate of a grid under the same decay, and its cost."""
    runs = [scheduler_run(name, seed, 3 if quick else 5) for name in SETTINGS for seed in SEEDS[: 1 if quick else 3]]
    found = scheduler_summary(runs)
    return {
        "scheduler_vs_best_fixed_median": found["median"],
        "scheduler_vs_best_fixed_worst": found["worst"],
        "scheduler_cost": found["cost"],
        "scheduler_cost_worst": found["cost_worst"],
        "scheduler_vs_best_fixed_detail": {
            run["run"]: [round(run["loss_over_best"], 3), round(run["cost"], 2)] for run in runs
        },
    }


def watched(name: str, seed: int, lr: float, growth: float) -> tuple[StabilityMonitor, int | None]:
    """Train under a monitor that checks every 20 steps; returns it, and the step at which the training loss doubled.

    A growth of 1 trains for 600 steps with the decay of `trained`; above it the rate grows by that factor per step
    until the loss of all samples, looked at every 10 steps, is twice what it has been.
    """
    build, scale, _ = SETTINGS[name]
    model, x, y = noisy_teacher(seed, scale)
    optimizer = build(model.parameters(), lr=lr)
    watcher = StabilityMonitor(model, "cross_entropy", (x, y), batch_size=32, every=20, on_unstable=None, seed=seed)
    watcher.attach(optimizer)
    g, least = torch.Generator().manual_seed(seed), float("inf")
    for step in range(1, STEPS + 1 if growth == 1 else 4001):
        batch = torch.randint(len(x), (32,), generator=g)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        if growth == 1:
            optimizer.param_groups[0]["lr"] = lr * min(1.0, (STEPS - step) / (STEPS * DECAY))
            continue
        optimizer.param_groups[0]["lr"] = lr * growth**step
        if step % 10 == 0:
            loss = full_loss(model, x, y)
            least = min(least, loss)
            if loss > 2 * least:
                return watcher, step
    return watcher, None


RAMPS = tuple((name, seed) for name in ("sgd", "momentum", "adam") for seed in (4, 5))
"""Optimizers and seeds; the monitor's constants were chosen on seeds 0 and 1."""


def ramp_run(name: str, seed: int) -> dict[str, Any]:
    """A run at the best rate of the grid, and a ramp from an eighth of it until the loss has doubled."""
    grid = SETTINGS[name][2]
    best = grid[int(np.argmin([trained(name, seed, lr)[0] for lr in grid]))]
    at_best = watched(name, seed, best, 1.0)[0].history
    watcher, doubled = watched(name, seed, best / 8, 1.005)
    first = {
        state: next((c.step for c in watcher.history if c.state == state), None)
        for state in ("caution", "unstable", "diverged")
    }
    return {
        "run": f"{name}, seed {seed}",
        "best_rate": best,
        "at_best": dict(Counter(check.state for check in at_best)),
        **first,
        "loss_doubled": doubled,
    }


def ramp_summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many ramps had an alarm in time, and the share of false ones.

    On a ramp caution counts as an alarm, at the best rate it does not: there only unstable and diverged are false.
    """
    states = sum((Counter(run["at_best"]) for run in runs), Counter[str]())

    def in_time(kinds: Sequence[str]) -> int:
        firsts = [[run[kind] for kind in kinds if run[kind] is not None] for run in runs]
        return sum(
            bool(steps) and (run["loss_doubled"] is None or min(steps) < run["loss_doubled"])
            for run, steps in zip(runs, firsts, strict=True)
        )

    return {
        "before_doubling": in_time(("caution", "unstable", "diverged")),
        "false_share": (states["unstable"] + states["diverged"]) / states.total(),
        "ramps": len(runs),
        "unstable_or_diverged_before_doubling": in_time(("unstable", "diverged")),
        "caution_at_best_rate": states["caution"] / states.total(),
        "checks_at_best_rate": states.total(),
    }


def ramps(_: bool) -> Mapping[str, Any]:
    """Does an alarm come before the loss doubles, and how often does it come at the best fixed rate of a grid?"""
    runs = [ramp_run(name, seed) for name, seed in RAMPS]
    found = ramp_summary(runs)
    return {
        "ramp_alarms_before_doubling": found.pop("before_doubling"),
        "false_alarms_at_best_rate": found.pop("false_share"),
        "ramp_alarms_before_doubling_detail": {**found, **{run["run"]: run for run in runs}},
    }
