"""All options of a run in one file, checked against a schema: an unknown or misspelled key is an error."""

from pathlib import Path
from typing import Any, Literal

import msgspec
from core_tensor.app.files import reading

from meta_embed.adapt.maml import InnerOptions
from meta_embed.tasks.episodes import EpisodeOptions
from meta_embed.tasks.schema import Schema


class ModelOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The model.

    Attributes:
        method: `map` solves for a member's vector, `maml` takes gradient steps.
        width: Length of a member's vector, including a bias, 2 to 32.
        hidden: Width of the global block's perceptron; 0 for none.
        member_hidden: Width of the meta block's hidden layer; 0 for a linear map.
        precision: Starting value of the prior's precision, which is also the ID warm start's shrinkage.
    """

    method: Literal["map", "maml"] = "map"
    width: int = 17
    hidden: int = 32
    member_hidden: int = 32
    precision: float = 3.0


class TrainOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The outer loop.

    Attributes:
        warm_epochs: Passes over the events with a table of member vectors before meta-training; 0 starts cold.
        warm_lr: Their rate.
        epochs: Passes over the members at most.
        lr: Outer rate.
        decay: Weight decay of the outer loop.
        patience: Epochs without a better loss of the held-back members before it stops.
        held_back: Share of the members whose tasks decide when to stop.
        tested: Share of the members that training never sees, for `evaluate`.
        repeats: Tasks of every member in an epoch.
    """

    warm_epochs: int = 5
    warm_lr: float = 0.005
    epochs: int = 40
    lr: float = 0.001
    decay: float = 0.0
    patience: int = 5
    held_back: float = 0.15
    tested: float = 0.15
    repeats: int = 1

    def __post_init__(self) -> None:
        """Refuse settings that leave nobody to train on."""
        if not (0 < self.held_back < 1 and 0 <= self.tested < 1 and self.held_back + self.tested < 1):
            raise ValueError("train: expected shares held_back > 0 and tested >= 0 that sum to less than one")
        if self.epochs < 0 or self.warm_epochs < 0 or self.patience < 1 or self.repeats < 1:
            raise ValueError("train: expected epochs, warm_epochs >= 0 and patience, repeats >= 1")
        if not (self.lr > 0 and self.warm_lr > 0 and self.decay >= 0):
            raise ValueError("train: expected positive rates and decay >= 0")


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A run.

    Attributes:
        columns: What the columns of the events mean.
        model: The model.
        inner: The inner loop of `method: maml`.
        episodes: How histories are cut into tasks.
        train: The outer loop.
    """

    columns: Schema
    model: ModelOptions = ModelOptions()
    inner: InnerOptions = InnerOptions()
    episodes: EpisodeOptions = EpisodeOptions()
    train: TrainOptions = TrainOptions()


def read_config(path: str | Path) -> Config:
    """Read a run's options from YAML (or JSON, which is YAML).

    Args:
        path: The file.

    Returns:
        The options.

    Raises:
        ValueError: If the file is broken, or a key is unknown, missing or of another type.
    """
    import yaml

    with reading(path, "the options of meta-embed"):
        return parse_config(yaml.safe_load(Path(path).read_text(encoding="utf-8")))


def parse_config(value: Any) -> Config:
    """Options from plain values.

    Args:
        value: Nested mappings, lists and numbers.

    Returns:
        The options.
    """
    return msgspec.convert(value, Config)
