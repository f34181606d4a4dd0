"""`lirank compress`, `lirank export` and `lirank bench`."""

from pathlib import Path
from typing import Any

import click
from core_tensor.app.cli import emit, json_option, out_option, table, threads_option

from lirank.cli.options import run_argument


@click.command()
@run_argument
@out_option("File for codes, scales and biases (safetensors).")
@threads_option
@json_option
def compress(run: Path, out: Path | None, as_json: bool) -> None:
    """Put the table of RUN into 8 bits per value and measure what that saves and costs."""
    from lirank.serve import deploy
    from lirank.workflow import sample

    trained, batch = sample(run)
    found = deploy.compress(trained, batch, out)
    rows = [
        {"label": label, "table": kind, "auc": entry[kind]["auc"], "logloss": entry[kind]["logloss"]}
        for label, entry in found["labels"].items()
        for kind in ("float32", "int8")
    ]
    head = (
        f"{found['float32_bytes']:.3g} bytes become {found['bytes']:.3g} ({found['ratio']:.2f} times smaller), "
        f"relative error of the rows {found['relative_error']:.2g}, largest change of a probability "
        f"{found['largest_difference']:.2g}"
    )
    emit(found, as_json, lambda: f"{head}\n{table(rows, digits=6)}")


@click.command()
@run_argument
@out_option("File to write: .onnx or .pt2 (torch.export).", required=True)
@click.option("--table", "kind", type=click.Choice(["int8", "float32"]), default="int8", help="How ids are stored.")
@threads_option
@json_option
def export(run: Path, out: Path, kind: Any, as_json: bool) -> None:
    """Write RUN as one graph, tables and calibration inside, and check that it scores like the model."""
    from lirank.serve import deploy
    from lirank.workflow import sample

    trained, batch = sample(run)
    found = deploy.export(trained, batch, out, kind)
    emit(
        found,
        as_json,
        f"{out}: {found['bytes']} bytes; differs by at most {found['max_difference']:.2g} over {found['rows']} rows",
    )


@click.command()
@run_argument
@click.option("--onnx", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="What `export` wrote.")
@click.option("--repeats", type=click.IntRange(10), default=200, help="Requests of each size.")
@threads_option
@json_option
def bench(run: Path, onnx: Path | None, repeats: int, as_json: bool) -> None:
    """Latency of RUN for 1, 64 and 512 candidates, inside the runtime (ONNX if given, else torch), one thread."""
    import torch

    from lirank.serve.deploy import latency
    from lirank.serve.export import OnnxModel, ServedModel, TorchModel
    from lirank.workflow import sample

    torch.set_num_threads(1)
    trained, batch = sample(run)
    served = ServedModel(trained.model)
    found = latency(OnnxModel(onnx) if onnx else TorchModel(served), served, batch, repeats)
    emit(found, as_json, lambda: table([{"candidates": count} | entry for count, entry in found.items()]))
