"""Trained networks: exact thresholds beside bounds and the paper's Theorem 1, and SGD itself as the judge.

    python packages/sgd-stability/reproduce/networks.py [--quick] [--only NAME] [-o FOLDER]

Minima of a tanh MLP on random data, and of an MLP and CNNs on digits and CIFAR-10, squared error, in float64; the same
MLP and CNN under cross-entropy, which has no minimum. Writes one JSON file per network and the maps; runs of SGD that
are in the file already are not repeated (delete it to start anew). `--quick` has one seed of two of the MLPs.
CIFAR is read from the shared data folder (`core_tensor.dev.testing.shared_data`).
"""

import io
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _options import Options, options
from core_tensor.app.cli import progress
from core_tensor.app.extras import require
from core_tensor.app.files import read_json, write_json
from core_tensor.dev.testing import shared_data
from sgd_stability import Sampling, StabilityReport, analyze
from sgd_stability.curvature.spectra import gauss_newton_operator, network_of, spectral_density
from sgd_stability.demo import digits, digits_network
from sgd_stability.report.nonlinear import interpolate, run_sgd
from sgd_stability.report.plots import (
    plot_coherence,
    plot_growth,
    plot_map,
    plot_sample_curvature,
    plot_spectral_density,
)
from sgd_stability.theory.bounds import all_bounds
from sgd_stability.theory.quadratic import simulate
from sgd_stability.theory.second_moment import lr_threshold
from torch import Tensor, nn

BATCHES = (1, 2, 4, 8, 16, 32)
SEEDS = 3


@dataclass(frozen=True)
class Problem:
    """A network and its data."""

    title: str
    model: nn.Module
    x: Tensor
    y: Tensor
    loss: str = "squared_error"


def tanh_mlp() -> Problem:
    """6-48-48-1 on 64 random points: 2,737 parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 1)).double()
    return Problem("tanh MLP, random data", model, torch.randn(64, 6).double(), torch.randn(64, 1).double())


def one_hot(labels: Tensor) -> Tensor:
    """Targets of the squared error."""
    return nn.functional.one_hot(labels, 10).double()


def digits_mlp(loss: str = "squared_error") -> Problem:
    """64-48-48-10 on 64 digits."""
    x, labels = digits(64)
    y = one_hot(labels) if loss == "squared_error" else labels
    return Problem(f"tanh MLP, digits, {loss.replace('_', ' ')}", digits_network(0), x, y, loss)


def cnn(channels: int, size: int) -> nn.Module:
    """Two strided convolutions, 3x3, and a linear layer; ReLU."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(channels, 12, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(12, 24, 3, stride=2, padding=1)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(24 * (size // 4) ** 2, 10)).double()


def digits_cnn() -> Problem:
    """A CNN on 64 digits."""
    x, labels = digits(64)
    return Problem("CNN, digits, squared error", cnn(1, 8), x.reshape(-1, 1, 8, 8), one_hot(labels))


def cifar(n: int) -> tuple[Tensor, Tensor]:
    """Images of the CIFAR subset, halved to 16x16."""
    image = require("PIL.Image", "sgd-stability[demo]")
    with np.load(shared_data("cifar10_subset", "cifar10_subset_jpeg.npz")) as packed:
        jpeg, offsets = packed["train_jpeg"], packed["train_offsets"][: n + 1]
        pixels = [np.asarray(image.open(io.BytesIO(jpeg[a:b].tobytes()))) for a, b in itertools.pairwise(offsets)]
        labels = torch.from_numpy(packed["train_labels"][:n].astype(np.int64))
    x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).double() / 127.5 - 1.0
    return nn.functional.avg_pool2d(x, 2), labels


def cifar_cnn(loss: str = "squared_error") -> Problem:
    """A CNN on 64 images of CIFAR-10."""
    x, labels = cifar(64)
    y = one_hot(labels) if loss == "squared_error" else labels
    return Problem(f"CNN, CIFAR-10, {loss.replace('_', ' ')}", cnn(3, 16), x, y, loss)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "tanh_mlp": tanh_mlp,
    "digits_mlp": digits_mlp,
    "digits_cnn": digits_cnn,
    "cifar_cnn": cifar_cnn,
    "digits_mlp_ce": lambda: digits_mlp("cross_entropy"),
    "cifar_cnn_ce": lambda: cifar_cnn("cross_entropy"),
}


def train(problem: Problem) -> float:
    """To an interpolating minimum of the squared error; cross-entropy for 300 full-batch steps of Adam."""
    if problem.loss == "squared_error":
        return interpolate(problem.model, problem.x, problem.y)
    adam = torch.optim.Adam(problem.model.parameters(), lr=1e-3)
    for _ in range(300):
        adam.zero_grad()
        loss = nn.functional.cross_entropy(problem.model(problem.x), problem.y)
        loss.backward()
        adam.step()
    return loss.item()


def thresholds(report: StabilityReport) -> list[dict[str, Any]]:
    """The specification's table: bounds and the paper's Theorem 1 under Bernoulli sampling, exact under both."""
    rows = []
    for B in BATCHES:
        bernoulli = Sampling(report.n, B, "bernoulli")
        bounds = {bound.name: bound.lr for bound in all_bounds(report.family, bernoulli)}
        exact = lr_threshold(report.family, bernoulli).value
        rows.append(
            {
                "B": B,
                "curvature": bounds["curvature"],
                "lyapunov": bounds["lyapunov"],
                "exact": exact,
                "without_replacement": lr_threshold(report.family, Sampling(report.n, B)).value,
                "rayleigh": bounds["rayleigh"],
                "sample": min(bounds["sample"], bounds["gradient_descent"]),
                "paper": bounds["paper_theorem1"],
                "gradient_descent": bounds["gradient_descent"],
                "paper_over_exact": bounds["paper_theorem1"] / exact,
            }
        )
    return rows


