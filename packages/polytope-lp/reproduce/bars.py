"""The bars of the benchmark beside their limits: `results/bars.json`.

python packages/polytope-lp/reproduce/bars.py [--only KEY ...] [--runs 3] [--quick] [-o FOLDER]
"""

from core_tensor.dev.benchmarking import Limit, record_bars

LIMITS: dict[str, Limit] = {
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

if __name__ == "__main__":
    record_bars(__file__, LIMITS)
