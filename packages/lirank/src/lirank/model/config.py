"""What a ranking model is made of: one frozen structure, read from YAML with checked keys."""

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from core_tensor.app.files import reading
from msgspec import Meta, Struct

Count = Annotated[int, Meta(ge=1)]
Share = Annotated[float, Meta(ge=0, lt=1)]


class ModelConfig(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """The network.

    Attributes:
        dim: Width of id vectors.
        cross: Cross network: full or low-rank DCNv2, Residual DCN beside low-rank DCNv2, or none.
        cross_layers: Its layers.
        cross_rank: Rank of its matrices, unless full.
        widths: Hidden widths of the MLP beside it.
        gate: Gate of the MLP's hidden layers.
        dropout: In the MLP and the history transformer.
        history_width: Width of the tokens of histories.
        history_layers: Layers of the history transformer.
        history_heads: Its heads.
        history_fusion: Where the candidate meets the history.
        tasks: How several labels share.
        task_widths: Hidden widths of their towers.
        experts: Experts of `mmoe` and `ple`.
        gate_dropout: Dropout of their gates.
        calibration: `joint` trains the isotonic layer with the network; `after` leaves it the identity until
            `lirank calibrate`.
        calibration_buckets: Buckets of the isotonic layer.
        calibration_context: Id feature whose every row (device, channel) has its own curve; empty for one curve.
        positions: Number of distinct positions, where the schema has one.
        embed_dense: Whether every number gets a vector of width `dim`, times its value, instead of one input.
    """

    dim: Count = 16
    cross: Literal["none", "full", "low_rank", "residual"] = "low_rank"
    cross_layers: Count = 2
    cross_rank: Count = 32
    widths: tuple[Count, ...] = (128, 64)
    gate: Literal["none", "dense", "vector", "lhuc"] = "none"
    dropout: Share = 0.0
    history_width: Count = 32
    history_layers: Count = 1
    history_heads: Count = 2
    history_fusion: Literal["early", "late"] = "early"
    tasks: Literal["shared", "grouped", "mmoe", "ple"] = "shared"
    task_widths: tuple[Count, ...] = ()
    experts: Count = 4
    gate_dropout: Share = 0.0
    calibration: Literal["after", "joint"] = "after"
    calibration_buckets: Count = 100
    calibration_context: str = ""
    positions: Count = 50
    embed_dense: bool = False

    def to_dict(self) -> dict[str, Any]:
        """All settings.

        Returns:
            Plain values by name.
        """
        return {name: list(v) if isinstance(v := getattr(self, name), tuple) else v for name in self.__struct_fields__}


def load_config(path: str | Path) -> ModelConfig:
    """Read a model's configuration.

    Args:
        path: YAML file; unknown keys are refused.

    Returns:
        The configuration.

    Raises:
        ValueError: If the file is no configuration.
    """
    with reading(path, "a lirank model configuration"):
        return msgspec.yaml.decode(Path(path).read_bytes(), type=ModelConfig)