def judge(
    problem: Problem, report: StabilityReport, factors: tuple[float, ...], file: Path, seeds: int
) -> list[dict[str, Any]]:
    """SGD at multiples of the threshold, unless the file has it; by `sgd_stability.report.nonlinear`'s criteria."""
    held = read_json(file) if file.exists() else {"runs": []}
    done = {(t["batch_size"], t["factor"], t["seed"]): t for t in held["runs"]}
    runs = list(itertools.product((1, 4, 16), factors, range(seeds)))
    trials = []
    for B, factor, seed in progress(runs, problem.title, unit="run"):
        if (B, factor, seed) in done:
            trials.append(done[B, factor, seed])
            continue
        lr = factor * report.lr_threshold(B).exact
        trial = run_sgd(problem.model, problem.loss, problem.x, problem.y, lr=lr, batch_size=B, seed=seed)
        trials += finite_rows([{"factor": factor, **vars(trial)}])
        held["runs"].append(trials[-1])
        write_json(file, held)
    return trials


def finite_rows(trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """JSON has no infinities: a run that overflowed has no figures."""
    return [
        {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in trial.items()} for trial in trials
    ]


def shares(trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Share of the runs that left, by multiple of the threshold and batch size."""
    rows = []
    for factor in sorted({t["factor"] for t in trials}):
        row: dict[str, Any] = {"factor": factor}
        for B in sorted({t["batch_size"] for t in trials}):
            chosen = [t["outcome"] == "leaves" for t in trials if t["factor"] == factor and t["batch_size"] == B]
            row[f"B{B}"] = sum(chosen) / len(chosen)
        rows.append(row)
    return rows


def draw(name: str, problem: Problem, report: StabilityReport, trials: list[dict[str, Any]], chosen: Options) -> None:
    """The map with the runs on it; for the tanh MLP growth too, for the digits under cross-entropy the spectra."""
    exact = report.max_lr(BATCHES)
    count = 8 if chosen.quick else 28
    lrs = np.geomspace(min(exact.values()) / 3, max(exact.values()) * 2, count).tolist()
    plot_map(report.stability_map(lrs, BATCHES), chosen.out / f"{name}.png", problem.title, trials)
    if name == "tanh_mlp":
        star = report.lr_threshold(4).exact
        curves = {
            f"{f} $\\eta^*$": simulate(report.family, f * star, Sampling(64, 4), steps=30, paths=4000)
            for f in (0.5, 0.8, 1.2)
        }
        plot_growth(curves, chosen.out / "growth.png", f"{problem.title}: linearised SGD, B = 4")
    if name == "digits_mlp_ce":
        plot_coherence(report.coherence_matrix, report.targets, chosen.out / "coherence.png")
        plot_sample_curvature(report.family.sample_curvature, report.lambda_max, chosen.out / "curvature.png")
        operator = gauss_newton_operator(network_of(problem.model, problem.loss, (problem.x, problem.y)))
        density = spectral_density(operator, probes=4, steps=60)
        grid = torch.linspace(-0.05 * report.lambda_max, 1.1 * report.lambda_max, 1000, dtype=torch.float64)
        plot_spectral_density(grid, density.density(grid, 0.01 * report.lambda_max), chosen.out / "density.png")


def evidence(name: str, chosen: Options) -> None:
    """One network."""
    problem = PROBLEMS[name]()
    loss = train(problem)
    report = analyze(problem.model, problem.loss, (problem.x, problem.y))
    own = chosen.out / f"{name}.json"
    seeds = 1 if chosen.quick else SEEDS
    judged = [] if problem.loss == "cross_entropy" else judge(problem, report, (0.8, 1.2), own, seeds)
    scan = judged
    if name == "tanh_mlp" and not chosen.quick:
        scan = judge(problem, report, (0.6, 0.9, 1.0, 1.1, 1.5, 2.0), own, seeds) + judged
    right = sum((t["outcome"] == "returns") == (t["factor"] < 1) for t in judged)
    summary = {
        "network": problem.title,
        "parameters": sum(p.numel() for p in problem.model.parameters()),
        "loss": loss,
        "interpolating": report.interpolating,
        "lambda_max": report.lambda_max,
        "L": report.max_sample_curvature,
        "sigma": report.coherence,
        "sigma_tilde": report.n * report.lambda_max / report.max_sample_curvature,
        "runs": len(judged),
        "right": right if judged else None,
    }
    draw(name, problem, report, judged, chosen)
    result = {"summary": summary, "thresholds": thresholds(report), "shares": shares(scan), "runs": scan}
    write_json(own, result)
    held = [read_json(file) for file in (chosen.out / f"{other}.json" for other in PROBLEMS) if file.exists()]
    write_json(chosen.out / "summary.json", {"networks": [each["summary"] for each in held if "summary" in each]})


def main() -> None:
    """Every network, or some."""
    chosen = options(__doc__, tuple(PROBLEMS))
    whole = len(chosen.only) == len(PROBLEMS)
    for name in ("tanh_mlp", "digits_mlp_ce") if chosen.quick and whole else chosen.only:
        evidence(name, chosen)


if __name__ == "__main__":
    main()
