"""Architectures of transformers with random weights, and the formats in which plain transformers loads them again.

    python packages/quantease/reproduce/zoo.py [--quick] [-o FOLDER]

Every model is rounded to 4 bits per channel, saved and loaded again; it goes through a format if its logits are equal,
else the reason is kept, which `quantize` gives before any work. `zoo.json` has the table of the docs. About a
minute and a half of one core; `--quick` takes every fifth architecture.
"""

import argparse
import runpy
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from core_tensor.app.files import write_json
from quantease.cli.options import quiet
from quantease.export.save import check_format, export_model
from quantease.model.causal_lm import CausalLM, open_causal_lm
from quantease.model.plan import ModelConfig, check_coverage, model_matrices
from quantease.model.quantize_model import quantize_model
from quantease.problem.config import LayerConfig

RESULTS = Path(__file__).parent / "results"
TESTS = Path(__file__).parents[1] / "tests" / "model" / "test_zoo.py"
FORMATS = ("dense", "compressed-tensors", "gptq_v2", "native")
CONFIG = ModelConfig(LayerConfig("rtn", bits=4, symmetric=True), min_tokens=1)
MIXTURES = ("Qwen3Moe", "Qwen2Moe", "Olmoe", "DeepseekV2", "DeepseekV3")


def saved(lm: CausalLM, folder: Path) -> dict[str, Any]:
    """What a model goes through.

    Args:
        lm: The model.
        folder: Working folder.

    Returns:
        Per format True or why not, and the part of the block weights that is quantized.
    """
    row: dict[str, Any] = {"quantized": check_coverage(lm, model_matrices(lm, CONFIG)).fraction}
    tokens = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(1))
    run = quantize_model(lm, tokens, folder / "run", CONFIG)
    for name in FORMATS:
        try:
            check_format(lm, CONFIG, name)
            export_model(run, folder / name, name)
            row[name] = "yes"
        except Exception as error:  # what the rehearsal of `quantize` would meet: whatever a reader stumbles over
            row[name], row[f"{name}, why"] = "–", str(error)
    return row


def main() -> None:
    """Go through the zoo and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="every fifth architecture")
    parser.add_argument("-o", "--out", type=Path, default=RESULTS, help="folder for zoo.json")
    options = parser.parse_args()
    quiet()
    warnings.simplefilter("ignore")  # transformers' own, about settings of architectures
    zoo = runpy.run_path(str(TESTS))
    zoo["SIZES"].update(dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"), 64))
    zoo["SIZES"].update(dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32))
    zoo["SIZES"]["num_key_value_heads"] = 4
    names = sorted({*zoo["ZOO_NAMES"], *MIXTURES})
    rows = []
    for name in names[::5] if options.quick else names:
        torch.manual_seed(0)
        row: dict[str, Any] = {"architecture": name}
        with tempfile.TemporaryDirectory() as folder:
            try:
                model = transformers.AutoModelForCausalLM.from_config(zoo["config_of"](name)).eval()
                row |= saved(open_causal_lm(model), Path(folder))
            except ValueError as error:
                row |= dict.fromkeys(FORMATS, "–") | {"quantized": 0.0, "refused": str(error)}
        rows.append(row)
        print(*(row[key] for key in ("architecture", *FORMATS)), row.get("refused", ""), file=sys.stderr, flush=True)
    through = {f"{name} through": sum(row[name] == "yes" for row in rows) for name in FORMATS}
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(
        options.out / "zoo.json",
        {"measured_at": f"version {version('quantease')}", "architectures": len(rows), **through, "rows": rows},
    )


if __name__ == "__main__":
    main()
