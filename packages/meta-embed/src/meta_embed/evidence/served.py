"""Vectors stored, refreshed, looked up and quantized, once on every step from a model to a score."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from meta_embed.evaluate.buckets import model_scores
from meta_embed.evaluate.metrics import Scores, auc
from meta_embed.evidence.trained import QUERY, START, TrainedWorld
from meta_embed.generate.job import generate
from meta_embed.generate.refresh import refresh
from meta_embed.model.build import load_model, save_model
from meta_embed.model.personalizer import no_grad_vectors
from meta_embed.serve.lookup import Lookup
from meta_embed.store.address import open_store
from meta_embed.store.codec import quantize
from meta_embed.tasks.ragged import task_batch
from meta_embed.tasks.split import split_at


def serve_once(trained: TrainedWorld) -> dict[str, Any]:
    """Store vectors of every history's beginning, refresh with the rest, and compare with a full generation.

    Args:
        trained: World and model.

    Returns:
        `refreshed_members`, `refresh_vs_full_max_diff`, `looked_up` and `unknown_member_is_cold`.
    """
    table = trained.world.table
    owner = np.asarray(table["member"])
    position = np.arange(len(owner)) - np.searchsorted(owner, owner)
    early = position < START
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "run").mkdir()
        save_model(folder / "run", trained.model, trained.config, trained.vocabulary)
        model, config, vocabulary, version = load_model(folder / "run")
        pq.write_table(table.filter(pa.array(early)), folder / "early.parquet")
        pq.write_table(table, folder / "all.parquet")
        generate(model, config, vocabulary, version, folder / "early.parquet", str(folder / "v"), folder / "w")
        generate(model, config, vocabulary, version, folder / "all.parquet", str(folder / "full"), folder / "w")
        with open_store(folder / "v", writer=True) as store:
            late = [table.filter(pa.array(~early))] * 2  # delivered twice
            refreshed = refresh(model, config, vocabulary, version, iter(late), store)
            keys = [int(k) for k in trained.tested.keys]
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


def int8_auc_change(trained: TrainedWorld, support: int = 16) -> float:
    """What storing vectors in 8 bits changes about the AUC of members that no training saw.

    Args:
        trained: World and model.
        support: Events of each support.

    Returns:
        The absolute difference.
    """
    events, model = trained.tested, trained.model
    split = split_at(events, support, QUERY, start=START)
    exact = model_scores(model, events, split)
    batch = task_batch(events, split.members, (split.support_start, split.support), (split.query_start, split.query))
    codes, scale, middle = quantize(no_grad_vectors(model, batch)[0].numpy())
    stored = torch.from_numpy(codes * scale[:, None].astype(np.float32) + middle[:, None].astype(np.float32))
    with torch.no_grad():
        logits = model.logits(batch.query.ids, batch.query.dense, stored[batch.query.owner])
    coarse = Scores(logits.double().numpy(), exact.y, exact.owner)
    return abs(auc(coarse.logit, coarse.y) - auc(exact.logit, exact.y))
