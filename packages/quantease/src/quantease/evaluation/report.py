"""What a quantization run did: figures per layer, as JSON, as a table and as a picture."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import torch
from core_tensor.app.cli import table
from core_tensor.app.figures import pyplot, save
from core_tensor.app.files import read_json, reading, write_json, write_text
from torch import Tensor

from quantease.evaluation.perplexity import Predictions, streamed, window_scores
from quantease.model.block_stream import BlockStream
from quantease.model.matrices import observe
from quantease.model.plan import coverage
from quantease.model.quantize_model import QuantizedCausalLM

Row = dict[str, Any]


def layer_rows(run: QuantizedCausalLM) -> list[Row]:
    """One row per layer, as its `LayerReport` has it.

    Args:
        run: A finished run.

    Returns:
        Rows with the layer's name, shape and report; those outside the blocks last, under the number of blocks.
    """
    last = len(run.original.blocks)
    layers = chain(
        ((index, matrix.name, layer) for index, matrix, layer in run.layers()),
        ((last, name, layer) for name, layer in run.end_layers().items()),
    )
    rows = []
    for index, name, layer in layers:
        out, features = layer.codes.shape
        rows.append({"block": index, "matrix": name, "out": out, "in": features} | _finite(layer.report.to_dict()))
    return rows


def summary(rows: Sequence[Row]) -> Row:
    """Totals of a run.

    Args:
        rows: What `layer_rows` returned.

    Returns:
        Number of layers and weights, bits per weight over all of them, median errors and the time of all layers.
    """
    sizes = [row["out"] * row["in"] for row in rows]
    bits = sum(row["bits_per_weight"] * size for row, size in zip(rows, sizes, strict=True)) / sum(sizes)
    heldout = [row["heldout_error"] for row in rows if row["heldout_error"] is not None]
    certified = [row["cw_minimum"] for row in rows if row["cw_minimum"] is not None]
    return {
        "layers": len(rows),
        "weights": sum(sizes),
        "bits_per_weight": bits,
        "median_calibration_error": median(row["calibration_error"] or math.inf for row in rows),
        "median_heldout_error": median(heldout) if heldout else None,
        "certified_layers": sum(certified) if certified else None,
        "rounded_for_lack_of_tokens": _fallbacks(rows),
        "seconds": sum(row["seconds"] for row in rows),
    }


def _fallbacks(rows: Sequence[Row]) -> int:
    algorithms = {row["algorithm"] for row in rows}
    return sum(row["algorithm"] == "rtn" for row in rows) if algorithms != {"rtn"} else 0


def _finite(values: Mapping[str, Any]) -> Row:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def unseen_errors(run: QuantizedCausalLM, tokens: Tensor) -> list[Row]:
    r"""Relative error $\|(W - \hat W)X\|^2 / \|WX\|^2$ of every layer on tokens that calibration never saw.

    The inputs X are those of the quantized model itself, behind its own quantized layers.

    Args:
        run: A finished run.
        tokens: Token ids, shape (windows, length), int64.

    Returns:
        Rows with `block`, `matrix` and `error`.
    """
    rows: list[Row] = []
    stream = BlockStream(run.lm, tokens)
    for index, matrices in enumerate(run.matrices):
        with run.original.loaded(index) as block:
            weights = {m.name: m.weight(block).float().clone() for m in matrices}
        with run.lm.loaded(index) as block:
            found = _OutputErrors(weights, {m.name: m.weight(block).float() for m in matrices})
            with observe(block, matrices, found.add):
                stream.advance(index, block)
        rows += [{"block": index, "matrix": name, "error": error} for name, error in found.relative()]
    return rows


class _OutputErrors:
    """Energies of the errors and outputs of a block's matrices."""

    def __init__(self, weights: Mapping[str, Tensor], quantized: Mapping[str, Tensor]) -> None:
        self.weights = weights
        self.differences = {name: weights[name] - quantized[name] for name in weights}
        self.energies = {name: [0.0, 0.0] for name in weights}  # ||(W - What) x||^2 and ||W x||^2

    def add(self, name: str, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()
        for place, values in enumerate((self.differences[name], self.weights[name])):
            self.energies[name][place] += float(torch.sum((rows @ values.T).square_(), dtype=torch.float64))

    def relative(self) -> list[tuple[str, float]]:
        """The error of every matrix that saw tokens with an effect."""
        return [(name, error / size) for name, (error, size) in self.energies.items() if size > 0]


READING = (
    "Mean KL divergence from full precision says best what a model lost. Held-out error compares layers; calibration "
    "error flatters where tokens are few."
)
"""Which figure of a report predicts quality."""


def write_report(
    run: QuantizedCausalLM,
    folder: Path,
    extra: Mapping[str, Any] | None = None,
    evaluation: Tensor | None = None,
    stage: Callable[[str, int, int], None] | None = None,
) -> Row:
    """Write `report.json`, `report.md` and `report.png` about a finished run.

    Args:
        run: The run.
        folder: Where to.
        extra: Further figures for the summary.
        evaluation: Token ids that calibration did not see, shape (windows, length), on which the quantized model is
            compared with the original; None for no comparison.
        stage: Called along the way.

    Returns:
        The summary.
    """
    rows = layer_rows(run)
    covered = coverage(run.lm, run.matrices)
    total = summary(rows) | {"quantized_fraction": covered.fraction, "left_alone": list(covered.left_alone)}
    total |= _tuning(run)
    total["weights_of_the_model"] = sum(p.numel() for p in run.lm.skeleton.parameters())
    if evaluation is not None:
        total |= _scores(run, evaluation, stage)
    total |= dict(extra or {})
    write_json(folder / "report.json", {"summary": total, "layers": rows})
    last = len(run.original.blocks)
    shown = [
        {
            "layer": row["matrix"] if row["block"] == last else f"{row['block']}.{row['matrix']}",
            "bits/weight": row["bits_per_weight"],
            "calibration error": row["calibration_error"],
            "held-out error": row["heldout_error"],
            "seconds": row["seconds"],
        }
        for row in rows
    ]
    lines = [f"- {key.replace('_', ' ')}: {_show(value)}" for key, value in total.items()]
    write_text(
        folder / "report.md", "\n".join(["# Quantization report", "", *lines, "", READING, "", table(shown), ""])
    )
    errors = [{"block": r["block"], "matrix": r["matrix"], "error": r["calibration_error"]} for r in rows]
    draw_errors({run.config.layer.algorithm: errors}, folder / "report.png", "calibration tokens")
    return total


def _tuning(run: QuantizedCausalLM) -> Row:
    """Losses before and after tuning; nothing where nothing was tuned."""
    found: Row = {}
    blocks = [run.store.tuning_losses(i) for i in range(len(run.matrices)) if run.store.has_tuned(i)]
    for key in ("before", "after"):
        if blocks:
            found[f"block_error_{key}_tuning"] = median(losses[key] for losses in blocks)
        if run.store.has_tuned():
            found[f"calibration_kl_{key}_tuning"] = run.store.tuning_losses()[key]
    return found


def _scores(run: QuantizedCausalLM, evaluation: Tensor, stage: Callable[[str, int, int], None] | None) -> Row:
    """Divergence and perplexity of the quantized model, and the original's perplexity."""

    def follow(what: str) -> Callable[[int, int], None]:
        return lambda done, total: None if stage is None else stage(what, done, total)

    exact = Predictions(streamed(run.original, evaluation, follow("evaluating the original")))
    found = window_scores(Predictions(streamed(run.lm, evaluation, follow("evaluating")), room=0), exact).to_dict()
    full = window_scores(exact).to_dict()
    return found | {"perplexity_at_full_precision": full["perplexity"], "evaluation_tokens": evaluation.numel()}


def read_report(path: Path) -> Row:
    """Read a `report.json`.

    Args:
        path: The file.

    Returns:
        `summary` and `layers`.

    Raises:
        ValueError: If it is no report.
    """
    with reading(path, "a report of quantease"):
        report = read_json(path)
        summary, layers = dict(report["summary"]), list(report["layers"])
        for row in layers:
            if not isinstance(row["matrix"], str) or not isinstance(row["block"], int):
                raise ValueError("layers without block and matrix")
        return {"summary": summary, "layers": layers}


def _show(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def draw_errors(errors: Mapping[str, Sequence[Row]], path: Path, tokens: str, title: str | None = None) -> None:
    """Draw layer errors over depth, one panel per kind of matrix, one line per method.

    Args:
        errors: For every method rows with `block`, `matrix` and `error`.
        path: PNG to write.
        tokens: Which tokens the errors are from, for the axis.
        title: Heading of the picture.
    """
    plt = pyplot("quantease[plot]")
    kinds = list(dict.fromkeys(_kind(row["matrix"]) for rows in errors.values() for row in rows))
    columns = min(4, len(kinds))
    lines = math.ceil(len(kinds) / columns)
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(3.6 * columns + 0.6, 2.7 * lines + 0.9),
        squeeze=False,
        sharex=True,
        layout="constrained",
    )
    for axis, kind in zip(axes.flat, kinds, strict=False):
        for number, (method, rows) in enumerate(errors.items()):
            blocks = sorted({row["block"] for row in rows})
            found = {b: [r["error"] for r in rows if r["block"] == b and _kind(r["matrix"]) == kind] for b in blocks}
            points = [(b, median(v)) for b, v in found.items() if v and None not in v]
            if points:
                style = "o-" if len(points) < 8 else "-"
                axis.plot(*zip(*points, strict=True), style, markersize=4, label=method, color=f"C{number}")
        axis.set_yscale("log")
        axis.set_title(kind, fontsize=10)
        axis.grid(alpha=0.3, which="both", linewidth=0.5)
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in axes.flat[len(kinds) :]:
        axis.axis("off")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    if len(kinds) < axes.size:
        axes.flat[-1].legend(handles, labels, loc="center", frameon=False, fontsize=11)
    else:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.supxlabel("decoder block")
    figure.supylabel(f"relative output error, {tokens}")
    if title:
        figure.suptitle(title)
    save(figure, path)


def _kind(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", "", name)
