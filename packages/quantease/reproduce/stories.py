"""stories260K at 2, 2.5 and 3 bits per channel, calibrated on its own samples, over three seeds of these.

Perplexity over full precision's, and mean KL divergence from it, on samples that calibration did not see. Four minutes
of one core. The trained weights are data, not part of the repository: the folder `shared/data` beside it, or
`CORE_TENSOR_SHARED_DATA`, has them.
"""

import argparse
import math
import runpy
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from core_tensor.app.files import write_json
from core_tensor.dev.testing import shared_data
from quantease.evaluation.compare import default_methods
from quantease.evaluation.perplexity import Predictions, streamed, window_scores
from quantease.model.causal_lm import CausalLM, open_causal_lm
from quantease.model.layer_store import TUNED
from quantease.model.plan import ModelConfig
from quantease.model.quantize_model import QuantizedCausalLM, quantize_model
from quantease.problem.config import LayerConfig
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
TESTS = Path(__file__).parents[1] / "tests"
MIXED = 2.5


def samples(model: Any, seed: int) -> tuple[Tensor, Tensor]:
    """Windows of 256 tokens that the model writes: 32 that calibrate and 48 others.

    Args:
        model: The model.
        seed: Of the random numbers.

    Returns:
        Token ids, shapes (32, 256) and (48, 256).
    """
    torch.manual_seed(seed)
    start = torch.ones(80, 1, dtype=torch.int64)
    found = model.generate(start, max_new_tokens=255, do_sample=True, top_k=0, eos_token_id=None, pad_token_id=0)
    return found[:32], found[32:]


def runs(lm: CausalLM, calibration: Tensor, bits: float, folder: Path) -> Iterator[tuple[str, QuantizedCausalLM]]:
    """The model quantized by every method.

    Args:
        lm: The model.
        calibration: Token ids.
        bits: Bits per weight; an average where it has a fraction.
        folder: Working folder.

    Yields:
        Name of the method and the quantized model.
    """
    whole = math.ceil(bits)
    if bits != whole:
        yield (
            "quantease",
            quantize_model(lm, calibration, folder / "mixed", ModelConfig(LayerConfig(bits=whole), average_bits=bits)),
        )
        return
    for name, layer in default_methods(LayerConfig(bits=whole)).items():
        yield name, quantize_model(lm, calibration, folder / name, ModelConfig(layer, tune="none"))
    run = quantize_model(lm, calibration, folder / "tuned", ModelConfig(LayerConfig(bits=whole), tune="model"))
    end_to_end = folder / "tuned" / "layers" / TUNED
    yield "quantease, tuned end to end", run
    end_to_end.unlink()  # leaves what was tuned per block
    yield "quantease, tuned per block", run


def main() -> None:
    """Measure all methods and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the samples")
    options = parser.parse_args()
    model = runpy.run_path(str(TESTS / "conftest.py"))["stories_model"](shared_data("stories260k", "stories260K.bin"))
    found: dict[tuple[float, str], list[tuple[float, float]]] = defaultdict(list)
    for seed in range(options.seeds):
        calibration, evaluation = samples(model, seed)
        lm = open_causal_lm(model)
        exact = Predictions(streamed(lm, evaluation))
        full = window_scores(exact).to_dict()["perplexity"]
        for bits in (3.0, 2.0, MIXED):
            with tempfile.TemporaryDirectory() as folder:
                for name, run in runs(lm, calibration, bits, Path(folder)):
                    scores = window_scores(Predictions(streamed(run.lm, evaluation)), exact).to_dict()
                    found[bits, name].append((scores["perplexity"] / full, scores["kl"]))
                    print(seed, bits, name, *found[bits, name][-1], file=sys.stderr, flush=True)
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for (bits, name), values in found.items():
        ratios, divergences = zip(*values, strict=True)
        row = {"method": name, "seeds": len(values), "over fp32": fmean(ratios), "kl": fmean(divergences)}
        row["ratios"], spread = ratios, stdev(ratios) if len(ratios) > 1 else None
        rows[f"bits{bits:g}".replace(".", "_")].append(row | {"kls": divergences, "over fp32 sd": spread})
    write_json(RESULTS / "stories.json", {"measured_at": f"version {version('quantease')}"} | rows)


if __name__ == "__main__":
    main()
