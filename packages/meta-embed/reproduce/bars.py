"""The bars of the benchmark beside their limits.

    python reproduce/bars.py [--only BAR ...] [--runs 3] [--quick] [-o FILE]

Writes `results/bars.json`: medians of some runs of `benchmarks/bench.py` with the interpreter that runs this (peers are
installed where `nox -s bench -- meta-embed` has put its environment), and what `generator.py` and `real_logs.py` have
measured. A bar that was not asked for, or is null here, keeps the figure it has.
"""

import argparse
import json
import operator
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from core_tensor.app.files import read_json, write_json

BENCH = Path(__file__).parents[1] / "benchmarks" / "bench.py"
RESULTS = Path(__file__).parent / "results" / "bars.json"
PARTS = (
    "tasks_vs_torchopt", "tasks_vs_higher", "tasks_vs_loop", "vmap_vs_loop_max_diff", "map_generation_vs_vmap_k5",
    "map_optimality", "lookup_p99_ms_batch64", "refresh_vs_full_max_diff",
)  # fmt: skip
QUICK = ("vmap_vs_loop_max_diff", "map_optimality")
LIMITS = {
    "tasks_vs_torchopt_k1": (">=", 15),
    "tasks_vs_torchopt_k5": (">=", 15),
    "tasks_vs_higher_k1": ("reported", None),
    "tasks_vs_higher_k5": ("reported", None),
    "tasks_vs_loop_k1": ("reported", None),
    "tasks_vs_loop_k5": ("reported", None),
    "first_vs_second_order_k5": ("reported", None),
    "vmap_vs_loop_max_diff": ("<=", 1e-6),
    "map_generation_vs_vmap_k5": (">=", 15),
    "map_optimality": ("<=", 1e-8),
    "gap_closed_n16": (">=", 0.70),
    "no_retrain_vs_id": (">=", -0.004),
    "hybrid_worst_bucket_vs_best": (">=", 0.0),
    "n0_auc_vs_no_personalisation": (">=", -0.001),
    "maml_vs_map_n32": ("reported", None),
    "lookup_members": ("reported", None),
    "lookup_p50_ms_batch64_lmdb": ("reported", None),
    "lookup_p99_ms_batch64_lmdb": ("<=", 1),
    "lookup_p50_ms_batch64_sqlite": ("reported", None),
    "lookup_p99_ms_batch64_sqlite": ("<=", 8),
    "int8_memory": (">=", 3.2),
    "int8_auc_change": ("<=", 1e-4),
    "refresh_vs_full_max_diff": ("<=", 1e-8),
}
"""What the package has to reach."""


def row(bar: str, measured: float | None) -> dict[str, object]:
    """One line of the page's table."""
    relation, limit = LIMITS[bar]
    if limit is None:
        return {"bar": bar, "limit": relation, "measured": measured, "met": None}
    holds = {"<=": operator.le, ">=": operator.ge}[relation]
    met = None if measured is None else holds(measured, limit)
    return {"bar": bar, "limit": f"{relation} {limit:g}", "measured": measured, "met": met}


def run_bench(parts: list[str], quick: bool) -> dict[str, Any]:
    """What one run of the benchmark says."""
    asked = [word for name in parts for word in ("--only", name)] + ["--quick"] * quick
    done = subprocess.run([sys.executable, BENCH, "--json", *asked], check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Run the benchmark and write down what it says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=PARTS, help="bars to run again; all if not given")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="two bars, once: under two minutes")
    parser.add_argument("-o", "--out", type=Path, help="file to write, or a folder for it")
    options = parser.parse_args()
    out = options.out or (Path("bars_quick.json") if options.quick else RESULTS)
    out = out / RESULTS.name if out.is_dir() else out
    parts = list(QUICK if options.quick else options.only or PARTS)
    bars: dict[str, float] = read_json(out)["bars"] if out.exists() else {}
    for name in ("generator", "real_logs"):
        path = RESULTS.with_name(f"{name}.json")
        bars |= {bar: value for bar, value in read_json(path)["bars"].items() if bar in LIMITS}
    runs = [run_bench(parts, options.quick) for _ in range(1 if options.quick else options.runs)]
    for bar in LIMITS:
        if values := [run[bar] for run in runs if run.get(bar) is not None]:
            bars[bar] = statistics.median(values)
    write_json(out, {"bars": bars, "table": [row(bar, bars.get(bar)) for bar in LIMITS]})


if __name__ == "__main__":
    main()
