"""A trained model in its folder: what `lirank train` leaves and every later command reads."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
from core_tensor.app.files import atomic_path, reading

from lirank.data.batch import Encoder
from lirank.data.parquet import ParquetLog
from lirank.features.causal import CausalFeatures
from lirank.features.prepare import load_causal, load_encoder, save_causal, save_encoder
from lirank.model.config import ModelConfig
from lirank.model.ranker import Ranker
from lirank.train import checkpoint

MODEL, ENCODER, CAUSAL = "model.safetensors", "encoder.safetensors", "causal.safetensors"
SAMPLE, DATA, CURVATURE = "sample.parquet", "data", "curvature.safetensors"
SAMPLE_ROWS = 1024


@dataclass
class TrainedModel:
    """A model with all that it needs to score raw rows.

    Attributes:
        model: The network and its table.
        encoder: Schema, vocabularies, statistics.
        causal: What the causal features remember at the end of the log.
        record: What is known of the training.
        sample: Some rows with causal columns, for tracing and comparing exports; None if there are none.
    """

    model: Ranker
    encoder: Encoder
    causal: CausalFeatures
    record: dict[str, Any]
    sample: pa.Table | None = None

    def save(self, folder: Path) -> None:
        """Write all parts.

        Args:
            folder: The run's folder.
        """
        save_encoder(self.encoder, folder / ENCODER)
        save_causal(self.causal, folder / CAUSAL)
        if self.sample is not None:
            with atomic_path(folder / SAMPLE) as temporary:
                pq.write_table(self.sample, temporary)
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
        sample = next(ParquetLog.open(folder / SAMPLE).read()) if (folder / SAMPLE).exists() else None
        return cls(model.eval(), encoder, causal, record["training"], sample)


def part_rows(folder: Path, part: str) -> ParquetLog | None:
    """The `train`, `valid` or `test` rows that a run has prepared; None if it has none."""
    found = Path(folder) / DATA / part
    return ParquetLog.open(found) if found.exists() else None
