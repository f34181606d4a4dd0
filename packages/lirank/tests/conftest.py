"""A small log with everything in it, shared by the tests."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lirank.data.parquet import ParquetLog
from lirank.data.split import Split
from lirank.features.prepare import prepare
from lirank.model.config import ModelConfig
from lirank.model.ranker import Ranker
from lirank.schema.features import parse_schema
from lirank.train.loop import TrainConfig, Trainer
from lirank.train.run import TrainedModel

SCHEMA = """
time: {column: time}
group: user
labels: [{name: click, group: a}, {name: like, group: b, missing: skip, weight: 0.5}]
position: position
features:
- {kind: id, name: user, rows: 256}
- {kind: id, name: item, type: string, vocabulary: static, rows: 64, min_count: 2}
- {kind: id, name: city, rows: 131, vocabulary: qr}
- {kind: dense, name: price, transform: log1p}
- {kind: dense, name: age, missing: mean, transform: quantile}
- {kind: multi, name: tags, type: string, rows: 64}
- {kind: history, name: seen, key: user, item: item, action: click, length: 5}
- {kind: popularity, name: item_rate, key: [item], label: click, half_life: 5000}
- {kind: popularity, name: pair_rate, key: [user, item], label: click}
"""
CONFIG = ModelConfig(
    dim=8,
    widths=(16, 8),
    cross_rank=8,
    history_width=8,
    task_widths=(8,),
    tasks="grouped",
    calibration_context="item",
)


def make_table(rows=1500, seed=0, users=30, items=40):
    rng = np.random.default_rng(seed)
    user, item = rng.integers(users, size=rows), rng.integers(items, size=rows)
    z = rng.normal(size=users)[user] + rng.normal(size=items)[item] + 0.5 * rng.normal(size=rows)
    age = [
        None if draw < 0.1 else float(value)
        for draw, value in zip(rng.random(rows), rng.normal(40, 10, rows), strict=True)
    ]
    like = [None if draw < 0.3 else int(value) for draw, value in zip(rng.random(rows), z > 0.5, strict=True)]
    return pa.table(
        {
            "time": np.sort(rng.integers(0, rows, size=rows)) * 10,
            "user": user,
            "item": [f"item-{i}" for i in item],
            "city": [None if c == 0 else int(c) for c in rng.integers(9, size=rows)],
            "price": np.exp(rng.normal(size=rows)),
            "age": age,
            "tags": [[f"t{t}" for t in rng.integers(6, size=rng.integers(4))] for _ in range(rows)],
            "position": rng.integers(5, size=rows),
            "click": (z + rng.normal(size=rows) > 0).astype(np.int64),
            "like": like,
        }
    )


@pytest.fixture
def table():
    return make_table()


@pytest.fixture
def schema():
    return parse_schema(SCHEMA)


@pytest.fixture
def log_file(tmp_path, table):
    pq.write_table(table, tmp_path / "log.parquet", row_group_size=300)
    return tmp_path / "log.parquet"


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """The small log, prepared."""
    folder = tmp_path_factory.mktemp("prepared")
    pq.write_table(make_table(), folder / "log.parquet", row_group_size=300)
    return prepare(ParquetLog.open(folder / "log.parquet"), parse_schema(SCHEMA), Split(), folder / "data")


@pytest.fixture(scope="session")
def trained(prepared, tmp_path_factory):
    """A model of the small log; do not change it."""
    folder = tmp_path_factory.mktemp("run")
    encoder = prepared.encoder()
    torch.manual_seed(0)
    model = Ranker(encoder, CONFIG)
    config = TrainConfig(epochs=2, batch_size=128)
    Trainer(model, encoder, config).fit(prepared.log("train"), prepared.log("valid"), folder)
    return TrainedModel(model.eval(), encoder, prepared.causal(), {})


@pytest.fixture(scope="session", name="make_table")
def make_table_fixture():
    return make_table


@pytest.fixture(scope="session")
def schema_text():
    return SCHEMA
