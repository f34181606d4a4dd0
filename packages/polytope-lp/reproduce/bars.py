"""The bars of the benchmark beside their limits: `results/bars.json`.

    python packages/polytope-lp/reproduce/bars.py [--quick] [--only KEY] [--runs 3] [-o FOLDER]

Runs `benchmarks/bench.py` with the interpreter that runs this, and takes the median of its runs; peers are installed
where `nox -s bench -- polytope-lp` has put its environment. A bar that was not asked for, or is null here, keeps the
figure it has.
"""

import json
import operator
import statistics
import subprocess
import sys
from pathlib import Path

from _options import options, parser
from core_tensor.app.files import read_json, write_json

BENCH = Path(__file__).parents[1] / "benchmarks" / "bench.py"
LIMITS = {
    "eval_vs_torch_bucketed": (">=", 25),
    "b100k_1e4_vs_pdlp": (">=", 10),
    "a100k_1e6_vs_pdlp": (">=", 6),
    "assignment_vs_clarabel": (">=", 10),
    "solve_10m_seconds": ("<=", 5),
    "bytes_per_variable": ("<=", 16),
    "bandwidth_fraction": (">=", 0.18),
    "generate_seconds_per_million": ("<=", 0.3),
    "first_evaluation_share": ("<=", 0.25),
    "verify_vs_solve_time": ("<=", 1),
    "verify_bytes_per_variable": ("<=", 2),
    "scale_invariance_max": ("<=", 2),
    "verify_false_rejects": ("<=", 0),
    "false_claims": ("<=", 0),
    "netlib_solved": (">=", 40),
    "projection_kkt_max": ("<=", 1e-12),
}
"""What the package has to reach; the benchmark's other figures are reported only."""


def row(bar: str, runs: list[float] | None) -> dict[str, object]:
    """One line of the docs' table."""
    median = None if runs is None else statistics.median(runs)
    line: dict[str, object] = {"bar": bar, "limit": None, "median": median, "met": None}
    line |= {"runs": 0, "least": None, "greatest": None}
    if runs is not None:
        line |= {"runs": len(runs), "least": min(runs), "greatest": max(runs)}
    if bar in LIMITS:
        relation, limit = LIMITS[bar]
        holds = {"<=": operator.le, ">=": operator.ge}[relation]
        line |= {"limit": f"{relation} {limit:g}", "met": None if median is None else holds(median, limit)}
    return line


def main() -> None:
    """Run the benchmark and write down what it says."""
    arguments = parser(__doc__)
    arguments.add_argument("--only", metavar="KEY", help="run one bar of the benchmark")
    arguments.add_argument("--runs", type=int, default=1, help="runs of each bar, whose median counts [1]")
    given = options(arguments)
    asked = ["--quick"] * given.quick + (["--only", given.only] if given.only else [])
    found: dict[str, list[float]] = {}
    for _ in range(given.runs):
        done = subprocess.run([sys.executable, BENCH, "--json", *asked], check=True, stdout=subprocess.PIPE, text=True)
        for bar, value in json.loads(done.stdout.splitlines()[-1]).items():
            if isinstance(value, int | float):
                found.setdefault(bar, []).append(value)
    path = given.out / "bars.json"
    bars: dict[str, list[float]] = (read_json(path)["bars"] if path.exists() else {}) | found
    names = [*LIMITS, *(bar for bar in bars if bar not in LIMITS)]
    write_json(path, {"bars": bars, "table": [row(bar, bars.get(bar)) for bar in names]})


if __name__ == "__main__":
    main()
