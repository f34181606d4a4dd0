"""What smaller tables cost: hashing, two hashes, quotient-remainder, rows for frequent ids alone, and 8-bit rows.

Two markets of 60,000 impressions, five seeds each, the last 40 % of the time test. In `few` a user of 8,000 is met 4.5
times in the training rows and an item of 4,000 nine times, so that most ids are worth a row of their own; in `many`, of
40,000 users and 20,000 items, most are met once or never. 8-bit rows are made of the trained table without training.
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
from lirank.evidence.generator import Market, generate, schema_of, without
from lirank.features.prepare import prepare
from lirank.model.ranker import Ranker
from lirank.schema.features import SPECIAL, Id, Popularity, Schema
from lirank.train.loop import Trainer, score

MARKETS = {
    "few": Market(users=8_000, items=4_000, events=60_000, ids=1.5),
    "many": Market(users=40_000, items=20_000, events=60_000, ids=1.5),
}
DIM = BASE.dim
TABLES: dict[str, dict[str, Any]] = {
    "a row per id": {"vocabulary": "static"},
    "one hash": {"share": 0.2},
    "two hashes": {"share": 0.2, "hashes": 2},
    "quotient-remainder": {"share": 0.2, "vocabulary": "qr"},
    "the most frequent alone": {"share": 0.2, "vocabulary": "static"},
    "the most frequent, one hash for all": {"share": 0.15, "tail": 0.05, "vocabulary": "static"},
}
"""By name: share of the ids that are rows of a table, how, and rows of a second, hashed feature of the same column."""
NARROW: dict[str, dict[str, Any]] = {
    "16 wide": {"vocabulary": "static", "dim": 16},
    "6 wide": {"vocabulary": "static", "dim": 6, "row_lr": 0.06},  # each at its best rate for a market of another seed
}
PARTS = {name: (name, TABLES) for name in MARKETS} | {f"narrow_{name}": (name, NARROW) for name in MARKETS}
INT8 = ", 8-bit"


def schema(market: Market, share: float = 1.0, tail: float = 0.0, **options: Any) -> Schema:
    """The market's schema with users and items compressed; no counts, which would stand in for the ids."""
    plain = without(schema_of(market), Popularity)
    sizes = {"user": market.users, "item": market.items}
    features = tuple(
        msgspec.structs.replace(f, rows=max(round(share * sizes[f.name]), 8) + SPECIAL, **options)
        if isinstance(f, Id) and f.name in sizes
        else f
        for f in plain.features
    )
    if tail:
        features += tuple(
            Id(name=f"{name}_hashed", column=name, rows=round(tail * size) + SPECIAL) for name, size in sizes.items()
        )
    return msgspec.structs.replace(plain, features=features)


def run(market: Market, table: dict[str, Any], epochs: int) -> np.ndarray:
    """Labels, and probabilities with the trained table and with its 8-bit rows, shape (3, n)."""
    made, options = generate(market), dict(table)
    config = msgspec.structs.replace(BASE, dim=options.pop("dim", DIM))
    rate = options.pop("row_lr", TRAINING.row_lr)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        pq.write_table(made.log, folder / "log.parquet")
        log = ParquetLog.open(folder / "log.parquet")
        prepared = prepare(log, schema(market, **options), SPLIT, folder / "data")
        encoder, train, test = prepared.encoder(), prepared.log("train"), prepared.log("test")
        assert train is not None
        assert test is not None
        torch.manual_seed(market.seed)
        model = Ranker(encoder, config)
        training = msgspec.structs.replace(TRAINING, seed=market.seed, epochs=epochs, row_lr=rate)
        Trainer(model, encoder, training).fit(train, prepared.log("valid"), folder)
        plain = score(model, encoder, test)
        with torch.no_grad():
            model.table.weight.copy_(dequantize_rows(quantize_rows(model.table.weight)))
        small = score(model, encoder, test)
    return np.stack([plain["labels"][:, 0], plain["p"][:, 0], small["p"][:, 0]]).astype(np.float64)


def compressed(market: Market, tables: dict[str, dict[str, Any]], options: Study) -> list[dict[str, Any]]:
    """One row per table: means over seeds, and what it costs against the first one."""
    measured: dict[str, list[tuple[float, float]]] = {}
    epochs = 2 if options.quick else TRAINING.epochs
    for name in tables:
        for seed in range(options.seeds):
            own = dataclasses.replace(market, seed=seed)
            key = {"name": name, "market": repr(own), "training": TRAINING.to_dict(), "epochs": epochs, **tables[name]}
            y, p, small = options.scores(key, lambda name=name, own=own: run(own, tables[name], epochs))
            measured.setdefault(name, []).append((auc(p, y) or 0.0, logloss(p, y)))
            measured.setdefault(name + INT8, []).append((auc(small, y) or 0.0, logloss(small, y)))
    first = next(iter(tables))
    base, floats = np.array(measured[first]), 4 * tables[first].get("dim", DIM)
    rows = []
    for name, values in measured.items():
        found = np.array(values)
        table = tables[name.removesuffix(INT8)]
        share, dim = table.get("share", 1.0) + table.get("tail", 0.0), table.get("dim", DIM)
        width = dim + 6 if name.endswith(INT8) else 4 * dim
        lost = found - base
        error = float(lost[:, 0].std(ddof=1)) / len(lost) ** 0.5 if len(lost) > 1 else None
        rows.append(
            {
                "table": name,
                "kilobytes": share * (market.users + market.items) * width / 1000,
                "memory": share * width / floats,
                "auc": float(found[:, 0].mean()),
                "logloss": float(found[:, 1].mean()),
                "auc_change": float(lost[:, 0].mean()),
                "auc_change_se": error,
                "logloss_change": float(lost[:, 1].mean()),
            }
        )
    return rows


def main() -> None:
    """Train what is missing, then write the tables."""
    options = study(__doc__, tuple(PARTS))
    for part in options.only or PARTS:
        name, tables = PARTS[part]
        market = dataclasses.replace(MARKETS[name], events=8_000) if options.quick else MARKETS[name]
        found = compressed(market, tables, options)
        options.update("compression.json", {part: found, "seeds": options.seeds, "dim": DIM})


if __name__ == "__main__":
    main()
