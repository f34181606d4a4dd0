"""SmolLM2-135M at 3 bits per channel on WikiText-2 validation text: this package and GPTQModel on the same calibration.

    python packages/quantease/reproduce/wikitext.py [--quick] [-o FOLDER]

One half of the text calibrates, windows of the other half evaluate. About twelve minutes of CPU time, two with
`--quick` (two blocks, few tokens, without GPTQModel); a run that was killed continues. WikiText-2 is data, not part of
the repository: the folder `shared/data` beside it, or `CORE_TENSOR_SHARED_DATA`, has it. The rows of GPTQModel need
`pip install gptqmodel optimum`; without, they are null.
"""

import argparse
import importlib.util
import math
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from core_tensor.app.files import read_json, write_json
from core_tensor.dev.testing import shared_data
from quantease.evaluation.compare import compare_methods
from quantease.evaluation.perplexity import window_losses
from quantease.evaluation.smollm2 import open_smollm2, smollm2_path
from quantease.evaluation.text import read_text, split, windows
from quantease.export import gptq
from quantease.model.causal_lm import open_causal_lm, open_gguf
from quantease.problem.config import LayerConfig
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
METHODS = {
    "rtn": LayerConfig("rtn"),
    "gptq": LayerConfig("gptq", act_order=False),
    "gptq act-order": LayerConfig("gptq"),
    "quantease": LayerConfig(),
}


def gptqmodel(folder: Path, calibration: Tensor, act_order: bool) -> Path:
    """Quantize SmolLM2 with GPTQModel: the same bits, groups, damping and calibration as ours.

    Args:
        folder: Working folder; what is finished there is not done again.
        calibration: Token ids, shape (windows, length).
        act_order: Its `desc_act`.

    Returns:
        The checkpoint.
    """
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # on two cores its own default is too few for its loader
    from gptqmodel import GPTQModel, QuantizeConfig

    dense, out = folder / "dense", folder / f"gptqmodel-{act_order}"
    if not dense.exists():
        model, tokenizer = open_gguf(smollm2_path(), torch.float32)
        del model.config.quantization_config  # transformers saves no model that it read from a gguf file
        plain = type(model)(model.config)
        plain.load_state_dict(model.state_dict())
        for part in (plain, tokenizer):
            part.save_pretrained(folder / "dense.part")
        (folder / "dense.part").rename(dense)
    if not (out / "seconds.json").exists():
        options: dict[str, Any] = {"desc_act": act_order, "act_group_aware": False, "damp_percent": 0.01}
        settings = QuantizeConfig(bits=3, group_size=-1, sym=False, format="gptq_v2", **options)
        model = GPTQModel.load(str(dense), settings, device="cpu", dtype=torch.float32)
        data = [{"input_ids": w[None], "attention_mask": torch.ones_like(w)[None]} for w in calibration]
        start = time.process_time()
        model.quantize(data, batch_size=1)
        seconds = time.process_time() - start
        model.save(str(out))
        write_json(out / "seconds.json", {"seconds": seconds})
    return out


def main() -> None:
    """Run all methods and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two blocks, few tokens: other figures")
    parser.add_argument("--folder", type=Path, help="working folder")
    parser.add_argument("--windows", type=int, default=8, help="calibration windows of 512 tokens")
    parser.add_argument("--evaluation", type=int, default=24, help="evaluation windows of 512 tokens")
    parser.add_argument("-o", "--out", type=Path, default=RESULTS, help="folder for wikitext.json")
    options = parser.parse_args()
    quick = options.quick
    folder = options.folder or Path("out") / f"quantease-wikitext{'-quick' if quick else ''}"
    count, others = (4, 3) if quick else (options.windows, options.evaluation)
    text = split(read_text([shared_data("text", "wikitext2_valid.txt")]), "WikiText-2 validation")
    lm = open_smollm2()
    calibration = windows(lm.tokenizer, text.calibration, 512, count)
    evaluation = windows(lm.tokenizer, text.evaluation, 512, others)

    def stage(what: str, done: int, total: int) -> None:
        print(f"{what} {done}/{total}", file=sys.stderr, flush=True)

    blocks = 2 if quick else None
    compared = compare_methods(lm, calibration, evaluation, folder, METHODS, blocks=blocks, unseen=1, stage=stage)
    rows = [{key: row[key] for key in ("method", "kl", "perplexity", "seconds")} for row in compared.rows]
    for act_order in (False, True):
        row: dict[str, Any] = {"method": f"GPTQModel{' act-order' if act_order else ''}", "kl": None}
        if quick or importlib.util.find_spec("gptqmodel") is None:
            reason = "left out by --quick" if quick else "gptqmodel is not installed"
            rows.append(row | {"perplexity": None, "seconds": None, "reason": reason})
            continue
        out = gptqmodel(folder, calibration, act_order)
        if not (out / "losses.json").exists():
            losses = window_losses(open_causal_lm(gptq.load(out, torch.float32)), evaluation)
            write_json(out / "losses.json", {"losses": losses.tolist()})
        perplexity = math.exp(torch.tensor(read_json(out / "losses.json")["losses"]).mean())
        rows.append(row | {"perplexity": perplexity, "seconds": read_json(out / "seconds.json")["seconds"]})
    full = rows[0]["perplexity"]
    for row in rows:
        row["over fp32"] = None if row["perplexity"] is None else row["perplexity"] / full
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(
        options.out / "wikitext.json",
        {
            "measured_at": f"version {version('quantease')}",
            "calibration_tokens": calibration.numel(),
            "evaluation_tokens": evaluation.numel(),
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
