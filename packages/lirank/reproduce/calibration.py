"""Calibration against scikit-learn's isotonic regression and Platt scaling, by context, and under a shift.

`curves`: 20,000 rows with a known kinked curve fit a calibration, 20,000 others judge it by expected calibration error
(50 bins of equal mass) and by the distance to the true probabilities; three curves, five seeds. `contexts`: six
contexts, each with a bent curve. `shift`: iPinYou by time, 0.94 % clicks in training and 0.24 % in the test; the first
tenth of the test rows recalibrates, the rest judges. The constant is the click rate of the judged rows themselves,
which nobody knows beforehand.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import _shift
import numpy as np
import torch
from _study import Study, study
from core_tensor.app import figures
from lirank.evaluate.calibration import fit_curve
from lirank.evaluate.metrics import calibration_error
from lirank.layers.isotonic import IsotonicLayer
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

Array = np.ndarray
Data = tuple[Array, Array, Array, Array]
"""Logits, true probabilities, labels, contexts."""
CURVES: dict[str, Callable[[Array], Array]] = {
    "overconfident with a kink": lambda z: 0.5 * z - 1.0 + 0.7 * np.maximum(z - 0.5, 0),
    "flat in the middle": lambda z: np.where(np.abs(z) < 1, 0.1 * z, z - 0.9 * np.sign(z)) - 1.5,
    "rare": lambda z: 0.8 * z - 4.0 + 0.6 * np.maximum(z, 0),
}


def sigmoid(z: Array) -> Array:
    """Probabilities."""
    p: Array = 0.5 * (1 + np.tanh(0.5 * z))
    return p


def draw(curve: str, n: int, rng: np.random.Generator) -> Data:
    """Logits of a model whose calibration is bent by a curve; `contexts` has one bend per context."""
    z, context = rng.normal(0, 1.8, n), rng.integers(6, size=n)
    bent = (
        CURVES[curve](z) if curve in CURVES else np.linspace(0.4, 1.6, 6)[context] * z + np.linspace(1, -3, 6)[context]
    )
    p = sigmoid(bent)
    return z, p, (rng.random(n) < p).astype(np.float64), context


def trained_layer(train: Data, test: Data, seed: int, contexts: int = 0) -> Array:
    """The isotonic layer on frozen logits: five epochs of Adam at 0.05 with a cosine to 0, 60 buckets."""
    torch.manual_seed(seed)
    layer = IsotonicLayer(60, -8.0, 8.0, contexts=contexts)
    z, y = (torch.from_numpy(train[i]).float() for i in (0, 2))
    c = torch.from_numpy(train[3])
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    steps = 5 * -(-len(z) // 512)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(5):
        for rows in torch.randperm(len(z)).split(512):
            optimizer.zero_grad()
            logits = layer(z[rows], c[rows]) if contexts else layer(z[rows])
            F.binary_cross_entropy_with_logits(logits, y[rows]).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        z = torch.from_numpy(test[0]).float()
        return torch.sigmoid(layer(z, torch.from_numpy(test[3])) if contexts else layer(z)).double().numpy()


def platt(train: Data, test: Data, seed: int) -> Array:
    """scikit-learn's logistic regression of the logit, without a penalty to speak of."""
    del seed
    model = LogisticRegression(C=1e6).fit(train[0][:, None], train[2])
    p: Array = model.predict_proba(test[0][:, None])[:, 1]
    return p


def isotonic(train: Data, test: Data, seed: int) -> Array:
    """scikit-learn's isotonic regression."""
    del seed
    p: Array = IsotonicRegression(out_of_bounds="clip").fit(train[0], train[2]).predict(test[0])
    return p


def ours(train: Data, test: Data, seed: int) -> Array:
    """What `lirank calibrate` does: PAVA, made strictly monotone."""
    del seed
    return sigmoid(fit_curve(train[0], train[2])(test[0]))


def uncalibrated(train: Data, test: Data, seed: int) -> Array:
    """The model as it is."""
    del train, seed
    return sigmoid(test[0])


METHODS: dict[str, Callable[[Data, Data, int], Array]] = {
    "uncalibrated": uncalibrated,
    "Platt (scikit-learn)": platt,
    "isotonic (scikit-learn)": isotonic,
    "lirank calibrate (PAVA)": ours,
    "isotonic layer, trained": trained_layer,
}
BY_CONTEXT = {**METHODS, "isotonic layer by context": lambda a, b, seed: trained_layer(a, b, seed, contexts=6)}


def judged(curve: str, methods: dict[str, Callable[[Data, Data, int], Array]], options: Study) -> list[dict[str, Any]]:
    """One row per method: mean over seeds, in thousandths, with the spread."""
    n = 4_000 if options.quick else 20_000
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
    for seed in range(options.seeds):
        rng = np.random.default_rng(seed)
        train, test = draw(curve, n, rng), draw(curve, n, rng)
        for name, method in methods.items():
            p = method(train, test, seed)
            distance = float(np.sqrt(np.mean((p - test[1]) ** 2)))
            found[name].append((1000 * calibration_error(p, test[2], bins=50), 1000 * distance))
    rows = []
    for name, values in found.items():
        (error, distance), (error_sd, distance_sd) = np.mean(values, 0).tolist(), np.std(values, 0).tolist()
        rows.append(
            {"curve": curve, "method": name, "ece": error, "ece_sd": error_sd, "rmse": distance, "rmse_sd": distance_sd}
        )
    return rows


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Distance to the truth by method, one panel per curve."""
    plt = figures.pyplot("lirank[plot]")
    curves = list(dict.fromkeys(row["curve"] for row in rows))
    figure, axes = plt.subplots(1, len(curves), figsize=(12.0, 3.0), sharey=True, constrained_layout=True)
    names = list(dict.fromkeys(row["method"] for row in rows))
    for axis, curve in zip(axes, curves, strict=True):
        mine = {row["method"]: row for row in rows if row["curve"] == curve}
        places = [len(names) - 1 - names.index(name) for name in mine]
        for place, (name, row) in zip(places, mine.items(), strict=True):
            color = "tab:blue" if "lirank" in name or "layer" in name else "tab:gray"
            axis.errorbar(row["rmse"], place, xerr=row["rmse_sd"], fmt="o", color=color, capsize=3)
        axis.set_xscale("log")
        axis.set_xlim(3, 600)
        axis.set_xticks([5, 20, 100, 400], ["5", "20", "100", "400"])
        axis.minorticks_off()
        axis.set_ylim(-0.6, len(names) - 0.4)
        axis.set_title(curve)
    figure.supxlabel("RMSE to the true probability, times 1000 (bars: SD over seeds); blue: lirank", fontsize="medium")
    axes[0].set_yticks(range(len(names)), reversed(names))
    figures.save(figure, path)


def main() -> None:
    """Run the parts that are asked for."""
    options = study(__doc__, ("curves", "shift"))
    parts = options.only or ("curves", "shift")
    if "curves" in parts:
        rows = [row for curve in CURVES for row in judged(curve, METHODS, options)]
        by_context = judged("by context", BY_CONTEXT, options)
        options.update("calibration.json", {"curves": rows, "contexts": by_context, "seeds": options.seeds})
        picture([*rows, *by_context], options.out / "calibration.png")
    if "shift" in parts:
        found = _shift.evidence(range(options.seeds), epochs=1 if options.quick else 8)
        options.update("calibration.json", {"shift": found})


if __name__ == "__main__":
    main()
