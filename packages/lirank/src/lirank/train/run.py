"""A trained model in its folder: what `lirank train` leaves and every later command reads."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from core_tensor.app.files import reading

from lirank.data.batch import Encoder
from lirank.data.parquet import ParquetLog
from lirank.features.causal import CausalFeatures
from lirank.features.prepare import load_causal, load_encoder, save_causal, save_encoder
from lirank.model.config import ModelConfig
from lirank.model.ranker import Ranker
from lirank.train import checkpoint

MODEL, ENCODER, CAUSAL, DATA = "model.safetensors", "encoder.safetensors", "causal.safetensors", "data"


@dataclass
class TrainedModel:
    """A model with all that it needs to score raw rows.

    Attributes:
        model: The network and its table.
        encoder: Schema, vocabularies, statistics.
        causal: What the causal features remember at the end of the log.
        record: What is known of the training.
    """

    model: Ranker
    encoder: Encoder
    causal: CausalFeatures
    record: dict[str, Any]

    def save(self, folder: Path) -> None:
        """Write all parts.

        Args:
            folder: The run's folder.
        """
        save_encoder(self.encoder, folder / ENCODER)
        save_causal(self.causal, folder / CAUSAL)
        record = {"config": msgspec.to_builtins(self.model.config), "training": self.record}
        checkpoint.save(folder / MODEL, self.model.state_dict(), record)

    @classmethod
    def load(cls, folder: str | Path) -> "TrainedModel":
        """Read a run.

        Args:
            folder: Folder that `lirank train` has finished.

        Returns:
            The model, in evaluation mode.

        Raises:
            ValueError: If a part is missing or broken, or the parts do not belong together.
        """
        folder = Path(folder)
        if not (folder / MODEL).exists():
            raise ValueError(f"{folder}: expected the folder of a finished `lirank train`, found no {MODEL}")
        tensors, record = checkpoint.load(folder / MODEL, "the model of a lirank run")
        encoder, causal = load_encoder(folder / ENCODER), load_causal(folder / CAUSAL)
        if causal.schema != encoder.schema:
            raise ValueError(f"{folder}: {CAUSAL} belongs to another schema than {ENCODER}")
        with reading(folder / MODEL, "the model of a lirank run"):
            config = msgspec.convert(record["config"], ModelConfig)
        model = Ranker(encoder, config)
        checkpoint.check_names(folder / MODEL, tensors, model.state_dict())
        model.load_state_dict(tensors)
        return cls(model.eval(), encoder, causal, record["training"])


def part_rows(folder: Path, part: str) -> ParquetLog | None:
    """The `train`, `valid` or `test` rows that a run has prepared; None if it has none."""
    found = Path(folder) / DATA / part
    return ParquetLog.open(found) if found.exists() else None
