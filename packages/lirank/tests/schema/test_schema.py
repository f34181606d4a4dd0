import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from lirank.data.batch import Encoder
from lirank.schema.columns import as_float, as_lists, as_times, column_of
from lirank.schema.features import NULL, RARE, SPECIAL, UNSEEN, Id, load_schema, parse_schema
from lirank.schema.hashing import combined, fingerprints
from lirank.schema.transforms import DenseStatistics
from lirank.schema.vocabulary import Vocabulary, hash_rows, quotient_rows

HISTORY_OF_X = "features: [{kind: id, name: u}, {kind: history, name: h, key: u, item: x}]"


def test_yaml_round_trip(schema, tmp_path):
    schema.save(tmp_path / "schema.yaml")
    assert load_schema(tmp_path / "schema.yaml") == schema


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("features: [{kind: id, name: u, rowz: 3}]\nlabels: [{name: a}]", "rowz"),
        ("features: [{kind: id, name: u, rows: 1}]\nlabels: [{name: a}]", "rows"),
        ("features: [{kind: ids, name: u}]\nlabels: [{name: a}]", "ids"),
        ("features: []\nlabels: [{name: a}]", "at least one"),
        ("features: [{kind: id, name: u}]\nlabels: []", "at least one"),
        ("features: [{kind: id, name: u}, {kind: dense, name: u}]\nlabels: [{name: a}]", "twice"),
        ("features: [{kind: dense, name: u, column: a}]\nlabels: [{name: a}]", "also a feature"),
        ("features: [{kind: id, name: u}]\nlabels: [{name: a}]\ngroup: v", "group"),
        (
            "features: [{kind: id, name: u}, {kind: popularity, name: p, key: [u], label: a}]\nlabels: [{name: a}]",
            "time",
        ),
        (
            "time: {column: t}\nlabels: [{name: a}]\n" + HISTORY_OF_X,
            "'x'",
        ),
        ("features: [{kind: id, name: u, vocabulary: static, hashes: 2}]\nlabels: [{name: a}]", "hashes"),
        ("features: [{kind: id, name: u}]\nlabels: [{name: a}]\nsampling: 0", "sampling"),
        ("\x00", "schema"),
        ("[" * 4000, "schema"),
        ("", "schema"),
    ],
)
def test_a_schema_that_is_none_says_why(text, message):
    with pytest.raises(ValueError, match=message):
        parse_schema(text)


# --- ids: the faults of the peers


def rows_of(values, type_="int", **options):
    vocabulary = Vocabulary.empty(Id(name="id", type=type_, **options))
    array = pa.array(values)
    vocabulary.observe(*fingerprints("id", array, type_))
    return vocabulary, vocabulary.encode(*fingerprints("id", array, type_))[:, 0]


@pytest.mark.parametrize("kind", ["hash", "static"])
def test_ids_that_float32_would_merge_are_different_rows(kind):  # DeepCTR-Torch casts ids to float32
    _, rows = rows_of([16777216, 16777217], vocabulary=kind, rows=1 << 16)
    assert rows[0] != rows[1]
    assert rows.min() >= SPECIAL


@pytest.mark.parametrize("kind", ["hash", "static"])
def test_large_ids(kind):  # LightGBM#1359
    _, rows = rows_of([2**31, 2**40, -1, 0], vocabulary=kind, rows=1 << 16)
    assert len(set(rows)) == 4
    unsigned = pa.array([2**63 + 5, 5, 2**63], pa.uint64())
    found, _ = fingerprints("id", unsigned, "int")
    assert len(set(found.tolist())) == 3
    assert found[0] == np.uint64(0x9EF73A35C6D63AF5).astype(np.int64)


def test_null_unseen_and_rare_are_three_things():
    vocabulary = Vocabulary.empty(Id(name="id", min_count=2, rows=1 << 12))
    vocabulary.observe(*fingerprints("id", pa.array([1, 1, 2, None]), "int"))
    rows = vocabulary.encode(*fingerprints("id", pa.array([1, 2, 3, None]), "int"))[:, 0]
    assert rows[0] >= SPECIAL
    assert rows[1:].tolist() == [RARE, UNSEEN, NULL]


def test_a_column_of_only_minus_one_is_an_id():  # LightGBM#3453
    _, rows = rows_of([-1, -1, -1])
    assert len(set(rows)) == 1
    assert rows[0] >= SPECIAL


