"""Growth: new ids, new columns and more rows, with old scores as they were."""

import msgspec
import numpy as np
import pyarrow as pa
import pytest
import torch
from lirank.data.growth import grown_encoder
from lirank.features.causal import CausalFeatures
from lirank.model.config import ModelConfig
from lirank.model.growth import grown
from lirank.model.ranker import Ranker
from lirank.schema.features import SPECIAL, Dense, History, Id, Multi, Popularity, parse_schema

BASE = """
time: {column: t}
labels: [{name: y, group: a}, {name: z, group: b}]
features:
- {kind: id, name: u, rows: 103}
- {kind: id, name: i, type: string, vocabulary: static, rows: 20, min_count: 2}
- {kind: id, name: c, rows: 43, hashes: 2}
- {kind: dense, name: x}
- {kind: history, name: h, key: u, item: i, action: y, length: 3}
- {kind: popularity, name: p, key: [i], label: y}
"""
ADDED = (
    Id(name="brand", type="string", vocabulary="static", rows=12),
    Id(name="digits", rows=43, vocabulary="qr"),
    Dense(name="age", missing="mean"),
    Multi(name="tags", rows=31),
    History(name="h2", key="u", item="brand", length=2),
    Popularity(name="p2", key=("u",), label="z"),
)


def log(rows, seed, items, start=0):
    rng = np.random.default_rng(seed)
    return pa.table(
        {
            "t": start + np.arange(rows),
            "u": rng.integers(30, size=rows),
            "i": [f"i{n}" for n in rng.integers(*items, size=rows)],
            "c": rng.integers(9, size=rows),
            "x": rng.normal(size=rows),
            "y": rng.integers(2, size=rows),
            "z": rng.integers(2, size=rows),
            "brand": [f"b{n}" for n in rng.integers(5, size=rows)],
            "digits": rng.integers(1000, size=rows),
            "age": [None if n < 0.2 else n for n in rng.random(rows)],
            "tags": [list(rng.integers(7, size=2)) for _ in range(rows)],
        }
    )


def trained(config):
    """A model with values everywhere, and its causal memory."""
    schema = parse_schema(BASE)
    causal = CausalFeatures(schema, 1.0)
    encoder = encoder_of(schema, causal.extend(log(300, 0, (0, 9))))
    torch.manual_seed(0)
    model = Ranker(encoder, config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, encoder, causal


def encoder_of(schema, table):
    from lirank.data.batch import Encoder

    encoder = Encoder(schema)
    encoder.observe(table)
    return encoder


CONFIG = ModelConfig(dim=4, widths=(8,), cross_rank=4, history_width=4, tasks="grouped", task_widths=(4,))


def both(model, encoder, causal, schema, new):
    """Scores of new rows by the old model, and by the grown one that has seen them."""
    expected = model.predict(encoder.encode(causal.grown(encoder.schema).extend(new)))
    extended = causal.grown(schema).extend(new)
    after = grown_encoder(encoder, schema)
    after.observe(extended)
    torch.manual_seed(1)
    larger = grown(model, encoder, after)
    return expected, larger.predict(after.encode(extended)), larger, after


def test_new_ids_score_as_before_bit_for_bit():  # lightfm#347
    model, encoder, causal = trained(CONFIG)
    new = log(200, 1, (0, 15), 300).append_column("k", pa.array(np.zeros(200)))  # items 9 to 14 are new
    before = encoder.vocabularies["i"].summary()["rows_used"]
    users = pa.array(np.random.default_rng(5).integers(60, size=200))  # half of the users are new
    new = new.set_column(1, "u", users).set_column(3, "c", pa.array(np.zeros(200, np.int64)))
    expected, found, _, after = both(model, encoder, causal, encoder.schema, new)
    assert after.vocabularies["i"].summary()["rows_used"] > before
    assert torch.equal(found, expected)
    # but they have rows of their own now: training one moves no other
    batch = after.encode(causal.grown(encoder.schema).extend(new))
    ids = batch.ids[:, 1]
    start = after.layout.offsets["i"]
    fresh = ids[ids >= start + SPECIAL].unique()
    assert len(fresh) > 9


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cross": "full", "tasks": "shared", "task_widths": ()},
        {"cross": "residual", "gate": "lhuc", "tasks": "mmoe", "experts": 2},
        {"cross": "none", "embed_dense": True, "tasks": "ple", "experts": 2},
        {"calibration_context": "i"},
    ],
)
def test_new_columns_change_no_score_until_they_are_trained(changes):  # lightfm#609
    config = msgspec.structs.replace(CONFIG, **changes)
    model, encoder, causal = trained(config)
    features = list(encoder.schema.features)
    for place, feature in enumerate(ADDED):  # in front, between and behind
        features.insert(2 * place, feature)
    schema = msgspec.structs.replace(encoder.schema, features=tuple(features))
    new = log(200, 1, (0, 15), 300)
    expected, found, larger, after = both(model, encoder, causal, schema, new)
    # zeros make the sums longer: another order of at most a hundred terms
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    batch = after.encode(causal.grown(schema).extend(new))
    larger.train()
    larger(batch).sum().backward()
    for name, parameter in larger.network.named_parameters():  # and all of them can be trained
        if parameter.requires_grad and "mlp.linear.0" in name:
            assert bool((parameter.grad != 0).any(0).all()), name


