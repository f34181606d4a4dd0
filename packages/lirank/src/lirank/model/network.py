"""The dense part of a ranking model: from vectors and numbers to one calibrated logit per label."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lirank.layers.cross import CrossNetwork
from lirank.layers.dense import DenseInput
from lirank.layers.experts import MultiTask
from lirank.layers.history import HistoryTransformer
from lirank.layers.isotonic import IsotonicLayer
from lirank.layers.mlp import MLP
from lirank.layers.position_bias import PositionBias
from lirank.layers.residual_cross import ResidualCross
from lirank.model.config import ModelConfig
from lirank.schema.features import History, Id
from lirank.schema.layout import Layout


@dataclass(frozen=True)
class Vectors:
    """What lookups gave for a batch.

    Attributes:
        ids: One vector per id feature, shape (B, F, D).
        dense: Numbers as they came, shape (B, N).
        bags: Pooled multi-valued features, shape (B, D) each.
        sequences: For each history its items (B, L, D), actions (B, L) or None, and lengths (B,).
        context: Calibration context of every row, shape (B,), int64; None where there is one curve.
    """

    ids: Tensor
    dense: Tensor
    bags: Sequence[Tensor]
    sequences: Sequence[tuple[Tensor, Tensor | None, Tensor]]
    context: Tensor | None = None


class RankNetwork(nn.Module):
    """Cross network and MLP side by side on the concatenated inputs, then the tasks' towers and their calibration.

    Args:
        layout: Positions that follow from the schema.
        config: What the network is made of.
        dense: Transforms of the numbers.
    """

    def __init__(self, layout: Layout, config: ModelConfig, dense: DenseInput) -> None:
        super().__init__()
        schema, dim = layout.schema, config.dim
        self.dense, self.layout, self.config = dense, layout, config
        self.embed = nn.Parameter(torch.randn(dense.width, dim) * 0.01) if config.embed_dense else None
        ids = [feature.name for feature in schema.of(Id)]
        self.candidates = [ids.index(feature.item) for feature in layout.sequences]
        histories = [_history(feature, config) for feature in layout.sequences]
        self.histories = nn.ModuleList(histories)
        numbers = dense.width * (dim if config.embed_dense else 1)
        width = len(ids) * dim + numbers + len(layout.bags) * dim + sum(h.width for h in histories)
        rank = None if config.cross == "full" else min(config.cross_rank, width)
        plain = config.cross != "none"
        self.cross = CrossNetwork(width, config.cross_layers, rank) if plain else None
        self.residual = (
            ResidualCross(width, config.cross_layers, min(config.cross_rank, width))
            if config.cross == "residual"
            else None
        )
        self.mlp = MLP(width, config.widths, gate=config.gate, dropout=config.dropout)
        joined = (width if self.cross else 0) + (width if self.residual else 0) + self.mlp.width
        self.tasks = MultiTask(
            joined,
            [label.group for label in schema.labels],
            config.tasks,
            widths=config.task_widths,
            experts=config.experts,
            gate_dropout=config.gate_dropout,
            dropout=config.dropout,
        )
        self.position = PositionBias(config.positions, len(schema.labels)) if schema.position else None
        contexts = _contexts(layout, config)
        buckets = config.calibration_buckets
        self.calibration = nn.ModuleList(IsotonicLayer(buckets, contexts=contexts) for _ in schema.labels)
        if config.calibration == "after":
            self.calibration.requires_grad_(False)

    def number_names(self) -> list[str]:
        """Names of the numbers that enter, with those of the indicators of missing ones.

        Returns:
            One name per number.
        """
        names = self.layout.dense
        return [*names, *(f"{names[j]} is missing" for j in self.dense.may_miss)]

    def input_names(self) -> list[str]:
        """Names of all inputs of the cross network, by which a grown network finds those of an earlier one.

        Returns:
            One name per input, in their order.
        """
        dim, schema = self.config.dim, self.layout.schema
        found = [f"{feature.name}.{i}" for feature in schema.of(Id) for i in range(dim)]
        if self.embed is not None:
            found += [f"{name}.{i}" for name in self.number_names() for i in range(dim)]
        else:
            found += self.number_names()
        found += [f"{feature.name}.{i}" for feature in self.layout.bags for i in range(dim)]
        width = 2 * self.config.history_width
        for feature in self.layout.sequences:
            found += [f"{feature.name}.{i}" for i in range(width)]
        return found

    def features(self, x: Vectors) -> Tensor:
        """What the tasks' towers see, shape (B, joined)."""
        numbers = self.dense(x.dense)
        if self.embed is not None:
            numbers = (numbers[:, :, None] * self.embed).flatten(1)
        histories = [
            layer(items, actions, lengths, x.ids[:, candidate])
            for layer, candidate, (items, actions, lengths) in zip(
                self.histories, self.candidates, x.sequences, strict=True
            )
        ]
        x0 = torch.cat([x.ids.flatten(1), numbers, *x.bags, *histories], 1)  # (B, n)
        parts = [layer(x0) for layer in (self.cross, self.residual) if layer is not None]
        return torch.cat([*parts, self.mlp(x0)], 1)

    def hidden(self, x: Vectors) -> list[Tensor]:
        """The last hidden layer of every task: what its head is multiplied with.

        Args:
            x: Inputs.

        Returns:
            One tensor per task, shape (B, d) each.
        """
        towers = self.tasks.towers(self.features(x))
        return [towers[group] for group in self.tasks.group]

    def forward(self, x: Vectors, position: Tensor | None = None, calibrate: bool = True) -> Tensor:
        """Logits, shape (B, T).

        Args:
            x: Inputs.
            position: Positions shown, in training; without them every row counts as shown first.
            calibrate: Whether the isotonic layers are applied.

        Returns:
            Logits.
        """
        logits: Tensor = self.tasks(self.features(x))
        if calibrate:
            columns = zip(self.calibration, logits.unbind(1), strict=True)
            logits = torch.stack([layer(z, x.context) for layer, z in columns], 1)
        if position is not None and self.position is not None:
            logits = logits + self.position(position)
        return logits


