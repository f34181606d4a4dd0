"""`quantease demo`: SmolLM2-135M at 3 bits per channel, by rounding, GPTQ and QuantEase."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from core_tensor.app.cli import table
from core_tensor.app.figures import check
from core_tensor.app.files import write_json, write_text
from torch import Tensor

from quantease.evaluation.compare import Compared, Stage, best, compare_methods, default_methods, silent
from quantease.evaluation.smollm2 import open_smollm2
from quantease.evaluation.text import TextSplit, python_topics, read_text, split, windows
from quantease.export.save import ExportReport, export_model
from quantease.model.plan import ModelConfig
from quantease.model.quantize_model import open_quantized
from quantease.problem.config import LayerConfig


@dataclass(frozen=True)
class DemoConfig:
    """Size of the demonstration.

    Attributes:
        bits: Bits per weight, one scale per output channel.
        length: Tokens per calibration window.
        calibration: Windows that calibrate.
        texts: Disjoint texts on which the methods are measured, none of which calibration saw.
        evaluation: Windows of each of them.
        evaluation_length: Tokens per such window.
        blocks: Decoder blocks that are quantized, from the first on; None is all 30.
    """

    bits: int = 3
    length: int = 512
    calibration: int = 16
    texts: int = 5
    evaluation: int = 8
    evaluation_length: int = 512
    blocks: int | None = None

    @classmethod
    def quick(cls) -> "DemoConfig":
        """What two cores do in one to two minutes.

        Returns:
            Fewer tokens and two blocks.
        """
        return cls(calibration=4, evaluation=1, evaluation_length=192, blocks=2)


@dataclass(frozen=True)
class DemoResult:
    """What the demonstration found.

    Attributes:
        config: Its size.
        text: The text it used.
        compared: Table and layer errors.
        picture: PNG of the layer errors.
        checkpoint: The `quantease` model, for `AutoModelForCausalLM.from_pretrained`.
        export: How that was saved.
    """

    config: DemoConfig
    text: TextSplit
    compared: Compared
    picture: Path
    checkpoint: Path
    export: ExportReport

    def to_dict(self) -> dict[str, Any]:
        """Headline figures for JSON.

        Returns:
            Perplexities, bits per weight, layer errors and seconds by method, and where the files are.
        """

        def column(name: str) -> dict[str, Any]:
            return {row["method"]: row[name] for row in self.compared.rows if row[name] is not None}

        return {
            "model": "SmolLM2-135M-Instruct",
            **asdict(self.config),
            "text": self.text.source,
            "text_sha256": self.text.digest,
            "kl": column("kl"),
            "kl_standard_error": column("kl error"),
            "best_by_kl": best(self.compared.rows),
            "kl_by_text": self.kl_by_text(),
            "perplexity": column("perplexity"),
            "bits_per_weight": column("bits/weight"),
            "layer_error_unseen": column("layer error (unseen)"),
            "layer_error_calibration": column("layer error (calibration)"),
            "seconds": column("seconds"),
            "picture": str(self.picture),
            "checkpoint": str(self.checkpoint),
            "checkpoint_logit_difference": self.export.logit_difference,
        }

    def kl_by_text(self) -> dict[str, list[float]]:
        """Mean KL divergence from full precision on each of the texts.

        Returns:
            One figure per text, by method.
        """
        size = self.config.evaluation
        return {
            name: [fmean(values[i : i + size]) for i in range(0, len(values), size)]
            for name, values in self.compared.divergences.items()
        }

    def render(self) -> str:
        """The result for people.

        Returns:
            A table and the places of the files.
        """
        config, text = self.config, self.text
        scope = "all blocks" if config.blocks is None else f"the first {config.blocks} blocks"
        tokens = config.calibration * config.length
        others = config.texts * config.evaluation * config.evaluation_length
        by_text = self.kl_by_text()
        winners = [min(by_text, key=lambda name: by_text[name][i]) for i in range(config.texts)]
        lines = (
            f"SmolLM2-135M-Instruct, {config.bits} bits per weight, one scale per channel, {scope} quantized;",
            f"{tokens} tokens of {text.source} ({text.digest}) calibrate,",
            f"{others} tokens of {config.texts} other parts of it evaluate",
            "",
            table(self.compared.rows),
            "kl: mean divergence of the predictions from full precision's, in nats; least on the texts one by one: "
            + ", ".join(f"{name} ({winners.count(name)} of {len(winners)})" for name in dict.fromkeys(winners)),
            "",
            f"layer errors: {self.picture}",
            f"checkpoint:   {self.checkpoint} (for AutoModelForCausalLM.from_pretrained)",
            f"reloaded, its logits differ by {self.export.logit_difference:.1e} of the greatest",
        )
        return "\n".join(lines)


def evaluation_windows(tokenizer: Any, text: str, config: DemoConfig) -> Tensor:
    """Windows from the beginnings of as many equal parts of a text as there are texts to evaluate on.

    Args:
        tokenizer: A transformers tokenizer.
        text: The text, none of which calibrates.
        config: Numbers and length of the windows.

    Returns:
        Token ids, shape (texts * evaluation, evaluation_length), int64, text after text.

    Raises:
        ValueError: If the text is too short.
    """
    edges = [len(text) * i // config.texts for i in range(config.texts + 1)]
    parts = [text[a:b] for a, b in pairwise(edges)]
    return torch.cat([windows(tokenizer, part, config.evaluation_length, config.evaluation) for part in parts])


def run_demo(
    config: DemoConfig,
    folder: Path,
    text: Sequence[str] = (),
    *,
    overwrite: bool = False,
    stage: Stage | None = None,
) -> DemoResult:
    """Quantize SmolLM2 by five methods, evaluate them, draw the layer errors and save the `quantease` model.

    Args:
        config: Size.
        folder: Working folder; a demonstration that was killed continues there.
        text: Files to calibrate (first half) and evaluate on; the Python reference if there are none.
        overwrite: Delete other runs that the folder holds.
        stage: Called along the way.

    Returns:
        The result.
    """
    check(folder / "layer_errors.png", "quantease[plot]")
    source = split(read_text(text), ", ".join(text)) if text else python_topics()
    report = stage or silent
    report("loading SmolLM2", 0, 1)
    lm = open_smollm2()
    report("loading SmolLM2", 1, 1)
    calibration = windows(lm.tokenizer, source.calibration, config.length, config.calibration)
    evaluation = evaluation_windows(lm.tokenizer, source.evaluation, config)
    methods = default_methods(LayerConfig(bits=config.bits))
    compared = compare_methods(
        lm,
        calibration,
        evaluation,
        folder,
        methods,
        ModelConfig(),
        blocks=config.blocks,
        overwrite=overwrite,
        stage=report,
    )
    picture = folder / "layer_errors.png"
    compared.draw(picture, f"SmolLM2-135M, {config.bits} bits per channel")
    report("checkpoint: save, load, compare", 0, 1)
    export = export_model(open_quantized(lm, folder / "quantease"), folder / "checkpoint")
    report("checkpoint: save, load, compare", 1, 1)
    result = DemoResult(config, source, compared, picture, folder / "checkpoint", export)
    write_json(folder / "demo.json", result.to_dict())
    write_text(folder / "demo.md", result.render() + "\n")
    return result
