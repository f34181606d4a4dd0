"""Several algorithms on the same model, calibration and evaluation text: one table and one picture."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from core_tensor.app.files import digest, read_json, reading, write_json
from torch import Tensor

from quantease.evaluation.perplexity import Predictions, Scores, streamed, window_scores
from quantease.evaluation.report import Row, draw_errors, layer_rows, summary, unseen_errors
from quantease.model.causal_lm import CausalLM
from quantease.model.plan import ModelConfig
from quantease.model.quantize_model import quantize_model
from quantease.problem.config import LayerConfig

Stage = Callable[[str, int, int], None]
"""Called with what is going on, how many steps of it are done, and how many there are."""


def default_methods(layer: LayerConfig) -> dict[str, LayerConfig]:
    """The methods that are compared at one setting of bits and groups.

    Args:
        layer: Bits, groups, symmetry, storage and outliers.

    Returns:
        Layer options by method: rounding, GPTQ with act-order (as it is, and on the clip grid), the paper's QuantEase
        and the default pipeline; with outliers also the paper's and the default's outlier-aware form.
    """
    plain = replace(layer, outliers=0.0)
    methods = {
        "rtn": replace(plain, algorithm="rtn"),
        "gptq": replace(plain, algorithm="gptq"),
        "gptq-clip": replace(plain, algorithm="gptq", grid="clip"),
        "quantease-paper": replace(plain, algorithm="quantease-paper"),
        "quantease": replace(plain, algorithm="quantease"),
    }
    if layer.outliers:
        methods["quantease-paper+outliers"] = replace(layer, algorithm="quantease-paper")
        methods["quantease+outliers"] = replace(layer, algorithm="quantease")
    return methods


@dataclass(frozen=True)
class Compared:
    """Results of a comparison.

    Attributes:
        rows: One row per method, full precision first: mean KL divergence from it and its standard error, perplexity,
            bits per weight, layer errors, seconds.
        errors: Layer errors on unseen tokens by method.
        divergences: Mean KL divergence from full precision on each window, by method.
    """

    rows: list[Row]
    errors: dict[str, list[Row]]
    divergences: dict[str, list[float]]

    def draw(self, path: Path, title: str) -> None:
        """Draw the layer errors.

        Args:
            path: PNG to write.
            title: Heading.
        """
        draw_errors(self.errors, path, "unseen tokens", title)


def compare_methods(
    lm: CausalLM,
    calibration: Tensor,
    evaluation: Tensor,
    folder: Path,
    methods: Mapping[str, LayerConfig],
    config: ModelConfig | None = None,
    *,
    blocks: int | None = None,
    unseen: int = 4,
    overwrite: bool = False,
    stage: Stage | None = None,
) -> Compared:
    """Quantize a model by several methods and evaluate each; a killed comparison continues where it was.

    Args:
        lm: The model.
        calibration: Token ids, shape (windows, length), int64.
        evaluation: Token ids of another text, same form.
        folder: Working folder; every method's run is in a folder of its name.
        methods: Layer options by name.
        config: Options of the runs but for the layers'.
        blocks: Quantize only the first blocks; None is all.
        unseen: Evaluation windows on which layer errors are measured.
        overwrite: Delete other runs that the working folder holds.
        stage: Called along the way.

    Returns:
        The results.
    """
    config = config or ModelConfig()
    report = stage or silent
    evaluated = digest(evaluation)

    def measure(name: str, compute: Callable[[], Row]) -> Row:
        path = folder / f"{name}.json"
        if path.exists():
            with reading(path, "figures of a comparison"):
                known = dict(read_json(path))
                if known["evaluation_digest"] == evaluated:
                    report(name, 1, 1)
                    return known
        row = compute() | {"evaluation_digest": evaluated}
        write_json(path, row)
        return row

    @cache
    def exact() -> Predictions:
        return Predictions(streamed(lm, evaluation, lambda done, total: report("fp32: predictions", done, total)))

    def scores(model: CausalLM, name: str) -> Row:
        stream = streamed(model, evaluation, lambda done, total: report(f"{name}: predictions", done, total))
        found: Scores = window_scores(Predictions(stream, room=0), exact())
        divergences = [] if found.divergences is None else found.divergences.tolist()
        return {**found.to_dict(), "kl by window": divergences}

    full = measure("fp32", lambda: dict(window_scores(exact()).to_dict()))
    divergences: dict[str, list[float]] = {}
    rows: list[Row] = [{"method": "fp32", "perplexity": full["perplexity"], "kl": 0.0}]
    errors: dict[str, list[Row]] = {}
    for name, layer in methods.items():

        def progress(done: int, total: int, _: str, name: str = name) -> None:
            report(f"{name}: layers", done, total)

        run = quantize_model(
            lm,
            calibration,
            folder / name,
            replace(config, layer=layer),
            blocks=blocks,
            overwrite=overwrite,
            progress=progress,
        )

        def evaluate(name: str = name, run: Any = run) -> Row:
            layers = summary(layer_rows(run))
            report(f"{name}: layer errors", 0, 1)
            unseen_rows = unseen_errors(run, evaluation[:unseen])
            return layers | scores(run.lm, name) | {"errors": unseen_rows}

        result = measure(f"{name}/result", evaluate)
        errors[name], divergences[name] = result["errors"], result["kl by window"]
        rows.append(
            {
                "method": name,
                "kl": result["kl"],
                "kl error": result["kl_standard_error"],
                "perplexity": result["perplexity"],
                "bits/weight": result["bits_per_weight"],
                "layer error (unseen)": median(row["error"] for row in result["errors"]),
                "layer error (calibration)": result["median_calibration_error"],
                "seconds": result["seconds"],
            }
        )
    return Compared([_in_order(row) for row in rows], errors, divergences)


_COLUMNS = (
    "method",
    "kl",
    "kl error",
    "perplexity",
    "bits/weight",
    "layer error (unseen)",
    "layer error (calibration)",
    "seconds",
)


def _in_order(row: Row) -> Row:
    return {name: row.get(name) for name in _COLUMNS}


def best(rows: Sequence[Row]) -> str:
    """The quantized method whose predictions are nearest to full precision's.

    Args:
        rows: Rows of a comparison.

    Returns:
        Its name.
    """
    name: str = min((row for row in rows if row["method"] != "fp32"), key=lambda row: row["kl"])["method"]
    return name


def silent(what: str, done: int, total: int) -> None:
    """A `Stage` that says nothing.

    Args:
        what: What is going on.
        done: Steps done.
        total: Steps there are.
    """
    del what, done, total
