"""Long commands of quantease for `tools/faults.py`."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SMALL = "--text text.txt --windows 6 --length 32 --threads 1"
JOBS = {
    "quantize": {
        "command": f"quantease quantize model OUT {SMALL}",
        "varies": ["*run.json", "*.seconds", "*report.md"],
    },
    "export compressed-tensors": {"command": "quantease export run OUT --model model"},
    "export gptq": {"command": "quantease export run OUT --model model --format gptq"},
}


def prepare(folder: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=97, **sizes)).save_pretrained(folder / "model")
    vocabulary = {chr(32 + i): i for i in range(95)} | {"[UNK]": 95}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder / "model")
    (folder / "text.txt").write_text("\n\n".join(f"line {i} of a text that says little" for i in range(200)))
    program = Path(sys.executable).parent / "quantease"
    subprocess.run([program, "quantize", "model", "run", *SMALL.split()], cwd=folder, check=True, capture_output=True)


def content(path: Path) -> bytes:
    """A report also holds times."""
    return (
        path.read_bytes() if path.name != "report.json" else json.dumps(_untimed(json.loads(path.read_text()))).encode()
    )


def _untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _untimed(part) for key, part in value.items() if "seconds" not in key}
    return [_untimed(part) for part in value] if isinstance(value, list) else value
