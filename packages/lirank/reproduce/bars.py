"""The bars of the benchmark beside their limits: `results/bars.json`.

    python packages/lirank/reproduce/bars.py [--only KEY ...] [--runs 3] [--quick] [-o FOLDER]

What `real_logs.py` and `calibration.py` have measured is taken from their results.
"""

from pathlib import Path

from core_tensor.app.files import read_json
from core_tensor.dev.benchmarking import Limit, record_bars

ELSEWHERE = {
    "calibration_shift": ("calibration.json", "shift", "calibration_shift"),
    "auc_vs_lightgbm_ml100k": ("real_logs.json", "movielens_tuned", "auc_vs_lightgbm"),
    "auc_vs_lightgbm_ml100k_logloss": ("real_logs.json", "movielens_tuned", "logloss_vs_lightgbm"),
    "auc_vs_lightgbm_amazon": ("real_logs.json", "amazon", "auc_vs_lightgbm"),
    "auc_vs_lightgbm_amazon_logloss": ("real_logs.json", "amazon", "logloss_vs_lightgbm"),
}
LIMITS: dict[str, Limit] = {
    "step_vs_fuxictr_1m": (">=", 1.25),
    "step_vs_fuxictr_4m": (">=", 2.5),
    "low_rank_step_vs_fuxictr_1m": None,
    "low_rank_step_vs_fuxictr_4m": None,
    "step_vs_deepctr_1m": None,
    "step_vs_deepctr_4m": None,
    "table_cost_vs_dense_adam_1m": (">=", 8),
    "table_cost_vs_dense_adam_4m": (">=", 30),
    "step_4m_vs_100k_rows": ("<=", 1.1),
    "row_update_vs_torch": (">=", 4),
    "row_update_in_huge_pages": None,
    "isotonic_vs_dense_form": (">=", 30),
    "isotonic_vs_dense_form_alone": None,
    "int8_lookup_vs_fp32_16": (">=", 3),
    "int8_lookup_vs_fp32_64": (">=", 2),
    "int8_bags_vs_fp32_16": (">=", 1.4),
    "int8_bags_vs_fp32_64": (">=", 1.4),
    "int8_bags_vs_torch_16": (">=", 0.9),
    "int8_bags_vs_torch_64": (">=", 0.9),
    "int8_lookup_of_floor_16": None,
    "int8_lookup_of_floor_64": None,
    "int8_memory": (">=", 2.9),
    "export_max_diff": ("<=", 1e-5),
    "onnx_p50_ms_1": None,
    "onnx_p50_ms_64": None,
    "onnx_p50_ms_512": None,
    "replay_equals_serve": ("<=", 0),
    "reader_share_of_step": ("<=", 0.2),
    "neural_linear_1000_candidates_ms": ("<=", 2),
    "calibration_shift": ("<=", 1.0),
    "auc_vs_lightgbm_ml100k": (">=", 0.005),
    "auc_vs_lightgbm_ml100k_logloss": ("<=", 0),
    "auc_vs_lightgbm_amazon": (">=", 0.004),
    "auc_vs_lightgbm_amazon_logloss": ("<=", 0),
}


def elsewhere(results: Path) -> dict[str, float]:
    """Bars that other scripts have measured."""
    found = {bar: (read_json(results / file), part, key) for bar, (file, part, key) in ELSEWHERE.items()}
    return {bar: round(file[part][key], 4) for bar, (file, part, key) in found.items() if part in file}


if __name__ == "__main__":
    record_bars(__file__, LIMITS, elsewhere=elsewhere)
