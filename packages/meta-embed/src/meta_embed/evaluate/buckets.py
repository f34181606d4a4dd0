"""Scores of the same queries at several support sizes, and their metrics by activity."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from meta_embed.evaluate.metrics import Scores, paired_bootstrap
from meta_embed.model.personalizer import Personalizer, no_grad_vectors
from meta_embed.tasks.events import Events
from meta_embed.tasks.ragged import task_batch
from meta_embed.tasks.split import Split, known_before, split_at

SIZES = (0, 4, 8, 16, 32)
"""Support sizes at which a member is asked: the same query each time."""

BUCKETS = ((0, 0), (1, 4), (5, 16), (17, 64), (65, 1 << 62))
"""Activity: events before the query, from and to."""


def model_scores(model: Personalizer, events: Events, split: Split, *, adapted: bool = True) -> Scores:
    """Scores of a model whose vectors are adapted to the supports.

    Args:
        model: The model.
        events: The log.
        split: The tasks.
        adapted: False scores with the vectors of members without events.

    Returns:
        The scores.
    """
    support = split.support if adapted else np.zeros_like(split.support)
    batch = task_batch(events, split.members, (split.support_start, support), (split.query_start, split.query))
    e, _ = no_grad_vectors(model, batch)
    owner = batch.query.owner
    with torch.no_grad():
        logits = model.logits(batch.query.ids, batch.query.dense, e[owner]).double().numpy()
    return Scores(logits, batch.query.y.numpy(), split.members[owner.numpy()])


def figures(scored: Mapping[str, Scores], ours: str = "") -> dict[str, Any]:
    """Metrics of several predictors on the same rows.

    Args:
        scored: Scores by name.
        ours: One of them, whose gain of AUC over each other comes with the 95 % interval of a bootstrap over members.

    Returns:
        `NAME_auc`, `NAME_logloss`, `NAME_member_auc` of each; `ours_over_NAME`, and the same with `_low` and `_high`.
    """
    row: dict[str, Any] = {}
    for name, scores in scored.items():
        row |= {f"{name}_{figure}": value for figure, value in scores.figures().items()}
        if ours not in ("", name):
            gain = paired_bootstrap([scored[ours]], [scores], draws=400)
            row |= {f"{ours}_over_{name}": gain.value, f"{ours}_over_{name}_low": gain.low}
            row[f"{ours}_over_{name}_high"] = gain.high
    return row


def by_size(
    events: Events, sizes: Sequence[int], query: int, start: int, predictors: Mapping[str, Callable[[Split], Scores]],
    ours: str = "",
) -> list[dict[str, Any]]:  # fmt: skip
    """Metrics of several predictors, one row per support size; the query is the same at each.

    Args:
        events: The log of the members who are asked.
        sizes: Supports, in events.
        query: Events of the query at most.
        start: Position of the query in a history.
        predictors: From a split to scores, by name.
        ours: One of them, see `figures`.

    Returns:
        Rows with `support`, `members` and `figures`.
    """
    rows = []
    for n in sizes:
        split = split_at(events, n, query, start=start)
        scored = {name: predict(split) for name, predict in predictors.items()}
        rows.append({"support": n, "members": len(split.members), **figures(scored, ours)})
    return rows


def last_events(events: Events, query: int, support: int) -> Split:
    """One task per member: its last events as query, what came before as support.

    Args:
        events: The log.
        query: Events of the query at most; a shorter history is asked in full.
        support: Events of the support at most.

    Returns:
        The tasks.
    """
    members = np.flatnonzero(events.counts > 0)
    counts = events.counts[members]
    asked = np.minimum(counts, query)
    before = np.minimum(counts - asked, support)
    cut = events.offsets[1:][members] - asked
    return known_before(events, Split(members, cut - before, before, cut, asked))


def by_activity(
    events: Events, query: int, support: int, predictors: Mapping[str, Callable[[Split], Scores]], ours: str = ""
) -> list[dict[str, Any]]:
    """Metrics of several predictors by how much each member had done before the query.

    Args:
        events: The log of the members who are asked.
        query: Events of the query at most.
        support: Events of a support at most.
        predictors: From a split to scores, by name.
        ours: One of them, see `figures`.

    Returns:
        Rows with `activity`, `members`, `rows` and `figures`, for buckets with both labels.
    """
    split = last_events(events, query, support)
    activity = events.counts[split.members] - split.query
    rows = []
    scored = {name: predict(split) for name, predict in predictors.items()}
    y = next(iter(scored.values())).y
    for low, high in BUCKETS:
        inside = (activity >= low) & (activity <= high)
        pick, own = np.flatnonzero(inside), np.repeat(inside, split.query)
        if not len(pick) or y[own].min() == y[own].max():
            continue  # nobody, or no AUC
        name = str(low) if low == high else f"{low}-{high}" if high < 1 << 60 else f">{low - 1}"
        part = {who: Scores(s.logit[own], s.y[own], s.owner[own]) for who, s in scored.items()}
        rows.append({"activity": name, "members": len(pick), "rows": int(own.sum()), **figures(part, ours)})
    return rows


def finite(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows for JSON: a figure that does not exist is null."""
    return [{k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in row.items()} for row in rows]
