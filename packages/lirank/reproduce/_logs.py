"""Real logs as one table each, joined from the shared data folder, with the schemas that the evidence uses."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from core_tensor.dev.testing import shared_data
from lirank.schema.features import Schema, parse_schema

COMMON = """
time: {column: time}
group: user
"""

MOVIELENS = (
    COMMON
    + """
labels: [{name: liked, column: rating, at_least: 4}]
features:
- {kind: id, name: user, rows: 8192}
- {kind: id, name: item, rows: 16384}
- {kind: id, name: gender, type: string, rows: 64}
- {kind: id, name: occupation, type: string, rows: 256}
- {kind: dense, name: age}
- {kind: dense, name: year}
- {kind: multi, name: genres, type: string, rows: 256}
- {kind: popularity, name: item_rate, key: [item], label: liked}
- {kind: popularity, name: user_rate, key: [user], label: liked}
"""
)
AMAZON = (
    COMMON
    + """
labels: [{name: liked, column: rating, at_least: 5}]
features:
- {kind: id, name: user, rows: 32768}
- {kind: id, name: item, rows: 16384}
- {kind: id, name: brand, rows: 2048}
- {kind: multi, name: category, rows: 256}
- {kind: popularity, name: item_rate, key: [item], label: liked}
- {kind: popularity, name: user_rate, key: [user], label: liked}
- {kind: popularity, name: brand_rate, key: [brand], label: liked}
"""
)
FRAPPE = """
group: user
labels: [{name: used}]
features:
- {kind: id, name: user, rows: 4096}
- {kind: id, name: item, rows: 16384}
- {kind: id, name: daytime, type: string, rows: 64}
- {kind: id, name: weekday, type: string, rows: 64}
- {kind: id, name: isweekend, type: string, rows: 16}
- {kind: id, name: homework, type: string, rows: 16}
- {kind: id, name: cost, type: string, rows: 16}
- {kind: id, name: weather, type: string, rows: 64}
- {kind: id, name: country, type: string, rows: 512}
- {kind: id, name: city, rows: 1024}
"""
HISTORY = "- {kind: history, name: seen, key: user, item: item, action: liked, length: %d}\n"


def movielens() -> pa.Table:
    """MovieLens-100k with users and items joined."""
    ratings, users, items = (
        pq.read_table(_path(f"ml100k_{n}.parquet")).to_pandas() for n in ("ratings", "users", "items")
    )
    items["genres"] = items["genres"].str.split(" ")
    items["year"] = pd.to_numeric(items["year"], errors="coerce").fillna(1990).astype(int)
    joined = ratings.merge(users, on="user").merge(items.drop(columns="title"), on="item")
    return _ordered(joined)


def amazon() -> pa.Table:
    """Amazon ratings with brands and categories joined."""
    ratings = pq.read_table(_path("amazon_hin_ratings.parquet")).to_pandas()
    brands = pq.read_table(_path("amazon_hin_item_brand.parquet")).to_pandas().drop_duplicates("item")
    categories = pq.read_table(_path("amazon_hin_item_category.parquet")).to_pandas()
    listed = categories.groupby("item")["category"].apply(list).reset_index()
    joined = ratings.merge(brands, on="item", how="left").merge(listed, on="item", how="left")
    joined["brand"] = joined["brand"].fillna(-1).astype("int64")
    return _ordered(joined)


def frappe() -> pa.Table:
    """Frappe's app uses, each followed by two random apps in the same context as negatives."""
    used = pq.read_table(_path("frappe.parquet")).to_pandas().drop(columns="cnt")
    random, items = np.random.default_rng(0), used["item"].nunique()
    pieces = [used.assign(used=1)]
    for _ in range(2):
        shift = random.integers(1, items, size=len(used))  # another app than the one that was used
        pieces.append(used.assign(used=0, item=(used["item"] + shift) % items))
    rows = pd.concat(pieces).sort_index(kind="stable")
    return pa.Table.from_pandas(rows, preserve_index=False)


def schema(name: str, history: int = 0) -> Schema:
    """The schema of `movielens`, `amazon` or `frappe`, with a history of some length or none."""
    text = {"movielens": MOVIELENS, "amazon": AMAZON, "frappe": FRAPPE}[name]
    return parse_schema(text + (HISTORY % history if history else ""))


def write(name: str, folder: Path, share: float = 1.0) -> Path:
    """One of the logs as a Parquet file, or all rows of a random share of its users."""
    path = folder / (f"{name}.parquet" if share == 1 else f"{name}-{share:.3f}.parquet")
    if not path.exists():
        log = {"movielens": movielens, "amazon": amazon, "frappe": frappe}[name]()
        if share < 1:
            users = np.asarray(log["user"])
            known = np.unique(users)
            kept = np.random.default_rng(0).permutation(known)[: round(share * len(known))]
            log = log.filter(pa.array(np.isin(users, kept)))
        pq.write_table(log, path)
    return path


def _path(name: str) -> Path:
    return shared_data("ranking_logs", name)


def _ordered(frame: pd.DataFrame) -> pa.Table:
    return pa.Table.from_pandas(frame.sort_values(["time", "user", "item"], kind="stable"), preserve_index=False)
