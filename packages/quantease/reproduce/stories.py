"""stories260K at 2, 2.5 and 3 bits per channel, calibrated on its own samples, over three seeds of these.

    python packages/quantease/reproduce/stories.py [--quick] [-o FOLDER]

Perplexity over full precision's, and mean KL divergence from it, on samples that calibration did not see. Four minutes
of one core; `--quick` (one seed) takes a third of it. What is finished of a seed is kept in `--folder`. The trained
weights are data and not part of the repository: `shared/data` beside it, or `CORE_TENSOR_SHARED_DATA`, has them.
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
from core_tensor.app.files import read_json, write_json
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
        yield name, quantize_model(lm, calibration, folder / name, ModelConfig(layer))
    yield (
        "quantease, not tuned",
        quantize_model(lm, calibration, folder / "untuned", ModelConfig(LayerConfig(bits=whole), tune="none")),
    )
    run = quantize_model(lm, calibration, folder / "tuned", ModelConfig(LayerConfig(bits=whole), tune="model"))
    end_to_end = folder / "tuned" / "layers" / TUNED
    yield "quantease, tuned end to end", run
    end_to_end.unlink()  # leaves what was tuned per block
    yield "quantease, tuned per block", run


def cells(seed: int) -> Iterator[dict[str, Any]]:
    """Figures of all methods on the samples of a seed.

    Args:
        seed: Of the samples.

    Yields:
        Rows with bits, method, seed, `ratio` of perplexities and `kl`.
    """
    model = runpy.run_path(str(TESTS / "conftest.py"))["stories_model"](shared_data("stories260k", "stories260K.bin"))
    calibration, evaluation = samples(model, seed)
    lm = open_causal_lm(model)
    exact = Predictions(streamed(lm, evaluation))
    full = window_scores(exact).to_dict()["perplexity"]
    for bits in (3.0, 2.0, MIXED):
        with tempfile.TemporaryDirectory() as folder:
            for name, run in runs(lm, calibration, bits, Path(folder)):
                scores = window_scores(Predictions(streamed(run.lm, evaluation)), exact).to_dict()
                row = {"bits": bits, "method": name, "seed": seed}
                print(*row.values(), scores["perplexity"] / full, scores["kl"], file=sys.stderr, flush=True)
                yield row | {"ratio": scores["perplexity"] / full, "kl": scores["kl"]}


def main() -> None:
    """Measure all methods and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the samples")
    parser.add_argument("--folder", type=Path, default=Path("out") / "quantease-stories", help="working folder")
    parser.add_argument("-o", "--out", type=Path, default=RESULTS, help="folder for stories.json")
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    for seed in range(1 if options.quick else options.seeds):
        kept = options.folder / f"{seed}.json"
        if not kept.exists():
            write_json(kept, {"rows": list(cells(seed))})
        found += read_json(kept)["rows"]
    tables: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for bits, name in dict.fromkeys((row["bits"], row["method"]) for row in found):
        chosen = [row for row in found if (row["bits"], row["method"]) == (bits, name)]
        ratios, divergences = [row["ratio"] for row in chosen], [row["kl"] for row in chosen]
        several = len(chosen) > 1
        tables[f"bits{bits:g}".replace(".", "_")].append(
            {
                "method": name,
                "seeds": len(chosen),
                "over fp32": fmean(ratios),
                "over fp32 sd": stdev(ratios) if several else None,
                "kl": fmean(divergences),
                "kl sd": stdev(divergences) if several else None,
                "ratios": ratios,
                "kls": divergences,
            }
        )
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "stories.json", {"measured_at": f"version {version('quantease')}"} | tables)


if __name__ == "__main__":
    main()
