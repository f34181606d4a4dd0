"""The monitor and the scheduler in training: warnings in time and not in vain, the rate without a grid, the price.

    python packages/sgd-stability/reproduce/training.py [--quick] [--only PART] [-o FOLDER]

The bars of `benchmarks/training_bars.py` and `benchmarks/large.py`, written to `training.json`: ramps of the rate under
SGD, momentum and Adam; five settings of the scheduler against a grid of fixed rates; what a check costs beside
training; and the largest eigenvalue of a transformer of 100 million parameters (not with `--quick`).
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from core_tensor.app.files import read_json, write_json

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from _options import options
from large import top_eig_100m
from training_bars import OVERHEADS, overhead, ramps, scheduler_bars


def alarms(_: bool) -> dict[str, Any]:
    """Of six ramps and six runs at the best rate."""
    found = ramps(False)
    detail = dict(found["ramp_alarms_before_doubling_detail"])
    runs = [{"run": name, **detail.pop(name)} for name in list(detail) if isinstance(detail[name], Mapping)]
    return {
        "before_doubling": found["ramp_alarms_before_doubling"],
        "false_share": found["false_alarms_at_best_rate"],
        **detail,
        "runs": runs,
    }


def scheduler(quick: bool) -> dict[str, Any]:
    """Over the best fixed rate of a grid, by setting and seed."""
    found = scheduler_bars(quick)
    runs = [
        {"run": name, "loss_over_best": loss, "cost": cost}
        for name, (loss, cost) in found["scheduler_vs_best_fixed_detail"].items()
    ]
    return {
        "median": found["scheduler_vs_best_fixed_median"],
        "worst": found["scheduler_vs_best_fixed_worst"],
        "cost": found["scheduler_cost"],
        "runs": runs,
    }


def price(quick: bool) -> list[dict[str, Any]]:
    """Of a check every 200 steps, as a share of the training's CPU time."""
    rows = []
    for name in OVERHEADS:
        found = overhead(name, quick)
        detail = found[f"monitor_overhead_{name}_detail"]
        share = found[f"monitor_overhead_{name}"]
        rows.append(
            {"training": name, "share": share, "check_s": detail["ours_s"][1], "parameters": detail["parameters"]}
        )
    return rows


def large(_: bool) -> dict[str, Any]:
    """Seconds, products and memory."""
    found = top_eig_100m(False)
    return {"seconds": found["top_eig_100m_parameters"], **found.get("top_eig_100m_parameters_detail", {})}


PARTS: dict[str, Callable[[bool], Any]] = {"alarms": alarms, "scheduler": scheduler, "price": price, "large": large}


def main() -> None:
    """The parts asked for; those of an earlier call stay."""
    chosen = options(__doc__, tuple(PARTS))
    path = chosen.out / "training.json"
    for part in chosen.only:
        if part == "large" and chosen.quick:
            continue
        held = read_json(path) if path.exists() else {}
        write_json(path, {**held, part: PARTS[part](chosen.quick)})


if __name__ == "__main__":
    main()
