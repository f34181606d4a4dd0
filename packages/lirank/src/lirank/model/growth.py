"""A model that goes on from an earlier one under a schema that has grown, with every old score left as it is.

The network keeps its settings; what widens is its input. Weights from new inputs start at 0, so that nothing they
carry reaches a score before it is trained, and all other weights are copied. A score of new ids alone is equal bit for
bit; new columns make the sums of the matrix products longer by zeros, which a runtime may add in another order.
"""

import re
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from lirank.data.batch import Encoder
from lirank.model.ranker import Ranker
from lirank.schema.evolve import row_sources
from lirank.schema.features import SPECIAL, UNSEEN, Id

_INTO_INPUT = re.compile(
    r"cross\.maps\.\d+\.(0\.)?weight|residual\.down\.\d+\.weight|mlp\.linear\.0\.weight|mlp\.gates\.\d+\.first\.weight"
)
"""Weights whose columns are the network's inputs (of the full cross network, its rows too)."""
_OUT_OF_INPUT = re.compile(r"cross\.maps\.\d+\.(1\.)?(weight|bias)|residual\.up\.\d+\.(weight|bias)")
"""Weights whose rows are the network's inputs."""
_INTO_TASKS = re.compile(r"tasks\.(own\.\d+|common)\.\d+\.linear\.0\.weight|tasks\.gates\.\d+\.weight")
"""Weights whose columns are what the towers see."""


def grown(old: Ranker, before: Encoder, encoder: Encoder) -> Ranker:
    """The old model for an encoder that has grown out of its own.

    Args:
        old: The model.
        before: The model's encoder.
        encoder: The grown encoder (`lirank.data.growth.grown_encoder`), after it has seen the new training data.

    Returns:
        A new model; scores are the old ones, also of ids that have rows of their own only now.

    Raises:
        ValueError: If the wider network would have cross matrices of another rank.
    """
    model = Ranker(encoder, old.config)
    carried = carry_over(dict(old.state_dict()), dict(model.state_dict()), old, model, before, encoder)
    model.load_state_dict(carried)
    return model


def carry_over(
    old: Mapping[str, Tensor],
    new: Mapping[str, Tensor],
    narrow: Ranker,
    wide: Ranker,
    before: Encoder,
    encoder: Encoder,
    *,
    owned: bool = False,
) -> dict[str, Tensor]:
    """Put tensors shaped like an old model's parameters where they belong in a grown one.

    Args:
        old: Old tensors by the names of the state.
        new: Tensors of the grown shapes, whose values stay where nothing is carried over.
        narrow: The old model.
        wide: The grown one.
        before: Encoder of the old model.
        encoder: Encoder of the grown one.
        owned: Whether a row of the table is carried over only where it keeps its owner (what is known of a row, such
            as its curvature), not where a new id begins with a copy.

    Returns:
        Tensors of the grown shapes by name.
    """
    inputs = torch.from_numpy(_places(narrow.network.input_names(), wide.network.input_names()))
    tower = _tower_places(narrow, wide, inputs)
    found: dict[str, Tensor] = {}
    for name, tensor in new.items():
        network = name.removeprefix("network.")
        if name == "table.weight":
            found[name] = _table(old[name], tensor, before, encoder, owned)
        elif network.startswith("dense."):
            found[name] = tensor  # the transforms of the grown encoder's statistics
        elif network == "embed":
            found[name] = _placed(old[name], tensor, _dense_places(narrow, wide), None)
        elif network.startswith("histories."):
            number = int(network.split(".")[1])
            earlier = _history(narrow, wide, number)
            found[name] = tensor if earlier is None else old[name.replace(f".{number}.", f".{earlier}.", 1)]
        elif "context_" in network:
            found[name] = _contexts(old[name], tensor, before, encoder, wide)
        else:
            into = inputs if _INTO_INPUT.fullmatch(network) else tower if _INTO_TASKS.fullmatch(network) else None
            into = tower if _is_head(network, wide) else into
            out = inputs if _OUT_OF_INPUT.fullmatch(network) else None
            found[name] = _placed(old[name], tensor, out, into)
    return found


