"""Every component of the paper on the generator: on its own knob, where it has nothing to win, and all together.

Logs of 40,000 impressions of 300 users and 200 items; the last 40 % of the time test, so five seeds judge 80,000 rows.
A killed script goes on with the next model: `timeout 700 python ablation.py --only knobs`, again until it ends.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from _study import study
from core_tensor.app import figures
from core_tensor.app.cli import progress
from core_tensor.app.files import read_json
from lirank.evidence.ablation import COMPONENTS, FULL_MARKET, FULL_MODELS, MARKET, TRAINING, ablate, gap_closed, summary
from msgspec.structs import replace


def mean_gaps(seeds: list[dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """One line per model, with the spread over seeds and how many seeds it is ahead of the base."""
    base = next(name for name in FULL_MODELS if name.endswith("(base)"))
    rows = []
    for name in seeds[0]:
        closed = [100 * found[name]["gap_closed"] for found in seeds]
        ahead = [100 * (found[name]["gap_closed"] - found[base]["gap_closed"]) for found in seeds]
        several = len(seeds) > 1
        rows.append(
            {
                "model": name,
                "auc": float(np.mean([found[name]["auc"] for found in seeds])),
                "logloss": float(np.mean([found[name]["logloss"] for found in seeds])),
                "gap_closed": float(np.mean(closed)),
                "gap_closed_sd": float(np.std(closed, ddof=1)) if several else None,
                "over_base": float(np.mean(ahead)),
                "over_base_se": float(np.std(ahead, ddof=1)) / len(ahead) ** 0.5 if several else None,
                "won": sum(value > 0 for value in ahead),
            }
        )
    return rows


REAL = {
    "history": "+ history",
    "Residual DCN beside low-rank DCN": "Residual DCN + low-rank DCN + MLP",
    "dense gate": "+ dense gate",
    "large MLP": "+ large MLP (512, 256)",
}
"""Components that `real_logs.py` tries too, by its names."""


def beside(rows: list[dict[str, Any]], real: dict[str, Any]) -> list[dict[str, Any]]:
    """The components with the shares in hundredths, and what each brought on real logs over the same base.

    Args:
        rows: What `summary` gave.
        real: What `real_logs.py` has measured.

    Returns:
        The rows with `closed_off`, `closed_on`, and AUC differences by name of the log, None where it was not tried.
    """
    found = []
    for row in rows:
        entry = row | {f"closed_{side}": 100 * row[f"gap_{side}"] for side in ("off", "on")}
        for log in ("movielens", "amazon", "frappe"):
            models = {model["model"]: model for model in real.get(log, {}).get("models", [])}
            entry[log] = models.get(REAL.get(row["component"], ""), {}).get("vs_base")
        found.append(entry)
    return found


def draw_components(rows: list[dict[str, Any]], path: Path) -> None:
    """AUC with a component minus AUC without, on its own market and where it has nothing to win."""
    plt = figures.pyplot("lirank[plot]")
    shown = [row for row in rows if row["judge"] == "auc"]
    figure, axis = plt.subplots(figsize=(7.5, 4.0), constrained_layout=True)
    for offset, name, color, label in (
        (0.12, "difference", "tab:blue", "something to win"),
        (-0.12, "null", "tab:gray", "nothing to win"),
    ):
        places = [len(shown) - 1 - i + offset for i in range(len(shown))]
        errors = [2000 * (row[f"{name}_se"] or 0.0) for row in shown]
        values = [1000 * row[name] for row in shown]
        axis.errorbar(values, places, xerr=errors, fmt="o", color=color, label=label, capsize=3)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(shown)), [row["component"] for row in reversed(shown)])
    axis.set_xscale("symlog", linthresh=10)
    axis.set_xticks([-10, -5, 0, 5, 10, 100], ["-10", "-5", "0", "5", "10", "100"])
    axis.minorticks_off()
    axis.set_xlabel("AUC with minus AUC without, in thousandths (bars: two standard errors)")
    figure.legend(loc="outside upper center", ncol=2)
    figures.save(figure, path)


def draw_gaps(rows: list[dict[str, Any]], path: Path) -> None:
    """What each model closes beyond the base of the gap to the truth, with two standard errors of the paired seeds."""
    plt = figures.pyplot("lirank[plot]")
    shown = [row for row in rows if row["model"] != "truth" and not row["model"].endswith("(base)")]
    figure, axis = plt.subplots(figsize=(7.5, 3.6), constrained_layout=True)
    for place, row in enumerate(reversed(shown)):
        color = "tab:gray" if row["model"] in ("LightGBM", "logistic regression") else "tab:blue"
        error = 2 * (row["over_base_se"] or 0.0)
        axis.errorbar(row["over_base"], place, xerr=error, fmt="o", color=color, capsize=3)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(shown)), [row["model"] for row in reversed(shown)])
    axis.set_xlabel(
        "points of the gap to the truth closed beyond low-rank DCN + MLP (bars: two standard errors)", x=0.4
    )
    figures.save(figure, path)


def main() -> None:
    """Run what is missing, then write the tables and the picture."""
    options = study(__doc__, ("knobs", "full"))
    events = 6_000 if options.quick else MARKET.events
    training = replace(TRAINING, epochs=2) if options.quick else TRAINING
    parts = options.only or ("knobs", "full")
    if "knobs" in parts:
        market = dataclasses.replace(MARKET, events=events)
        jobs = [(c, seed, null) for seed in range(options.seeds) for c in COMPONENTS for null in (False, True)]
        rows = [
            ablate(c, seed, options.cache, market=market, training=training, null=null)
            for c, seed, null in progress(jobs, "one knob", unit="pair")
        ]
        path = options.out / "real_logs.json"
        components = beside(summary(rows), read_json(path) if path.exists() else {})
        options.update("ablation.json", {"components": components, "component_rows": rows})
    if "full" in parts:
        market = dataclasses.replace(FULL_MARKET, events=events)
        seeds = [
            gap_closed(seed, options.cache, market=market, training=training)
            for seed in progress(range(options.seeds), "all knobs on", unit="seed")
        ]
        options.update("ablation.json", {"full": mean_gaps(seeds), "full_rows": seeds})
    found = options.update("ablation.json", {"events": events, "seeds": options.seeds})
    if "components" in found:
        draw_components(found["components"], options.out / "components.png")
    if "full" in found:
        draw_gaps(found["full"], options.out / "ablation.png")


if __name__ == "__main__":
    main()
