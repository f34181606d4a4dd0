"""The bars of the benchmark beside their limits: `results/bars.json`.

Runs `benchmarks/bench.py` with the interpreter that runs this, `--seeds` times, and takes the medians; FuxiCTR is
installed where `nox -s bench -- lirank` has put its environment. A bar that was not asked for, or is null here, keeps
the figure it has. What `real_logs.py` and `calibration.py` have measured is taken from their results.
"""

import json
import operator
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from _study import study
from core_tensor.app.files import read_json

BENCH = Path(__file__).parents[1] / "benchmarks" / "bench.py"
PARTS = (
    "step_vs_fuxictr",
    "step_vs_deepctr",
    "table_cost_vs_dense_adam",
    "row_update_vs_torch",
    "isotonic_vs_dense_form",
    "int8_lookup_vs_fp32",
    "export_and_replay",
    "reader_share_of_step",
    "neural_linear_1000_candidates_ms",
)
ELSEWHERE = {
    "calibration_shift": ("calibration.json", "shift", "calibration_shift"),
    "auc_vs_lightgbm_ml100k": ("real_logs.json", "movielens_tuned", "auc_vs_lightgbm"),
    "auc_vs_lightgbm_ml100k_logloss": ("real_logs.json", "movielens_tuned", "logloss_vs_lightgbm"),
    "auc_vs_lightgbm_amazon": ("real_logs.json", "amazon", "auc_vs_lightgbm"),
    "auc_vs_lightgbm_amazon_logloss": ("real_logs.json", "amazon", "logloss_vs_lightgbm"),
}
LIMITS = {
    "step_vs_fuxictr_1m": (">=", 1.25),
    "step_vs_fuxictr_4m": (">=", 2.5),
    "low_rank_step_vs_fuxictr_1m": ("reported", None),
    "low_rank_step_vs_fuxictr_4m": ("reported", None),
    "step_vs_deepctr_1m": ("reported", None),
    "step_vs_deepctr_4m": ("reported", None),
    "table_cost_vs_dense_adam_1m": (">=", 8),
    "table_cost_vs_dense_adam_4m": (">=", 30),
    "step_4m_vs_100k_rows": ("<=", 1.1),
    "row_update_vs_torch": (">=", 4),
    "row_update_in_huge_pages": ("reported", None),
    "isotonic_vs_dense_form": (">=", 30),
    "int8_lookup_vs_fp32_16": (">=", 3),
    "int8_lookup_vs_fp32_64": (">=", 2),
    "int8_bags_vs_fp32_16": (">=", 1.4),
    "int8_bags_vs_fp32_64": (">=", 1.4),
    "int8_bags_vs_torch_16": (">=", 0.9),
    "int8_bags_vs_torch_64": (">=", 0.9),
    "int8_lookup_of_floor_16": ("reported", None),
    "int8_lookup_of_floor_64": ("reported", None),
    "int8_memory": (">=", 2.9),
    "export_max_diff": ("<=", 1e-5),
    "onnx_p50_ms_1": ("reported", None),
    "onnx_p50_ms_64": ("reported", None),
    "onnx_p50_ms_512": ("reported", None),
    "replay_equals_serve": ("<=", 0),
    "reader_share_of_step": ("<=", 0.2),
    "neural_linear_1000_candidates_ms": ("<=", 2),
    "calibration_shift": ("<=", 1.0),
    "auc_vs_lightgbm_ml100k": (">=", 0.005),
    "auc_vs_lightgbm_ml100k_logloss": ("<=", 0),
    "auc_vs_lightgbm_amazon": (">=", 0.004),
    "auc_vs_lightgbm_amazon_logloss": ("<=", 0),
}
"""What the package has to reach."""


def row(bar: str, measured: float | None) -> dict[str, object]:
    """One line of the docs' table."""
    relation, limit = LIMITS[bar]
    if limit is None:
        return {"bar": bar, "limit": relation, "measured": measured, "met": None}
    holds = {"<=": operator.le, ">=": operator.ge}[relation]
    met = None if measured is None else holds(measured, limit)
    return {"bar": bar, "limit": f"{relation} {limit:g}", "measured": measured, "met": met}


def measured(command: list[str | Path]) -> dict[str, Any]:
    """What one run of the benchmark says."""
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Run the benchmark and write down what it says."""
    options = study(__doc__, PARTS, seeds=3)
    parts = options.only or PARTS
    asked = ["--quick"] * options.quick + [word for name in parts for word in ("--only", name)]
    path = options.out / "bars.json"
    bars: dict[str, float] = read_json(path)["bars"] if path.exists() else {}
    runs = [measured([sys.executable, BENCH, "--json", *asked]) for _ in range(options.seeds)]
    for bar, (file, part, key) in ELSEWHERE.items():
        if (options.out / file).exists() and part in (found := read_json(options.out / file)):
            bars[bar] = round(found[part][key], 4)
    for bar in LIMITS:
        if values := [run[bar] for run in runs if run.get(bar) is not None]:
            bars[bar] = statistics.median(values)
    options.update("bars.json", {"bars": bars, "table": [row(bar, bars.get(bar)) for bar in LIMITS]})


if __name__ == "__main__":
    main()