def test_a_full_table_keeps_the_frequent_ids():  # torchrec#2735
    ids = [i for i in range(10) for _ in range(i + 1)]
    vocabulary, _ = rows_of(ids, vocabulary="static", rows=SPECIAL + 4)
    rows = vocabulary.encode(*fingerprints("id", pa.array(range(11)), "int"))[:, 0]
    assert (rows[:6] == RARE).all()
    assert sorted(rows[6:10]) == [3, 4, 5, 6]
    assert rows[10] == UNSEEN
    assert vocabulary.summary() == {"rows": 7, "rows_used": 4, "ids_known": 10, "ids_rare": 6}


def test_eviction_frees_rows_that_new_ids_get():
    vocabulary, _ = rows_of([1, 1, 1, 2, 2, 3], vocabulary="static", rows=SPECIAL + 3)
    freed = vocabulary.evict(1)
    assert len(freed) == 2
    fresh = vocabulary.observe(*fingerprints("id", pa.array([7] * 9), "int"))
    assert set(fresh) <= set(freed)
    rows = vocabulary.encode(*fingerprints("id", pa.array([1, 7]), "int"))[:, 0]
    assert rows.min() >= SPECIAL
    with pytest.raises(ValueError, match="no owners"):
        Vocabulary.empty(Id(name="id")).evict(1)


def test_strings_and_integers_are_different_ids():
    integer, _ = fingerprints("id", pa.array([1]), "int")
    text, _ = fingerprints("id", pa.array(["1"]), "string")
    assert integer[0] != text[0]
    with pytest.raises(ValueError, match="expected strings"):
        fingerprints("id", pa.array([1]), "string")
    with pytest.raises(ValueError, match="expected integers"):
        fingerprints("id", pa.array(["1"]), "int")


def test_every_arrow_form_of_a_string_gives_the_same_id():
    plain = pa.array(["a", None, "bc", ""])
    expected = fingerprints("id", plain, "string")
    forms = [
        plain.cast(pa.large_string()),
        pa.array(plain.to_pylist(), pa.string_view()),
        plain.dictionary_encode(),
        pa.concat_arrays([pa.array(["x"]), plain])[1:],
        pa.chunked_array([plain.slice(0, 2), plain.slice(2)]).combine_chunks(),
    ]
    for form in forms:
        found = fingerprints("id", form, "string")
        assert found[0].tolist() == expected[0].tolist()
        assert found[1].tolist() == expected[1].tolist()


def test_every_arrow_form_of_an_integer_gives_the_same_id():
    from decimal import Decimal

    expected = fingerprints("id", pa.array([5, None, 7]), "int")[0].tolist()
    for kind in (pa.int8(), pa.uint16(), pa.uint64(), pa.int64()):
        assert fingerprints("id", pa.array([5, None, 7], kind), "int")[0].tolist() == expected
    decimals = pa.array([Decimal(5), None, Decimal(7)], pa.decimal128(20, 0))
    assert fingerprints("id", decimals, "int")[0].tolist() == expected


def test_the_same_fingerprints_under_any_hash_seed():  # gensim#2859
    golden = np.array([0x397E9D3A76AF7C81, 0x29964875BFE3CB55], np.uint64).view(np.int64).tolist()
    code = (
        "import pyarrow as pa; from lirank.schema.hashing import fingerprints\n"
        "print(fingerprints('x', pa.array(['user-42', 'Grüße']), 'string')[0].tolist())"
    )
    seed = "1" if os.environ.get("PYTHONHASHSEED") == "0" else "0"  # another one than that of this process
    found = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert found == f"{golden}\n"
    assert fingerprints("x", pa.array(["user-42", "Grüße"]), "string")[0].tolist() == golden


def test_derived_hashes_equal_those_of_the_operator():
    import torch
    from core_tensor.ops.stable_hash import stable_hash

    rows = 1003
    expected = stable_hash(torch.arange(50), moduli=(rows - SPECIAL,) * 3).numpy() + SPECIAL
    found = hash_rows(fingerprints("x", pa.array(range(50)), "int")[0], rows, 3)
    assert np.array_equal(found, expected)


def test_combined_keys_do_not_collide_by_concatenation():
    a, b = (fingerprints("x", pa.array(v), "int")[0] for v in ([1, 2, 1], [2, 1, 2]))
    pairs = combined([a, b])
    assert pairs[0] == pairs[2]
    assert pairs[0] != pairs[1]


