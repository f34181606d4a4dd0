"""The demo: digits, a tanh network at its minimum, predicted learning rates, and SGD as the judge."""

from pathlib import Path
from typing import Any

import torch
from core_tensor.app.cli import progress
from core_tensor.app.extras import require
from torch import Tensor, nn

from sgd_stability.report.analysis import analyze
from sgd_stability.report.nonlinear import interpolate, run_sgd
from sgd_stability.report.plots import plot_map
from sgd_stability.theory.sampling import powers_of_two

EXTRA = "sgd-stability[demo]"


def digits(n: int, *, offset: int = 0) -> tuple[Tensor, Tensor]:
    """Scikit-learn's digits, scaled to mean 0 and size about 1.

    Args:
        n: Number of images.
        offset: First image.

    Returns:
        Images, float64, shape (n, 64), and classes, shape (n,).
    """
    data = require("sklearn.datasets", EXTRA).load_digits()
    x = torch.from_numpy(data.data[offset : offset + n]).double()
    return (x - 4.9) / 6.0, torch.from_numpy(data.target[offset : offset + n]).long()


def digits_network(seed: int, *, hidden: int = 48, outputs: int = 10) -> nn.Sequential:
    """A tanh network of two hidden layers, float64.

    Args:
        seed: Seed of the initialisation.
        hidden: Width.
        outputs: Outputs.

    Returns:
        The network.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Linear(64, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, outputs)]
        return nn.Sequential(*layers).double()


def run_demo(output: Path, *, seed: int = 0, n: int = 48, batch_sizes: tuple[int, ...] = (1, 4, 16)) -> dict[str, Any]:
    """Train to a minimum, predict, verify, draw.

    Args:
        output: Picture to write.
        seed: Seed.
        n: Digits to train on.
        batch_sizes: Batch sizes to verify at.

    Returns:
        The figures.
    """
    x, labels = digits(n)
    y = nn.functional.one_hot(labels, 10).double()
    model = digits_network(seed)
    loss = interpolate(model, x, y)
    report = analyze(model, "squared_error", (x, y))
    thresholds = {B: report.lr_threshold(B) for B in powers_of_two(n)}
    runs = [(B, factor, s) for B in batch_sizes for factor in (0.8, 1.2) for s in range(3)]
    trials = []
    for B, factor, s in progress(runs, "SGD below and above the prediction", unit="run"):
        trial = run_sgd(model, "squared_error", x, y, lr=factor * thresholds[B].exact, batch_size=B, seed=s)
        trials.append((trial, "returns" if factor < 1 else "leaves"))
    plot_map(
        report.stability_map(),
        output,
        f"digits, tanh network of {sum(p.numel() for p in model.parameters())} parameters at its minimum",
        [vars(trial) for trial, _ in trials],
    )
    return {
        "summary": str(report),
        "loss": loss,
        "lambda_max": report.lambda_max,
        "coherence": report.coherence,
        "culprits": [vars(c) for c in report.culprits()],
        "thresholds": [
            {"B": B, "stable_below": t.lower, "exact": t.exact, "unstable_above": t.upper, "paper_theorem1": t.paper}
            for B, t in thresholds.items()
        ],
        "runs": len(trials),
        "correct": sum(trial.outcome == expected for trial, expected in trials),
        "picture": str(output),
    }
