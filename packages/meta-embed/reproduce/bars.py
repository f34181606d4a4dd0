"""The bars of the benchmark beside their limits: `results/bars.json`.

    python packages/meta-embed/reproduce/bars.py [--only KEY ...] [--runs 3] [--quick] [-o FOLDER]

What `generator.py` and `real_logs.py` have measured is taken from their results.
"""

from pathlib import Path

from core_tensor.app.files import read_json
from core_tensor.dev.benchmarking import Limit, record_bars

LIMITS: dict[str, Limit] = {
    "tasks_vs_torchopt_k1": (">=", 15),
    "tasks_vs_torchopt_k5": (">=", 15),
    "tasks_vs_higher_k1": None,
    "tasks_vs_higher_k5": None,
    "tasks_vs_loop_k1": None,
    "tasks_vs_loop_k5": None,
    "first_vs_second_order_k5": None,
    "vmap_vs_loop_max_diff": ("<=", 1e-6),
    "map_generation_vs_vmap_k5": (">=", 15),
    "map_optimality": ("<=", 1e-8),
    "gap_closed_n16": (">=", 0.70),
    "no_retrain_vs_id": (">=", -0.004),
    "hybrid_worst_bucket_vs_best": (">=", 0.0),
    "n0_auc_vs_no_personalisation": (">=", -0.001),
    "maml_vs_map_n32": None,
    "lookup_members": None,
    "lookup_p50_ms_batch64_lmdb": None,
    "lookup_p99_ms_batch64_lmdb": ("<=", 1),
    "lookup_p50_ms_batch64_sqlite": None,
    "lookup_p99_ms_batch64_sqlite": ("<=", 8),
    "int8_memory": (">=", 3.2),
    "int8_auc_change": ("<=", 1e-4),
    "refresh_vs_full_max_diff": ("<=", 1e-8),
}


def elsewhere(results: Path) -> dict[str, float]:
    """Bars that other scripts have measured."""
    found = {**read_json(results / "generator.json")["bars"], **read_json(results / "real_logs.json")["bars"]}
    return {bar: value for bar, value in found.items() if bar in LIMITS}


if __name__ == "__main__":
    record_bars(__file__, LIMITS, elsewhere=elsewhere, quick=("vmap_vs_loop_max_diff", "map_optimality"))