@pytest.mark.slow
def test_25_million_strings_are_saved_and_loaded_in_seconds(tmp_path):  # tensorflow#57741
    import time

    from lirank.features.prepare import load_encoder, save_encoder

    encoder = Encoder(
        parse_schema("features: [{kind: id, name: u, vocabulary: static, rows: 25000003}]\nlabels: [{name: a}]")
    )
    vocabulary = encoder.vocabularies["u"]
    vocabulary.observe(np.arange(25_000_000, dtype=np.int64) * 7919, np.zeros(25_000_000, bool))
    start = time.process_time()
    save_encoder(encoder, tmp_path / "e.safetensors")
    found = load_encoder(tmp_path / "e.safetensors")
    assert time.process_time() - start < 30
    assert len(found.vocabularies["u"].keys) == 25_000_000


# --- columns


def test_lists_of_every_form():
    plain = pa.array([[1, 2], [], None, [3]])
    for form in (plain, plain.cast(pa.large_list(pa.int64())), plain.slice(0)):
        values, offsets = as_lists("x", form)
        assert values.to_pylist() == [1, 2, 3]
        assert offsets.tolist() == [0, 2, 2, 2, 3]
    values, offsets = as_lists("x", plain.slice(1, 3))
    assert (values.to_pylist(), offsets.tolist()) == ([3], [0, 0, 0, 1])
    fixed = pa.array([[1, 2], [3, 4]], pa.list_(pa.int64(), 2))
    assert as_lists("x", fixed)[1].tolist() == [0, 2, 4]
    with pytest.raises(ValueError, match="expected lists"):
        as_lists("x", pa.array([1]))


def test_times_and_numbers():
    import datetime as dt

    stamps = pa.array([dt.datetime(2026, 1, 1), dt.datetime(2026, 1, 2)], pa.timestamp("ms"))
    assert np.diff(as_times("t", stamps)).tolist() == [86_400_000]
    with pytest.raises(ValueError, match="row 1 is null"):
        as_times("t", pa.array([1, None]))
    with pytest.raises(ValueError, match="expected integers or timestamps"):
        as_times("t", pa.array([1.5]))
    with pytest.raises(ValueError, match="expected numbers"):
        as_float("x", pa.array(["a"]))
    assert as_float("x", pa.array([True, None])).tolist()[0] == 1.0


def test_columns_of_several_chunks_and_dictionaries():
    first, second = pa.array(["a", "b"]).dictionary_encode(), pa.array(["b", "c"]).dictionary_encode()
    table = pa.table({"x": pa.chunked_array([first, second])})
    assert column_of(table, "x").to_pylist() == ["a", "b", "b", "c"]


def test_statistics_do_not_depend_on_the_blocks():
    values = np.random.default_rng(0).normal(3, 2, 200_000)
    whole, pieces = DenseStatistics(), DenseStatistics()
    whole.observe(values)
    for piece in np.array_split(values, 37):
        pieces.observe(piece)
    assert pieces.mean == pytest.approx(values.mean(), rel=1e-12)
    assert pieces.deviation == pytest.approx(values.std(), rel=1e-9)
    assert np.abs(pieces.knots() - np.quantile(values, (np.arange(64) + 0.5) / 64)).max() < 0.2
    assert len(pieces.sample) <= 1 << 16


def test_quotient_and_remainder_tell_ids_apart():
    feature = Id(name="u", vocabulary="qr", rows=2 * 150 + SPECIAL)
    ids = fingerprints("u", pa.array(range(5000)), "int")[0]
    rows = quotient_rows(ids, feature.rows)
    assert rows.min() >= SPECIAL
    assert rows[:, 0].max() < SPECIAL + 150 <= rows[:, 1].min()
    assert rows.max() < feature.rows
    shared = len(ids) - len(np.unique(rows, axis=0))
    expected = len(ids) - 150**2 * (1 - (1 - 1 / 150**2) ** len(ids))  # 5000 balls into m**2 boxes
    assert abs(shared - expected) < 5 * np.sqrt(expected)
    # with whole numbers below m**2 in place of fingerprints, none share both
    assert len(np.unique(quotient_rows(np.arange(150**2), feature.rows), axis=0)) == 150**2
    vocabulary = Vocabulary.empty(feature)
    vocabulary.observe(ids[:40], np.zeros(40, bool))
    assert np.array_equal(vocabulary.encode(ids[:40], np.zeros(40, bool)), rows[:40])
    unseen = vocabulary.encode(ids[40:], np.zeros(4960, bool))
    assert (unseen == UNSEEN).all(1).mean() > 0.8
    assert (vocabulary.encode(ids[:1], np.ones(1, bool)) == NULL).all()
