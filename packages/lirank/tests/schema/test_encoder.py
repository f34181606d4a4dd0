import numpy as np
import pyarrow as pa
import pytest
from lirank.data.batch import Encoder
from lirank.features.causal import CausalFeatures
from lirank.features.prepare import load_encoder, save_encoder
from lirank.schema.features import parse_schema


def encode(text, columns, labels=True):
    encoder = Encoder(parse_schema(text))
    table = pa.table(columns)
    encoder.observe(table)
    return encoder.encode(table, labels=labels)


BASE = "features: [{kind: id, name: u}, {kind: dense, name: x}]\nlabels: [{name: y}]"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"u": [1, 2], "x": [1.0, np.inf], "y": [0, 1]}, "column 'x': .*row 1 is inf"),  # FuxiCTR#101
        ({"u": [1, 2], "x": [np.nan, 1.0], "y": [0, 1]}, "column 'x': .*row 0 is nan"),
        ({"u": [1, 2], "x": [None, 1.0], "y": [0, 1]}, "column 'x': row 0 is null"),
        ({"u": [1, 2], "x": [0.0, 1.0], "y": [0, 2]}, "column 'y': expected labels 0 and 1, row 1 is 2"),
        ({"u": [1, 2], "x": [0.0, 1.0], "y": [None, 1]}, "label 'y' is null in row 0"),
        ({"u": ["a", "b"], "x": [0.0, 1.0], "y": [0, 1]}, "column 'u': expected integers, got large_string"),
        ({"u": [1.5, 2.0], "x": [0.0, 1.0], "y": [0, 1]}, "column 'u': expected integers"),
        ({"u": [1, 2], "x": ["a", "b"], "y": [0, 1]}, "column 'x': expected numbers"),
    ],
)
def test_bad_values_name_column_and_row(columns, message):
    with pytest.raises(ValueError, match=message):
        encode(BASE, columns)


def test_a_null_id_has_its_row_or_is_refused():  # RecZoo#37
    columns = {"u": [1, None], "y": [0, 1]}
    batch = encode("features: [{kind: id, name: u}]\nlabels: [{name: y}]", columns)
    assert batch.ids[1, 0] == 0
    with pytest.raises(ValueError, match="column 'u': row 1 is null"):
        encode("features: [{kind: id, name: u, missing: error}]\nlabels: [{name: y}]", columns)


def test_weights_below_zero_and_log_of_minus_one_are_refused():
    with pytest.raises(ValueError, match="column 'w'"):
        encode(BASE + "\nweight: w", {"u": [1], "x": [0.0], "y": [0], "w": [-1.0]})
    text = BASE.replace("name: x", "name: x, transform: log1p")
    with pytest.raises(ValueError, match="log1p"):
        encode(text, {"u": [1, 2], "x": [0.0, -1.0], "y": [0, 1]})


def test_constant_and_empty_columns_are_reported():
    encoder = Encoder(parse_schema(BASE.replace("name: x", "name: x, missing: mean")))
    encoder.observe(pa.table({"u": pa.array([None, None], pa.int64()), "x": [1.0, None], "y": [0, 1]}))
    assert encoder.check_columns() == ["x: always 1", "u: always null"]


def test_batches_are_slices_of_what_was_encoded(prepared):
    import torch

    encoder = prepared.encoder()
    table = next(prepared.log("train").read(rows=400))
    batch = encoder.encode(table)
    rows = torch.tensor([5, 399, 0, 5])
    direct = encoder.encode(table.take(rows.numpy()))
    taken = batch.take(rows)
    assert torch.equal(direct.ids, taken.ids)
    assert torch.equal(direct.dense.nan_to_num(), taken.dense.nan_to_num())
    for name, lists in direct.lists.items():
        assert torch.equal(lists.values, taken.lists[name].values)
        assert torch.equal(lists.offsets, taken.lists[name].offsets)
        assert torch.equal(lists.actions, taken.lists[name].actions)


def test_state_round_trip_and_foreign_state(prepared, tmp_path, table):
    encoder = prepared.encoder()
    save_encoder(encoder, tmp_path / "e.safetensors")
    found = load_encoder(tmp_path / "e.safetensors")
    extended = CausalFeatures(encoder.schema, 1.0).extend(table)
    import torch

    assert torch.equal(found.encode(extended).ids, encoder.encode(extended).ids)
    other = Encoder(parse_schema(BASE))
    with pytest.raises(ValueError, match="another schema"):
        other.load_state(encoder.state())
    (tmp_path / "bad.safetensors").write_bytes((tmp_path / "e.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"bad\.safetensors"):
        load_encoder(tmp_path / "bad.safetensors")


def test_dense_statistics_keep_a_million_rows_bounded():
    encoder = Encoder(parse_schema(BASE))
    for start in range(3):
        n = 100_000
        encoder.observe(pa.table({"u": np.arange(n), "x": np.arange(n) + float(start), "y": np.zeros(n, np.int64)}))
    assert len(encoder.statistics["x"].sample) <= 1 << 16
