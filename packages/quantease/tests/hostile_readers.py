"""The readers of quantease for the hostile harness: a valid small file, and what reads it."""

import json
from pathlib import Path
from typing import Any

TEXT = '{"text": "one two"}\n{"text": "three"}\n{"messages": [{"role": "user", "content": "x"}]}\n'


class _Tokenizer:
    chat_template = "yes"

    def apply_chat_template(self, messages: Any, tokenize: bool) -> str:
        return "".join(f"{m['role']}: {m['content']}" for m in messages)


def _model() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, bos_token_id=1, eos_token_id=2)).eval()


def _run(folder: Path, tune: str = "none") -> Any:
    import torch
    from quantease import LayerConfig, ModelConfig, open_causal_lm, quantize_model

    tokens = torch.arange(32).reshape(2, 16)
    layer = LayerConfig("quantease-paper", sweeps=1, relax=0, outliers=0.05)
    return quantize_model(open_causal_lm(_model()), tokens, folder / "run", ModelConfig(layer, tune=tune, tune_steps=1))


def _layer(folder: Path) -> Path:
    run = _run(folder)
    return next((run.folder / "layers").rglob("mlp.up_proj.safetensors"))


def _read_layer(path: Path) -> None:
    import torch
    from quantease.model.layer_store import LayerStore
    from quantease.nn import QuantizedLinear

    layer = LayerStore(path.parents[1]).load(0, "mlp.up_proj")
    layer.dequantize()
    QuantizedLinear.from_layer(layer)(torch.ones(1, len(layer.group)))


def _tuned(folder: Path) -> Path:
    return _run(folder, "block").folder / "layers" / "0000" / "tuned.safetensors"


def _read_tuned(path: Path) -> None:
    from quantease import open_causal_lm
    from quantease.model.quantize_model import open_quantized

    with open_quantized(open_causal_lm(_model()), path.parents[2]).lm.loaded(0):
        pass


def _record(folder: Path) -> Path:
    return _run(folder).folder / "run.json"


def _read_record(path: Path) -> None:
    from quantease import open_causal_lm
    from quantease.model.quantize_model import open_quantized

    open_quantized(open_causal_lm(_model()), path.parent)


def _report(folder: Path) -> Path:
    path = folder / "report.json"
    row = {"block": 0, "matrix": "mlp.up_proj", "out": 2, "in": 2, "algorithm": "rtn", "bits_per_weight": 3.0}
    path.write_text(json.dumps({"summary": {"layers": 1, "bits_per_weight": 3.0}, "layers": [row]}))
    return path


def _inspect(path: Path) -> None:
    import click
    from quantease.cli import main

    try:
        main.main(["inspect", str(path.parent)], standalone_mode=False)
    except click.ClickException as error:
        raise ValueError(str(error)) from error


def _rows(folder: Path) -> Path:
    (folder / "rows.jsonl").write_text(TEXT)
    return folder / "rows.jsonl"


def _parquet(folder: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["one two", "three"]}), folder / "rows.parquet")
    return folder / "rows.parquet"


def _read_text(path: Path) -> None:
    from quantease.evaluation.text import read_text

    read_text([path], tokenizer=_Tokenizer())


def _native(folder: Path) -> Path:
    from quantease import export_model

    export_model(_run(folder), folder / "native", "native")
    return folder / "native"


def _read_native(path: Path) -> None:
    import torch
    from quantease.evaluation.evaluate import load_for_evaluation

    model, _ = load_for_evaluation(str(path), tokenizer=False)
    with torch.no_grad():
        model(torch.ones(1, 3, dtype=torch.int64))


READERS = [
    ("layer", _layer, _read_layer),
    ("tuned scales and norms", _tuned, _read_tuned),
    ("run.json", _record, _read_record),
    ("report.json", _report, _inspect),
    ("jsonl", _rows, _read_text),
    ("parquet", _parquet, _read_text),
    ("native model", _native, _read_native),
]
