"""All of SmolLM2-135M at 3 and 2 bits per channel: divergence and perplexity beside GPTQ on the clip grid.

    python packages/quantease/reproduce/whole_model.py [--quick] [--minutes M] [-o FOLDER]

16 windows of 512 tokens of Python's own reference calibrate, at places drawn by a seed; ten windows of five other parts
of it evaluate. Every cell (bits, method, seed) is a folder under `--folder` that a later call continues block by block;
`--minutes` ends a call early, and `whole_model.json` always holds the cells that are finished. About half an hour of
one core per seed, and six minutes for the picture; `--quick` (two blocks, one seed, fewer tokens) takes three.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from core_tensor.app.files import read_json, write_json
from quantease.demo import DemoConfig, evaluation_windows
from quantease.evaluation.compare import default_methods
from quantease.evaluation.perplexity import Predictions, streamed, window_scores
from quantease.evaluation.report import draw_errors, unseen_errors
from quantease.evaluation.smollm2 import open_smollm2
from quantease.evaluation.text import python_topics, sample_windows
from quantease.model.plan import ModelConfig
from quantease.model.quantize_model import QuantizedCausalLM, quantize_model
from quantease.problem.config import LayerConfig

RESULTS = Path(__file__).parent / "results"
DRAWN = ("gptq", "gptq-clip", "quantease")


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        bits: Bits per weight.
        method: A name of `default_methods`.
        seed: Of the calibration windows.
    """

    bits: int
    method: str
    seed: int

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.bits}bit-{self.method}-{self.seed}"


def cells(seeds: int) -> Iterator[Cell]:
    """All runs, those of the bars first.

    Args:
        seeds: Number of seeds of the bars' methods; the others run once.

    Yields:
        The runs.
    """
    for seed in range(seeds):
        for bits in (3, 2):
            for method in ("gptq-clip", "quantease"):
                yield Cell(bits, method, seed)
        if seed == 0:
            yield from (Cell(3, method, 0) for method in ("gptq", "rtn", "quantease-paper"))


