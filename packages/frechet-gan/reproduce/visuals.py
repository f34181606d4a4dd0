"""Pictures of what the package measures and learns, from the runs that `training.py` left in its cache.

    python packages/frechet-gan/reproduce/visuals.py [--cache out/frechet-gan]
    python packages/frechet-gan/reproduce/visuals.py --quick -o FOLDER    # without `debiased.json`

Writes `costs.png` and `.json` (optimal transport against the Frechet distance over the batch size),
`estimators.png` and `.json` (estimators over the sample size, known distance), `debiased.json` (the same in 512
dimensions, as the benchmark measures it; a quarter of an hour), `spectra.png`, `interpolation.png`,
`displacement.png` and `over_time.png` (MNIST runs of seed 1).
"""

import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from _options import options, parser
from core_tensor.app.cli import progress
from core_tensor.app.figures import pyplot, save
from core_tensor.app.files import write_json
from frechet_gan import (
    FeatureStats,
    TransportLoss,
    estimate_frechet,
    gaussian_map,
    interpolate,
    load_generator,
    sample_images,
)
from frechet_gan.choices import ESTIMATORS, PlanName
from frechet_gan.encoders.frozen import encode
from frechet_gan.images.arrays import grid
from frechet_gan.images.files import write_image
from frechet_gan.plots import lines, show
from torch import Tensor
from training import Judge, load_task

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from bench import debiased


def cpu_seconds(plan: PlanName, x: Tensor, y: Tensor, repeat: int) -> float:
    """Median CPU time of a loss with its gradient."""
    times = []
    for _ in range(repeat):
        loss, features = TransportLoss(plan), x.clone().requires_grad_()
        start = time.process_time()
        loss(features, y).backward()
        times.append(time.process_time() - start)
    return median(times)


def cost_crossover(out: Path, *, quick: bool) -> None:
    """CPU time of a loss and its gradient at d = 128 over the batch size, all plans in turns."""
    generator = torch.Generator().manual_seed(0)
    sizes, d = (32, 64, 128, 256) if quick else (32, 64, 128, 256, 512, 1024), 128
    plans: tuple[PlanName, ...] = ("gaussian", "assignment", "sinkhorn", "sliced")
    times: dict[PlanName, list[float]] = {plan: [] for plan in plans}
    for n in progress(sizes, "costs"):
        x, y = torch.randn(2, n, d, generator=generator)
        for plan in plans:
            times[plan].append(cpu_seconds(plan, x, y, repeat=1 if plan == "sinkhorn" else 7))
    rows = [{"n": n, **{plan: 1000 * times[plan][i] for plan in plans}} for i, n in enumerate(sizes)]
    write_json(out / "costs.json", {"d": d, "unit": "ms", "rows": rows})
    names = ("Fréchet", "exact optimal transport", "Sinkhorn divergence", "sliced")
    lines(
        {name: (sizes, [row[plan] for row in rows]) for plan, name in zip(plans, names, strict=True)},
        out / "costs.png",
        xlabel=f"batch size (d = {d})",
        ylabel="CPU ms, loss and gradient, one thread",
    )


def estimator_curves(out: Path, *, quick: bool) -> None:
    """Error of every estimator over the sample size: two Gaussians of power-law spectra in 64 dimensions."""
    d, seeds, sizes = (64, 2, (128, 256, 512)) if quick else (64, 5, (128, 256, 512, 1024, 2048, 4096))
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, d + 1, dtype=torch.float64) ** -0.5
    shift = 0.2 * scale
    truth = float((0.1 * scale).square().sum() + shift.square().sum())  # commuting covariances
    errors: dict[str, list[float]] = {e: [] for e in ESTIMATORS}
    for n in progress(sizes, "estimators"):
        found: dict[str, list[float]] = {e: [] for e in ESTIMATORS}
        for seed in range(seeds):
            x = torch.randn(n, d, dtype=torch.float64, generator=generator) * scale * 1.1 + shift
            y = torch.randn(n, d, dtype=torch.float64, generator=generator) * scale
            for name in ESTIMATORS:
                found[name].append(abs(estimate_frechet(x, y, name, seed=seed).value - truth) / truth)
        for name, values in found.items():
            errors[name].append(sum(values) / seeds)
    rows = [{"n": n, **{e: errors[e][i] for e in ESTIMATORS}} for i, n in enumerate(sizes)]
    write_json(out / "estimators.json", {"d": d, "truth": truth, "seeds": seeds, "rows": rows})
    lines(
        {e: (sizes, errors[e]) for e in ESTIMATORS}, out / "estimators.png",
        xlabel=f"sample size (d = {d})", ylabel=f"mean relative error of the distance, {seeds} seeds",
    )  # fmt: skip


