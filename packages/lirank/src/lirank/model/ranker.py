"""The ranking model: a fused table below, the network above, and the correction for sampled negatives on top."""

import math

import numpy as np
import torch
from torch import Tensor, nn

from lirank.data.batch import Batch, Encoder, Ragged
from lirank.layers.dense import DenseInput
from lirank.layers.table import FusedTable
from lirank.model.config import ModelConfig
from lirank.model.network import RankNetwork, Vectors, calibration_context
from lirank.schema.features import SPECIAL, UNSEEN, Dense, History, Id, Multi
from lirank.schema.layout import Layout


class Ranker(nn.Module):
    """A model of a schema.

    Args:
        encoder: What the schema has learned: it fixes sizes and transforms.
        config: What the network is made of.
        table: The table, such as one that ranks share out (`lirank.distributed.tables.ShardedTable`); None makes one.
    """

    def __init__(self, encoder: Encoder, config: ModelConfig, table: FusedTable | None = None) -> None:
        super().__init__()
        self.layout, self.config = encoder.layout, config
        self.table = FusedTable(max(self.layout.rows, 1), config.dim) if table is None else table
        with torch.no_grad():
            for offset in self.layout.offsets.values():  # null, unseen, rare
                own = slice(max(offset - self.table.start, 0), max(offset + SPECIAL - self.table.start, 0))
                self.table.weight[own] = 0.0
        self.network = RankNetwork(self.layout, config, dense_input(encoder))
        fields = torch.tensor(self.layout.fields, dtype=torch.int64)
        self.register_buffer("fields", fields, persistent=False)
        self.correction = math.log(encoder.schema.sampling)

    def vectors(self, batch: Batch) -> Vectors:
        """Look everything up.

        Args:
            batch: What the encoder made.

        Returns:
            The vectors of ids, lists and histories, and the numbers.
        """
        ids = self.table(batch.ids)  # (B, columns, D)
        features = len(self.layout.schema.of(Id))
        if ids.shape[1] != features:  # the rows of one id are added
            ids = ids.new_zeros(len(ids), features, ids.shape[2]).index_add(1, self.get_buffer("fields"), ids)
        bags = [pooled(batch.lists[f.name], self.table(batch.lists[f.name].values), f) for f in self.layout.bags]
        sequences: list[tuple[Tensor, Tensor | None, Tensor]] = []
        for feature in self.layout.sequences:
            lists = batch.lists[feature.name]
            items, lengths = padded(lists, self.table(lists.values))
            actions = padded(lists, lists.actions[:, None])[0][:, :, 0] if len(lists.actions) else None
            if actions is None and isinstance(feature, History) and feature.action:
                actions = torch.zeros(items.shape[:2], dtype=torch.int64)
            sequences.append((items, actions, lengths))
        context = calibration_context(batch.ids, self.layout, self.config)
        return Vectors(ids, batch.dense, bags, sequences, context)

    def forward(self, batch: Batch, *, calibrate: bool = True) -> Tensor:
        """Logits of the log as it is: with positions where the batch has them, negatives as they were sampled.

        Args:
            batch: What the encoder made.
            calibrate: Whether the isotonic layers are applied.

        Returns:
            Logits, shape (B, T).
        """
        logits: Tensor = self.network(self.vectors(batch), batch.position, calibrate)
        return logits

    @torch.no_grad()
    def predict(self, batch: Batch, *, calibrate: bool = True) -> Tensor:
        """Probabilities in the world, not in the log: position 0, and corrected for sampled negatives.

        With a share w of the negatives kept, p becomes p / (p + (1 - p) / w): log w is added to the logit.

        Args:
            batch: What the encoder made.
            calibrate: Whether the isotonic layers are applied.

        Returns:
            Probabilities, shape (B, T), float32.
        """
        training = self.training
        self.eval()
        logits = self.network(self.vectors(batch), None, calibrate)
        self.train(training)
        return torch.sigmoid(logits + self.correction)


def dense_input(encoder: Encoder) -> DenseInput:
    """The transforms that an encoder's statistics give."""
    names, statistics = encoder.layout.dense, encoder.statistics
    plain = {feature.name: feature for feature in encoder.schema.of(Dense)}
    return DenseInput(
        [encoder.transform(name) for name in names],
        torch.tensor([statistics[name].mean for name in names], dtype=torch.float64),
        torch.tensor([statistics[name].deviation for name in names], dtype=torch.float64),
        torch.from_numpy(np.ascontiguousarray(encoder.knots())),
        [name in plain and plain[name].missing == "mean" for name in names],
    )


def cold_rows(ids: Tensor, layout: Layout, share: float, draws: Tensor | None = None) -> Tensor:
    """Ids of which a random share is replaced by their feature's unseen row, so that it is trained.

    Args:
        ids: Rows of the fused table, shape (B, columns).
        layout: Positions that follow from the schema.
        share: Share of the ids.
        draws: Uniform random numbers, shape (B, id features); None draws them.

    Returns:
        Ids, of the same shape; the columns of one feature go together.
    """
    features = layout.schema.of(Id)
    rows = [layout.offsets[features[number].name] + UNSEEN for number in layout.fields]
    unseen = torch.tensor(rows, dtype=torch.int64)  # int64 also where there is no id feature
    draws = torch.rand(len(ids), len(features)) if draws is None else draws
    chosen = (draws < share)[:, torch.tensor(layout.fields, dtype=torch.int64)]
    return torch.where(chosen, unseen, ids)


def padded(lists: Ragged, values: Tensor) -> tuple[Tensor, Tensor]:
    """Lists side by side, as long as the longest of the batch.

    Args:
        lists: The lists.
        values: One row per entry, shape (n, d).

    Returns:
        Padded values, shape (B, L, d), zero behind the end, and lengths, shape (B,).
    """
    lengths = lists.offsets.diff()
    longest = max(int(lengths.max()), 1) if len(lengths) else 1
    row = torch.arange(len(lengths)).repeat_interleave(lengths)
    place = torch.arange(len(values)) - lists.offsets[:-1].repeat_interleave(lengths)
    flat = values.new_zeros(len(lengths) * longest, values.shape[1]).index_copy(0, row * longest + place, values)
    return flat.view(len(lengths), longest, -1), lengths


def pooled(lists: Ragged, vectors: Tensor, feature: Multi) -> Tensor:
    """Sum or mean of every list, zero for an empty one, shape (B, D)."""
    lengths = lists.offsets.diff()
    row = torch.arange(len(lengths)).repeat_interleave(lengths)
    total = vectors.new_zeros(len(lengths), vectors.shape[1]).index_add(0, row, vectors)
    return total / lengths.clamp_min(1)[:, None] if feature.pooling == "mean" else total