def _places(old: list[str], new: list[str]) -> np.ndarray:
    """Where each of the old names is among the new ones, shape (old,)."""
    where = {name: i for i, name in enumerate(new)}
    return np.array([where[name] for name in old], np.int64)


def _tower_places(narrow: Ranker, wide: Ranker, inputs: Tensor) -> Tensor:
    """Where the old inputs of the towers are among the new: cross networks as wide as the input, then the MLP."""
    crosses = sum(layer is not None for layer in (narrow.network.cross, narrow.network.residual))
    width = len(wide.network.input_names())
    mlp = crosses * width + torch.arange(narrow.network.mlp.width)
    return torch.cat([*(inputs + i * width for i in range(crosses)), mlp])


def _dense_places(narrow: Ranker, wide: Ranker) -> Tensor:
    return torch.from_numpy(_places(narrow.network.number_names(), wide.network.number_names()))


def _history(narrow: Ranker, wide: Ranker, number: int) -> int | None:
    """Number in the old model of a history of the new one."""
    name = wide.layout.sequences[number].name
    return next((i for i, feature in enumerate(narrow.layout.sequences) if feature.name == name), None)


def _is_head(name: str, model: Ranker) -> bool:
    """Whether a weight is that of a head directly on what the towers see."""
    return bool(re.fullmatch(r"tasks\.heads\.\d+\.weight", name)) and not model.config.task_widths


def _placed(old: Tensor, new: Tensor, out: Tensor | None, into: Tensor | None) -> Tensor:
    """The old values at their places; 0 in the columns of new inputs, and as they are in the rows of new outputs."""
    found = new.clone()
    rows = torch.arange(old.shape[0]) if out is None and old.ndim else out
    if into is None:
        if out is None:
            _same(old, new)
            return old.clone()
        _same(old[:1], new[:1])
        found[rows] = old
        return found
    if out is None:
        _same(old[:, :1], new[:, :1])
    found.zero_()
    if out is not None:  # rows of new outputs keep their first values where they meet old inputs
        fresh = torch.ones(len(new), dtype=torch.bool)
        fresh[rows] = False
        found[fresh.nonzero()[:, 0][:, None], into] = new[fresh.nonzero()[:, 0][:, None], into]
    assert rows is not None
    found[rows[:, None], into] = old
    return found


def _same(old: Tensor, new: Tensor) -> None:
    if old.shape != new.shape:
        raise ValueError(
            "cross_rank: the earlier run's input was narrower than the rank, so the grown network would have matrices "
            "of another rank; train anew"
        )


def _table(old: Tensor, new: Tensor, before: Encoder, encoder: Encoder, owned: bool) -> Tensor:
    found = new.clone()
    for name, vocabulary in before.vocabularies.items():
        start, first = encoder.layout.offsets[name], before.layout.offsets[name]
        source = torch.from_numpy(row_sources(vocabulary, encoder.vocabularies[name]))
        if owned:
            copied = (torch.arange(len(source)) >= SPECIAL) & (source < SPECIAL)
            source = source.masked_fill(copied, -1)
        there = (source >= 0).nonzero()[:, 0]
        found[start + there] = old[first + source[there]]
    return found


def _contexts(old: Tensor, new: Tensor, before: Encoder, encoder: Encoder, model: Ranker) -> Tensor:
    """Curves of calibration contexts; those of new ids start as the curve of unseen ones."""
    name = model.config.calibration_context
    source = torch.from_numpy(row_sources(before.vocabularies[name], encoder.vocabularies[name]))
    assert isinstance(encoder.schema.feature(name), Id)
    found: Tensor = old[source.masked_fill(source < 0, UNSEEN)]
    return found if found.shape == new.shape else new.clone()
