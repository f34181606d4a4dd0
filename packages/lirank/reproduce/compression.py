"""What smaller tables cost: hashing, two hashes, quotient-remainder, and 8-bit rows, on a market of many ids.

800 users and 400 items, 20,000 impressions, so that a table with a row per id is what there is to compress; five
seeds, the last 40 % of the time test. 8-bit rows are made of the trained table and need no training.
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow.parquet as pq
import torch
from _study import Study, study
from core_tensor.ops.quantized_gather import dequantize_rows, quantize_rows
from lirank.data.parquet import ParquetLog
from lirank.evaluate.metrics import auc, logloss
from lirank.evidence.ablation import BASE, SPLIT, TRAINING
from lirank.evidence.generator import Market, generate, without
from lirank.features.prepare import prepare
from lirank.model.ranker import Ranker
from lirank.schema.features import Id, Popularity, Schema
from lirank.train.loop import Trainer, score

MARKET = Market(users=800, items=400, events=20_000, ids=1.5)
DIM = BASE.dim
FULL = {"user": 1024, "item": 512}
TABLES: dict[str, dict[str, Any]] = {
    "a row per id": {"vocabulary": "static"},
    "one hash, 1/5 of the rows": {"share": 0.2},
    "two hashes, 1/5 of the rows": {"share": 0.2, "hashes": 2},
    "quotient-remainder, 1/5 of the rows": {"share": 0.2, "vocabulary": "qr"},
}
INT8 = ", 8-bit"


def schema(plain: Schema, share: float = 1.0, **options: Any) -> Schema:
    """The market's schema with users and items compressed; no counts, which would stand in for the ids."""
    features = tuple(
        msgspec.structs.replace(f, rows=max(round(share * FULL[f.name]), 8), **options)
        if isinstance(f, Id) and f.name in FULL
        else f
        for f in without(plain, Popularity).features
    )
    return msgspec.structs.replace(plain, features=features)


def run(name: str, seed: int, options: Study) -> np.ndarray:
    """Labels, and probabilities with the trained table and with its 8-bit rows, shape (3, n)."""
    market = dataclasses.replace(MARKET, events=8_000 if options.quick else MARKET.events, seed=seed)
    made = generate(market)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        pq.write_table(made.log, folder / "log.parquet")
        log = ParquetLog.open(folder / "log.parquet")
        prepared = prepare(log, schema(made.schema, **TABLES[name]), SPLIT, folder / "data")
        encoder, train, test = prepared.encoder(), prepared.log("train"), prepared.log("test")
        assert train is not None
        assert test is not None
        torch.manual_seed(seed)
        model = Ranker(encoder, BASE)
        training = msgspec.structs.replace(TRAINING, seed=seed, epochs=2 if options.quick else TRAINING.epochs)
        Trainer(model, encoder, training).fit(train, prepared.log("valid"), folder)
        plain = score(model, encoder, test)
        with torch.no_grad():
            model.table.weight.copy_(dequantize_rows(quantize_rows(model.table.weight)))
        small = score(model, encoder, test)
    return np.stack([plain["labels"][:, 0], plain["p"][:, 0], small["p"][:, 0]]).astype(np.float64)


def main() -> None:
    """Train what is missing, then write the table."""
    options = study(__doc__)
    measured: dict[str, list[tuple[float, float]]] = {}
    for name in TABLES:
        for seed in range(options.seeds):
            key = {"name": name, "seed": seed, "market": repr(MARKET), "quick": options.quick, **TABLES[name]}
            y, p, small = options.scores(key, lambda name=name, seed=seed: run(name, seed, options))
            measured.setdefault(name, []).append((auc(p, y) or 0.0, logloss(p, y)))
            measured.setdefault(name + INT8, []).append((auc(small, y) or 0.0, logloss(small, y)))
    base = np.array(measured["a row per id"])[:, 0]
    rows = []
    for name, values in measured.items():
        found = np.array(values)
        share = TABLES[name.removesuffix(INT8)].get("share", 1.0)
        width = DIM + 6 if name.endswith(INT8) else 4 * DIM
        lost = found[:, 0] - base
        error = float(lost.std(ddof=1)) / len(lost) ** 0.5 if len(lost) > 1 else None
        rows.append(
            {
                "table": name,
                "kilobytes": share * sum(FULL.values()) * width / 1000,
                "memory": share * width / (4 * DIM),
                "auc": float(found[:, 0].mean()),
                "logloss": float(found[:, 1].mean()),
                "auc_change": float(lost.mean()),
                "auc_change_se": error,
            }
        )
    rows.sort(key=lambda row: -row["memory"])
    options.update("compression.json", {"tables": rows, "seeds": options.seeds, "dim": DIM})


if __name__ == "__main__":
    main()