_MOST_CONTEXTS = 4096


def _contexts(layout: Layout, config: ModelConfig) -> int:
    """Contexts of the calibration: the rows of an id feature."""
    name = config.calibration_context
    if not name:
        return 0
    ids = {feature.name: feature for feature in layout.schema.of(Id)}
    if name not in ids or ids[name].columns != 1 or ids[name].rows > _MOST_CONTEXTS:
        fit = [n for n, feature in ids.items() if feature.columns == 1 and feature.rows <= _MOST_CONTEXTS]
        raise ValueError(
            f"calibration_context: expected an id feature of one row per id and at most {_MOST_CONTEXTS} rows "
            f"({', '.join(fit) or 'there is none'}), got {name!r}"
        )
    return int(ids[name].rows)


def calibration_context(ids: Tensor, layout: Layout, config: ModelConfig) -> Tensor | None:
    """Calibration context of every row.

    Args:
        ids: Rows of the fused table, shape (B, columns).
        layout: Positions that follow from the schema.
        config: What the network is made of.

    Returns:
        Contexts, shape (B,), int64; None where there is one curve.
    """
    if not config.calibration_context:
        return None
    number = [feature.name for feature in layout.schema.of(Id)].index(config.calibration_context)
    return ids[:, layout.fields.index(number)] - layout.offsets[config.calibration_context]


def _history(feature: Any, config: ModelConfig) -> HistoryTransformer:
    return HistoryTransformer(
        config.dim,
        feature.length,
        width=config.history_width,
        layers=config.history_layers,
        heads=config.history_heads,
        fusion=config.history_fusion,
        action_dim=4 if isinstance(feature, History) and feature.action else 0,
        dropout=config.dropout,
    )