@pytest.mark.parametrize(("name", "rows"), [("u", 203), ("u", 303), ("c", 83), ("i", 50)])
def test_more_rows_keep_every_score(name, rows):
    model, encoder, causal = trained(CONFIG)
    features = tuple(msgspec.structs.replace(f, rows=rows) if f.name == name else f for f in encoder.schema.features)
    schema = msgspec.structs.replace(encoder.schema, features=features)
    old = log(200, 0, (0, 9), 300)
    expected, found, larger, _ = both(model, encoder, causal, schema, old)
    assert len(larger.table.weight) == len(model.table.weight) + rows - encoder.schema.feature(name).rows
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("name: u, rows: 103", "name: u, rows: 150"), "whole multiples.*such as 203, got 150"),
        (("name: u, rows: 103", "name: u, rows: 50"), "at least the 103 rows"),
        (("name: x", "name: x, transform: log1p"), "x: differs"),
        (("- {kind: dense, name: x}\n", ""), "x: the earlier run has this feature"),
        (("name: z, group: b", "name: z"), "labels differs"),
        (("length: 3", "length: 4"), "h: differs"),
    ],
)
def test_what_cannot_grow_is_refused(change, message):
    encoder = encoder_of(parse_schema(BASE), CausalFeatures(parse_schema(BASE), 1.0).extend(log(50, 0, (0, 9))))
    with pytest.raises(ValueError, match=message):
        grown_encoder(encoder, parse_schema(BASE.replace(*change)))


def test_forgotten_ids_are_unseen_and_the_others_score_as_before():
    model, encoder, causal = trained(CONFIG)
    early = log(100, 1, (0, 5), 300)
    late = log(100, 2, (5, 9), 1000)
    late = late.set_column(1, "u", pa.array(100 + np.random.default_rng(5).integers(10, size=100)))
    extended = causal.extend(pa.concat_tables([early, late]))
    encoder.observe(extended)
    expected = model.predict(encoder.encode(extended))
    vocabulary = encoder.vocabularies["i"]
    known = len(vocabulary.keys)
    assert len(vocabulary.forget(900)) > 0
    assert len(vocabulary.keys) == known - 5 == 4
    gone = encoder.vocabularies["u"].forget(900)
    assert len(gone) > 0
    found = model.predict(encoder.encode(extended))
    assert torch.equal(found[100:], expected[100:])
    assert bool((found[:100] != expected[:100]).any())
    assert causal.forget(900) > 0
    assert causal.forget(900) == 0
    causal.extend(log(20, 3, (0, 9), 2000))
