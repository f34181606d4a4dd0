"""The main job on the generator: train, generate, look up, refresh; the gain by activity beside the near-oracle's."""

from collections.abc import Callable
from typing import Any

from meta_embed.evaluate.buckets import SIZES, by_size, model_scores
from meta_embed.evidence.oracle import oracle_scores
from meta_embed.evidence.served import serve_once
from meta_embed.evidence.trained import QUERY, START, trained_world


def run_demo(members: int, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Everything once.

    Args:
        members: Members of the generator.
        seed: Seed.
        say: Called with what is going on.

    Returns:
        `rows` by support size, and headline figures.
    """
    trained = trained_world(members, seed, say)
    asked = trained.tested
    rows = by_size(
        asked,
        SIZES,
        QUERY,
        START,
        {
            "none": lambda split: model_scores(trained.plain, asked, split, adapted=False),
            "map": lambda split: model_scores(trained.model, asked, split),
            "oracle": lambda split: oracle_scores(trained.world, asked, split),
        },
        ours="map",
    )
    for row in rows:
        gap = row["oracle_auc"] - row["none_auc"]
        row["gap_closed"] = (row["map_auc"] - row["none_auc"]) / gap
    return {"rows": rows, "gap_closed_n16": rows[SIZES.index(16)]["gap_closed"], **serve_once(trained)}
