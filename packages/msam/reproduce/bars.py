"""The bars of the benchmark beside their limits: `results/bars.json`.

    python packages/msam/reproduce/bars.py [--quick] [--only KEY] [-o FOLDER]

Runs `benchmarks/bench.py` with the interpreter that runs this; the peer is installed where `nox -s bench -- msam` has
put its environment. A bar that was not asked for, or is null here, keeps the figure it has.
"""

import argparse
import json
import operator
import subprocess
import sys
from pathlib import Path

from core_tensor.app.files import read_json, write_json

RESULTS = Path(__file__).parent / "results"
BENCH = Path(__file__).parents[1] / "benchmarks" / "bench.py"
LIMITS = {
    "ghost_vs_sgd_small_m8": ("<=", 2.0),
    "ghost_vs_sgd_small_m32": ("<=", 2.0),
    "ghost_vs_sgd_large_m8": ("<=", 1.9),
    "ghost_vs_sgd_large_m32": ("<=", 1.9),
    "ghost_vs_sam_small_m8": ("<=", 0.95),
    "ghost_vs_sam_large_m8": ("<=", 0.9),
    "ghost_vs_sequential_m16": (">=", 4.5),
    "ghost_vs_sgd_transformer_m4": ("<=", 2.1),
    "ghost_vs_sgd_cnn_m4": ("<=", 2.5),
    "chained_vs_sgd_small_m8": ("<=", 1.3),
    "chained_vs_sgd_large_m8": ("<=", 1.2),
    "chained_vs_sgd_transformer_m4": ("<=", 1.6),
    "chained_vs_sgd_cnn_m4": ("<=", 1.6),
    "auto_vs_best_engine": ("<=", 1.05),
    "silent_error_max": ("<=", 1e-9),
    "ghost_grad_max_rel_error": ("<=", 1e-12),
    "extra_memory_vs_activations": ("<=", 1.1),
    "sam_vs_pytorch_optimizer": ("<=", 1.05),
    "lambda_max_msam_vs_sam": ("<=", 0.8),
    "lambda_max_sam_vs_sgd": ("<=", 0.7),
}
"""What the package has to reach; the benchmark's other figures, of the transformer and the CNN, are reported only."""


def row(bar: str, measured: float | None) -> dict[str, object]:
    """One line of the docs' table."""
    if bar not in LIMITS:
        return {"bar": bar, "limit": None, "measured": measured, "met": None}
    relation, limit = LIMITS[bar]
    holds = {"<=": operator.le, ">=": operator.ge}[relation]
    met = None if measured is None else holds(measured, limit)
    return {"bar": bar, "limit": f"{relation} {limit:g}", "measured": measured, "met": met}


def main() -> None:
    """Run the benchmark and write down what it says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer pairs, and no lambda_max")
    parser.add_argument("--only", metavar="KEY", help="run one bar of the benchmark")
    parser.add_argument("-o", "--out", type=Path, default=RESULTS, help="folder for bars.json")
    options = parser.parse_args()
    asked = ["--quick"] * options.quick + (["--only", options.only] if options.only else [])
    options.out.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([sys.executable, BENCH, "--json", *asked], check=True, stdout=subprocess.PIPE, text=True)
    path = options.out / "bars.json"
    bars: dict[str, float] = read_json(path)["bars"] if path.exists() else {}
    told = json.loads(done.stdout.splitlines()[-1]).items()
    bars |= {bar: value for bar, value in told if value is not None and not bar.endswith(("_detail", "_reason"))}
    names = [*LIMITS, *(bar for bar in bars if bar not in LIMITS)]
    write_json(path, {"bars": bars, "table": [row(bar, bars.get(bar)) for bar in names]})


if __name__ == "__main__":
    main()
