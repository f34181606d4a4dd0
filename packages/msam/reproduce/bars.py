"""The bars of the benchmark beside their limits: `results/bars.json`.

python packages/msam/reproduce/bars.py [--only KEY ...] [--runs 3] [--quick] [-o FOLDER]
"""

from core_tensor.dev.benchmarking import Limit, record_bars

LIMITS: dict[str, Limit] = {
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

if __name__ == "__main__":
    record_bars(__file__, LIMITS)
