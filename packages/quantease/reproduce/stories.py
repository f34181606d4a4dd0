"""stories260K at 3 and 2 bits per channel, calibrated on its own samples: perplexity over full precision's.

Two minutes. The trained weights are data, not part of the repository: the folder `shared/data` beside it, or
`CORE_TENSOR_SHARED_DATA`, has them.
"""

import runpy
import tempfile
from pathlib import Path

import torch
from core_tensor.app.files import write_json
from core_tensor.dev.testing import shared_data
from quantease.evaluation.compare import compare_methods, default_methods
from quantease.model.causal_lm import open_causal_lm
from quantease.problem.config import LayerConfig

RESULTS = Path(__file__).parent / "results"
TESTS = Path(__file__).parents[1] / "tests"


def main() -> None:
    """Compare the methods on samples of the model that calibration did not see."""
    model = runpy.run_path(str(TESTS / "conftest.py"))["stories_model"](shared_data("stories260k", "stories260K.bin"))
    torch.manual_seed(0)
    start = torch.ones(80, 1, dtype=torch.int64)
    sample = model.generate(start, max_new_tokens=255, do_sample=True, top_k=0, eos_token_id=None, pad_token_id=0)
    calibration, evaluation = sample[:32], sample[32:]
    results = {}
    for bits in (3, 2):
        methods = default_methods(LayerConfig(bits=bits))
        with tempfile.TemporaryDirectory() as folder:
            compared = compare_methods(open_causal_lm(model), calibration, evaluation, Path(folder), methods)
        full = compared.rows[0]["perplexity"]
        results[f"bits{bits}"] = [row | {"over fp32": row["perplexity"] / full} for row in compared.rows]
    write_json(RESULTS / "stories.json", results)


if __name__ == "__main__":
    main()