def debiased_estimators(out: Path) -> None:
    """What the benchmark's bar of the debiased estimator measured, as a table of relative errors."""
    found = debiased(quick=False)
    detail = found["rtd10k_vs_plugin50k_error_detail"]
    truth = detail.pop("distance")
    rows = []
    for name, errors in detail.items():
        estimator, n = ("plugin", int(name[6:-1]) * 1000) if name.startswith("plugin") else (name, 10_000)
        relative = [error / truth for error in errors]
        row = {"estimator": estimator, "n": n, "seeds": len(errors), "error": sum(relative) / len(errors)}
        rows.append(row | {"worst": max(relative)})
    ratio = found["rtd10k_vs_plugin50k_error"]
    write_json(out / "debiased.json", {"ratio": ratio, "distance": truth, "rows": rows})


def training_figures(cache: Path, out: Path) -> None:
    """Spectra, walks, displacements and samples over time of the MNIST runs of seed 1."""
    task = load_task("mnist")
    info = json.loads((cache / "mnist" / "task.json").read_text())
    stems = {m: f"{m}-{info['rate'][m]:g}-1-{info['steps'][m]}" for m in ("frechet", "ot", "ns", "wgan-gp")}
    judge = Judge(task).encoders["judge"]
    features = {"real": encode(judge, task.unseen.images)}
    for method, stem in stems.items():
        generator, network = load_generator(cache / "mnist" / f"{stem}.pt")
        features[method] = encode(judge, sample_images(generator, network.latent, len(task.unseen.images)))
        if method == "frechet":
            write_image(
                out / "interpolation.png", grid(interpolate(generator, network.latent, rows=8, steps=12), 12), 3
            )
    spectra(features, out)
    displacement(features["real"], {m: features[m] for m in ("frechet", "ns")}, out)
    over_time({m: np.load(cache / "mnist" / f"{s}.npz")["grids"] for m, s in stems.items()}, info, out)


def spectra(features: dict[str, Tensor], out: Path) -> None:
    """Eigenvalues of the features' covariances: a generator without variety has a steeper spectrum."""
    figure, axis = pyplot("frechet-gan[plot]").subplots(figsize=(6.5, 4.2))
    for name, rows in features.items():
        values = torch.linalg.eigvalsh(FeatureStats.from_features(rows).covariance()).flip(0)
        axis.plot(range(1, len(values) + 1), values, label=name, color="black" if name == "real" else None)
    axis.set(yscale="log", xlabel="rank", ylabel="eigenvalue of the covariance, held-out features")
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    save(figure, out / "spectra.png")


def displacement(real: Tensor, generated: dict[str, Tensor], out: Path) -> None:
    """Where the Gaussian transport map would move generated features, on the real features' principal axes."""
    reference = FeatureStats.from_features(real)
    axes_2d = torch.linalg.eigh(reference.covariance())[1][:, -2:].flip(1)
    figure, axes = pyplot("frechet-gan[plot]").subplots(
        1, len(generated), figsize=(5.2 * len(generated), 4.6), sharex=True, sharey=True
    )
    background = (real.double() - reference.mean) @ axes_2d
    for axis, (name, rows) in zip(axes, generated.items(), strict=True):
        some = rows[:150].double()
        start = (some - reference.mean) @ axes_2d
        own = FeatureStats.from_features(rows)
        moved = gaussian_map(own.mean, own.covariance(), reference.mean, reference.covariance())(some)
        move = (moved - reference.mean) @ axes_2d - start
        axis.scatter(*background[:2000].T, s=3, color="0.8", linewidths=0)
        axis.quiver(*start.T, *move.T, angles="xy", scale_units="xy", scale=1, width=0.003, color="C3")
        axis.set(title=f"{name}: displacement to the real Gaussian", xlabel="first principal axis", ylabel="second")
    save(figure, out / "displacement.png")


def over_time(grids: dict[str, Any], info: dict[str, Any], out: Path) -> None:
    """The same latents at every measurement, one row of pictures per method."""
    count = min(len(g) for g in grids.values())
    figure, axes = pyplot("frechet-gan[plot]").subplots(len(grids), count, figsize=(2.1 * count, 2.2 * len(grids)))
    for row, (method, pictures) in zip(axes, grids.items(), strict=True):
        for i, axis in enumerate(row):
            images = torch.from_numpy(pictures[i][:36]).float() / 127.5 - 1
            show(axis, grid(images, 6), f"{method}, {info['seconds'] * (i + 1) / len(pictures):.0f} CPU s")
    save(figure, out / "over_time.png")


def main() -> None:
    """All figures; those of the runs only where the cache has them."""
    parts = ("costs", "estimators", "debiased", "training")
    arguments = parser(__doc__)
    arguments.add_argument(
        "--cache", type=Path, default=Path("out/frechet-gan"), help="where training.py kept its runs"
    )
    arguments.add_argument("--only", choices=parts)
    found = options(arguments)
    cache = found.out / "training-runs" if found.quick else found.cache
    if found.only in (None, "costs"):
        cost_crossover(found.out, quick=found.quick)
    if found.only in (None, "estimators"):
        estimator_curves(found.out, quick=found.quick)
    if found.only in (None, "debiased") and not found.quick:
        debiased_estimators(found.out)
    if found.only in (None, "training") and (cache / "mnist" / "task.json").exists():
        training_figures(cache, found.out)


if __name__ == "__main__":
    main()