class Study:
    """The runs on one model and text.

    Args:
        folder: Working folder.
        quick: Two blocks, fewer tokens, one seed.
        minutes: When to stop; None is never.
    """

    def __init__(self, folder: Path, quick: bool, minutes: float | None) -> None:
        self.folder, self.quick = folder, quick
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.lm, self.text = open_smollm2(), python_topics()
        config = replace(DemoConfig(), evaluation=1 if quick else 2, evaluation_length=192 if quick else 512)
        self.evaluation = evaluation_windows(self.lm.tokenizer, self.text.evaluation, config)
        self.blocks = 2 if quick else None
        self._exact: Predictions | None = None

    def exact(self) -> Predictions:
        """Full precision's predictions."""
        if self._exact is None:
            self._exact = Predictions(streamed(self.lm, self.evaluation))
        return self._exact

    def stop(self) -> None:
        """End the program where its time is over; what is finished is on disk."""
        if self.deadline is not None and time.monotonic() > self.deadline:
            sys.exit("time is over: the same command continues")

    def kept(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Figures of an earlier call, or new ones.

        Args:
            name: Of their file.
            compute: Makes them.

        Returns:
            The figures.
        """
        path = self.folder / f"{name}.json"
        if not path.exists():
            write_json(path, compute())
        return dict(read_json(path))

    def run(self, cell: Cell) -> QuantizedCausalLM:
        """Quantize, or continue to.

        Args:
            cell: The run.

        Returns:
            The quantized model.
        """
        count = 4 if self.quick else 16
        tokens, _ = sample_windows(self.lm.tokenizer, self.text.calibration, 512, count, seed=cell.seed)
        layer = default_methods(LayerConfig(bits=cell.bits))[cell.method]
        clock = self.folder / f"{cell.name}.seconds.json"
        before = read_json(clock)["seconds"] if clock.exists() else 0.0
        since: list[float] = [] if before else [time.process_time()]

        def progress(done: int, total: int, name: str) -> None:
            del total
            since[:] = since or [time.process_time()]  # what a continued run repeats does not count
            if name and done % 7 == 0:
                write_json(clock, {"seconds": before + time.process_time() - since[0]})
                self.stop()

        run = quantize_model(
            self.lm, tokens, self.folder / cell.name, ModelConfig(layer), blocks=self.blocks, progress=progress
        )
        write_json(clock, {"seconds": before + time.process_time() - (since or [time.process_time()])[0]})
        return run

    def scores(self, cell: Cell) -> dict[str, Any]:
        """What a run came to.

        Args:
            cell: The run.

        Returns:
            Perplexity and divergence, with their standard errors over windows, and CPU seconds.
        """

        def compute() -> dict[str, Any]:
            run = self.run(cell)
            self.stop()
            found = window_scores(Predictions(streamed(run.lm, self.evaluation), room=0), self.exact())
            assert found.divergences is not None
            seconds = read_json(self.folder / f"{cell.name}.seconds.json")["seconds"]
            windows = found.divergences.tolist()
            return asdict(cell) | found.to_dict() | {"seconds": seconds, "kl by window": windows}

        self.stop()
        return self.kept(f"{cell.name}.scores", compute)

    def errors(self, cell: Cell) -> list[dict[str, Any]]:
        """Layer errors of a run on unseen tokens.

        Args:
            cell: The run.

        Returns:
            A row per layer.
        """

        def compute() -> dict[str, Any]:
            return {"rows": unseen_errors(self.run(cell), self.evaluation[:2])}

        self.stop()
        found: list[dict[str, Any]] = self.kept(f"{cell.name}.errors", compute)["rows"]
        return found


def table(bits: int, found: list[dict[str, Any]], full: float) -> list[dict[str, Any]]:
    """Rows of the docs' table: means over the seeds.

    Args:
        bits: Bits per weight.
        found: Scores of all cells.
        full: Perplexity of full precision.

    Returns:
        One row per method.
    """
    rows = []
    for method in dict.fromkeys(row["method"] for row in found if row["bits"] == bits):
        chosen = [row for row in found if (row["bits"], row["method"]) == (bits, method)]
        divergences = [row["kl"] for row in chosen]
        perplexity = fmean(row["perplexity"] for row in chosen)
        rows.append(
            {
                "method": method,
                "seeds": len(chosen),
                "kl": fmean(divergences),
                "kl sd": stdev(divergences) if len(chosen) > 1 else None,
                "kl error": fmean(row["kl_standard_error"] for row in chosen),
                "perplexity": perplexity,
                "over fp32": perplexity / full,
                "seconds": fmean(row["seconds"] for row in chosen),
            }
        )
    return rows


def ratio(found: list[dict[str, Any]], bits: int, key: str, ours: str, theirs: str) -> float | None:
    """Mean of a figure over the seeds that both methods have, over the other method's."""
    by_method: dict[str, dict[int, float]] = {ours: {}, theirs: {}}
    for row in found:
        if row["bits"] == bits and row["method"] in by_method:
            by_method[row["method"]][row["seed"]] = row[key]
    seeds = set(by_method[ours]) & set(by_method[theirs])
    if not seeds:
        return None
    return fmean(by_method[ours][s] for s in seeds) / fmean(by_method[theirs][s] for s in seeds)


def write(study: Study, out: Path, found: list[dict[str, Any]]) -> None:
    """Write down all that is finished."""
    full = study.kept("fp32", lambda: dict(window_scores(study.exact()).to_dict()))["perplexity"]
    tables = {f"bits{bits}": table(bits, found, full) for bits in (3, 2)}
    ours = [row["over fp32"] for row in tables["bits3"] if row["method"] == "quantease"]
    summary = {
        "measured_at": f"version {version('quantease')}",
        "model": "SmolLM2-135M-Instruct",
        "blocks": study.blocks or len(study.lm.blocks),
        "text": study.text.source,
        "text_sha256": study.text.digest,
        "evaluation_tokens": study.evaluation.numel(),
        "perplexity_fp32": full,
        "kl_vs_gptq_clip_3bit": ratio(found, 3, "kl", "quantease", "gptq-clip"),
        "kl_vs_gptq_clip_2bit": ratio(found, 2, "kl", "quantease", "gptq-clip"),
        "ppl_3bit_over_fp": ours[0] if ours else None,
        "default_cpu_vs_gptq": ratio(found, 3, "seconds", "quantease", "gptq"),
        **tables,
        "cells": found,
    }
    write_json(out / "whole_model.json", summary)


def main() -> None:
    """Run what is not finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two blocks, one seed, fewer tokens: other figures")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the calibration windows")
    parser.add_argument("--minutes", type=float, help="stop after so many; the same command continues")
    parser.add_argument("--folder", type=Path, help="working folder")
    parser.add_argument("-o", "--out", type=Path, default=RESULTS, help="folder for whole_model.json")
    options = parser.parse_args()
    folder = options.folder or Path("out") / f"quantease-whole-model{'-quick' if options.quick else ''}"
    study = Study(folder, options.quick, options.minutes)
    options.out.mkdir(parents=True, exist_ok=True)
    found: list[dict[str, Any]] = []
    for cell in cells(1 if options.quick else options.seeds):
        found.append(study.scores(cell))
        print(cell.name, {k: v for k, v in found[-1].items() if isinstance(v, float)}, file=sys.stderr, flush=True)
        write(study, options.out, found)
    if not options.quick:
        errors = {method: study.errors(Cell(3, method, 0)) for method in DRAWN}
        picture = options.out / "smollm2_layer_errors.png"
        draw_errors(errors, picture, "unseen tokens", "SmolLM2-135M, 3 bits per channel")


if __name__ == "__main__":
    main()
