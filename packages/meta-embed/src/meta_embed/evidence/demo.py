"""The main job on the generator: train, generate, look up, refresh; the gain by activity beside the near-oracle's."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from meta_embed.config import Config, ModelOptions, TrainOptions
from meta_embed.evaluate.baselines import no_personalization
from meta_embed.evaluate.buckets import SIZES, Scores, by_size, model_scores
from meta_embed.evidence.generator import SCHEMA, World, make_world
from meta_embed.evidence.oracle import near_oracle
from meta_embed.generate.job import generate
from meta_embed.generate.refresh import refresh
from meta_embed.model.build import build_model, load_model, save_model
from meta_embed.serve.lookup import Lookup
from meta_embed.store.address import open_store
from meta_embed.tasks.encode import build_vocabulary
from meta_embed.tasks.events import Events, build_events
from meta_embed.tasks.split import Split
from meta_embed.train.outer import fit, split_members
from meta_embed.train.tune import tune

QUERY, START = 40, 32


def run_demo(members: int, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Everything once.

    Args:
        members: Members of the generator.
        seed: Seed.
        say: Called with what is going on.

    Returns:
        `rows` by support size, and headline figures.
    """
    world = make_world(members, least=START + QUERY, seed=seed)
    config = Config(columns=SCHEMA, model=ModelOptions(width=9, hidden=0), train=TrainOptions(epochs=20, tested=0.2))
    vocabulary = build_vocabulary(world.table, SCHEMA)
    events = build_events(world.table, SCHEMA, vocabulary)
    train, held_back, tested = split_members(events, config, seed)
    say(f"{members} members, {len(events.time)} events; training on {len(train)} members")
    known, judge = events.choose(train), events.choose(held_back)
    config = tune(known, judge, config, vocabulary, seed, precisions=(6.0, 20.0), epochs=(12, 25))
    model = build_model(config, vocabulary, seed)
    progress = fit(model, known, judge, config, seed=seed)
    plain = no_personalization(known, judge, config, vocabulary, seed)
    say(f"meta-trained {progress.epoch} epochs, best held-back loss {progress.best:.4f}")

    asked = events.choose(tested)
    rows = by_size(
        asked,
        SIZES,
        QUERY,
        START,
        {
            "none": lambda split: model_scores(plain, asked, split, adapted=False),
            "map": lambda split: model_scores(model, asked, split),
            "oracle": lambda split: oracle_scores(world, events, tested, asked, split),
        },
    )
    for row in rows:
        gap = row["oracle_auc"] - row["none_auc"]
        row["gap_closed"] = (row["map_auc"] - row["none_auc"]) / gap
    served = serve_once(world, model, config, vocabulary, tested)
    return {"rows": rows, "gap_closed_n16": rows[SIZES.index(16)]["gap_closed"], **served}


def oracle_scores(world: World, events: Events, members: Any, asked: Events, split: Split) -> Scores:
    """The near-oracle on the same rows; `asked` holds the events of `members` of the full log."""
    shift = events.offsets[:-1][members] - asked.offsets[:-1]
    moved = Split(
        members[split.members],
        split.support_start + shift[split.members],
        split.support,
        split.query_start + shift[split.members],
        split.query,
    )
    item = np.asarray(world.table["item"])
    p = np.clip(near_oracle(world, item, events.y, moved), 1e-12, 1 - 1e-12)
    owner = np.repeat(split.members, split.query)
    rows = np.concatenate([np.arange(a, a + n) for a, n in zip(split.query_start, split.query, strict=True)])
    return Scores(np.log(p / (1 - p)), asked.y[rows], owner)


def serve_once(world: World, model: Any, config: Config, vocabulary: Any, tested: Any) -> dict[str, Any]:
    """Store vectors of every history's beginning, refresh with the rest, and compare with a full generation."""
    table = world.table
    owner = np.asarray(table["member"])
    position = np.arange(len(owner)) - np.searchsorted(owner, owner)
    early = position < START
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "run").mkdir()
        save_model(folder / "run", model, config, vocabulary)
        model, config, vocabulary, version = load_model(folder / "run")
        pq.write_table(table.filter(pa.array(early)), folder / "early.parquet")
        pq.write_table(table, folder / "all.parquet")
        generate(model, config, vocabulary, version, folder / "early.parquet", str(folder / "v"), folder / "w")
        generate(model, config, vocabulary, version, folder / "all.parquet", str(folder / "full"), folder / "w")
        with open_store(folder / "v", writer=True) as store:
            late = [table.filter(pa.array(~early))] * 2  # delivered twice
            refreshed = refresh(model, config, vocabulary, version, iter(late), store)
            keys = [int(k) for k in tested]
            found = Lookup(store, version)([*keys, -1])
            with open_store(folder / "full") as full:
                expected = Lookup(full, version)(keys)
        difference = float(np.abs(found.vectors[:-1] - expected.vectors).max())
    return {
        "refreshed_members": refreshed["members"],
        "refresh_vs_full_max_diff": difference,
        "looked_up": int(found.known.sum()),
        "unknown_member_is_cold": not bool(found.known[-1]),
    }
