"""MovieLens-100k and Amazon ratings as event logs: the columns that the evidence reads, from the shared data folder."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from core_tensor.dev.testing import shared_data
from meta_embed.tasks.schema import Feature, Schema

COMMON = {"entity": "user", "time": "time", "label": "liked"}


def movielens() -> tuple[pa.Table, Schema]:
    """MovieLens-100k; liked is a rating of at least 4."""
    ratings, users, items = (_read(f"ml100k_{n}.parquet") for n in ("ratings", "users", "items"))
    genres = items["genres"].str.get_dummies(" ").to_numpy(np.float32)
    year = pd.to_numeric(items["year"], errors="coerce").fillna(1990).to_numpy(np.float32)
    items["about"] = list(np.column_stack([genres, (year - 1985) / 15]))
    users["age"] = (users["age"] - 34.0) / 12.0
    joined = ratings.merge(users, on="user").merge(items[["item", "about"]], on="item")
    joined["liked"] = (joined["rating"] >= 4).astype(np.float32)
    schema = Schema(
        **COMMON,
        row=(Feature("item"), Feature("about", "dense", width=genres.shape[1] + 1)),
        member=(Feature("age", "dense"), Feature("gender"), Feature("occupation")),
    )
    return _table(joined, schema), schema


def amazon() -> tuple[pa.Table, Schema]:
    """Amazon ratings of every second user with brands and categories, no features of users; liked is a rating of 5."""
    ratings, brands = _read("amazon_hin_ratings.parquet"), _read("amazon_hin_item_brand.parquet")
    listed = _read("amazon_hin_item_category.parquet")
    categories = pd.crosstab(listed["item"], listed["category"]).clip(upper=1)
    ratings = ratings[ratings["user"] % 2 == 0]
    joined = ratings.merge(brands.drop_duplicates("item"), on="item", how="left")
    joined["brand"] = joined["brand"].fillna(-1).astype("int64")
    about = categories.reindex(joined["item"]).fillna(0).to_numpy(np.float32)
    joined["about"] = list(about)
    joined["liked"] = (joined["rating"] >= 5).astype(np.float32)
    row = (Feature("item"), Feature("brand"), Feature("about", "dense", width=about.shape[1]))
    schema = Schema(**COMMON, row=row)
    return _table(joined, schema), schema


LOGS = {"movielens": movielens, "amazon": amazon}


def _read(name: str) -> pd.DataFrame:
    return pd.read_parquet(Path(shared_data("ranking_logs", name)))


def _table(frame: pd.DataFrame, schema: Schema) -> pa.Table:
    return pa.Table.from_pandas(frame[list(schema.columns)], preserve_index=False)
