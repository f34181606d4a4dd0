"""The harness itself; `tools/hostile.py` runs it over all operators and readers."""

import importlib.util
import json
import random
import time
from pathlib import Path

import core_tensor
import numpy as np
import pytest
import torch
from core_tensor.dev.hostile import Reader, hostile_calls, hostile_files, outcome
from core_tensor.dev.spoiled_arguments import mutate
from core_tensor.dev.spoiled_files import mutate_file


def _operators():
    spec = importlib.util.spec_from_file_location("operators", Path(__file__).with_name("operators.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.OPERATORS


def test_every_public_operator_has_a_case():
    assert set(_operators()) == set(core_tensor.__all__) - {"BlockData", "backends"}


@pytest.mark.parametrize("name", sorted(_operators()))
def test_no_spoiled_argument_ends_in_anything_but_a_clear_error(name):
    assert [str(failure) for failure in hostile_calls(name, _operators()[name], 25, 10)] == []


def _write(folder):
    (folder / "data").mkdir()
    (folder / "data" / "a.json").write_text(json.dumps({"n": 3, "rows": [1, 2]}))
    np.savez(folder / "data" / "b.npz", x=np.arange(4.0))
    return folder / "data"


def test_a_careless_reader_is_found_and_its_seed_repeats_the_case(tmp_path):
    def careless(path):
        return json.loads((path / "a.json").read_text())["rows"][1] + 1

    (tmp_path / "one").mkdir()
    found = list(hostile_files(Reader("careless", _write, careless), tmp_path / "one", 80, 0))
    assert any("KeyError" in failure.error for failure in found)
    assert all(failure.name == "careless" for failure in found)
    (tmp_path / "two").mkdir()
    again = list(hostile_files(Reader("careless", _write, careless), tmp_path / "two", 1, found[0].seed))
    assert again == found[:1]


def test_a_reader_of_invalid_files_is_no_reader(tmp_path):
    def refuses(path):
        raise ValueError("never")

    with pytest.raises(ValueError, match="never"):
        list(hostile_files(Reader("refuses", _write, refuses), tmp_path, 1, 0))


def test_outcomes():
    def fails(error):
        raise error

    assert outcome(lambda: None) is None
    assert outcome(lambda: fails(ValueError("x: expected a number"))) is None
    assert outcome(lambda: fails(ValueError(""))) == "ValueError without a message"
    assert outcome(lambda: fails(KeyError("x"))) == "KeyError: 'x'"
    assert outcome(lambda: fails(RuntimeError("boom"))) == "RuntimeError: boom"
    assert outcome(lambda: time.sleep(5), seconds=1) == "RuntimeError: took more than 1 s"


@pytest.mark.parametrize(
    "suffix", [".json", ".jsonl", ".csv", ".npy", ".npz", ".bin", ".safetensors", ".parquet", ".arrow"]
)
def test_every_format_is_spoiled_and_the_same_seed_spoils_it_in_the_same_way(tmp_path, suffix):
    path = tmp_path / f"file{suffix}"

    def write():
        rows = {"a": [1, 2, 3], "b": [0.5, 1.5, 2.5]}
        if suffix == ".json":
            path.write_text(json.dumps(rows))
        elif suffix == ".jsonl":
            path.write_text('{"a": 1}\n{"a": 2}\n')
        elif suffix == ".csv":
            path.write_text("a,b\n1,2\n3,4\n")
        elif suffix == ".npy":
            np.save(path, np.arange(6).reshape(2, 3))
        elif suffix == ".npz":
            np.savez(path, a=np.arange(3), b=np.ones((2, 2)))
        elif suffix == ".bin":
            path.write_bytes(bytes(range(100)))
        elif suffix == ".safetensors":
            tensors = pytest.importorskip("safetensors.numpy")
            tensors.save_file({"a": np.arange(3), "b": np.ones((2, 2))}, path)
        else:
            pa = pytest.importorskip("pyarrow")
            table = pa.table(rows)
            if suffix == ".parquet":
                pytest.importorskip("pyarrow.parquet").write_table(table, path)
            else:
                with pa.ipc.new_file(path, table.schema) as sink:
                    sink.write_table(table)

    write()
    valid, different = path.read_bytes(), 0
    for seed in range(60):
        write()
        mutate_file(path, random.Random(seed))
        once = path.read_bytes()
        different += once != valid
        if suffix != ".npz":  # a zip file holds the time
            write()
            mutate_file(path, random.Random(seed))
            assert path.read_bytes() == once
    assert different > 40


def test_arguments_of_every_kind_are_spoiled():
    data = core_tensor.BlockData(
        torch.tensor([0, 1]), torch.zeros(1, dtype=torch.int32), torch.ones(1), None, torch.ones(1)
    )
    for value in (torch.ones(2, 3), torch.arange(4), 3, 0.5, True, None, [torch.ones(2), torch.ones(2)], (1, 2), data):
        for seed in range(40):
            mutate(value, random.Random(seed))
