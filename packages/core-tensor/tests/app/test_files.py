import hashlib
import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from core_tensor.app.files import (
    atomic_path,
    digest,
    naming,
    read_json,
    read_npz,
    reading,
    reserve,
    sha256,
    sweep,
    write_buffered,
    write_json,
    write_text,
)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a" / "result.json"
    write_json(path, {"x": 1})

    def fail():
        with atomic_path(path) as temporary:
            assert temporary.suffix == ".json"
            temporary.write_text("half")
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        fail()
    assert json.loads(path.read_text()) == {"x": 1}
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]


def test_the_written_file_follows_the_umask(tmp_path):
    umask = os.umask(0o027)
    try:
        write_text(tmp_path / "x", "text")
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


def test_json_refuses_nan_and_names_a_broken_file(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "x.json", float("nan"))
    assert not list(tmp_path.iterdir())
    (tmp_path / "y.json").write_text("{")
    with pytest.raises(ValueError, match=r"y\.json: expected a JSON file"):
        read_json(tmp_path / "y.json")


def test_sha256(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256(tmp_path / "x") == hashlib.sha256(b"abc").hexdigest()


def test_a_reader_matches_no_file_in_the_making(tmp_path):
    with atomic_path(tmp_path / "part.parquet") as temporary:
        temporary.write_bytes(b"half")
        assert temporary.name == "part.parquet"
        assert not list(tmp_path.glob("*.parquet"))
    assert [p.name for p in tmp_path.iterdir()] == ["part.parquet"]


def test_sweep_leaves_live_processes_and_other_machines_alone(tmp_path):
    with atomic_path(tmp_path / "x") as temporary:
        live = temporary.parent.name
        (tmp_path / live.replace(f"-{os.getpid()}-", f"-{2**22 + 1}-")).mkdir()  # above the largest process id
        (tmp_path / ".partial-elsewhere-1-abc").mkdir()
        assert sweep(tmp_path) == 1
        temporary.write_text("done")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".partial-elsewhere-1-abc", "x"]
    assert sweep(tmp_path / "absent") == 0


def test_the_first_write_into_a_folder_removes_what_killed_processes_left_there(tmp_path):
    with atomic_path(tmp_path / "a" / "x") as temporary:
        live = temporary.parent.name
        temporary.write_text("done")
    (tmp_path / "b" / live.replace(f"-{os.getpid()}-", f"-{2**22 + 1}-")).mkdir(parents=True)
    write_text(tmp_path / "b" / "y", "done")
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["y"]


def test_a_writer_that_no_full_disk_may_meet_writes_into_memory(tmp_path):
    tensor = torch.arange(3.0)

    def save(file):
        torch.save(tensor, file)
        assert not list(tmp_path.iterdir())  # nothing has reached the disk yet

    write_buffered(tmp_path / "x.pt", save)
    assert torch.equal(torch.load(tmp_path / "x.pt", weights_only=True), tensor)
    with pytest.raises(AssertionError):  # there is a file now
        write_buffered(tmp_path / "y.pt", save)
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


@pytest.mark.parametrize("keep", [0, 1, 30, 200])
def test_a_truncated_npz_is_named(tmp_path, keep):
    np.savez_compressed(tmp_path / "a.npz", x=np.arange(1000.0))
    data = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(data[:keep])
    with pytest.raises(ValueError, match=r"a\.npz: expected an npz file"):
        read_npz(tmp_path / "a.npz")


def test_npz_names_what_is_missing_and_never_unpickles(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.arange(3))
    assert read_npz(tmp_path / "a.npz", "x")["x"].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="no array y; it has x"):
        read_npz(tmp_path / "a.npz", "y")
    np.save(tmp_path / "b.npy", np.arange(3))
    with pytest.raises(ValueError, match="expected an npz file"):
        read_npz(tmp_path / "b.npy")
    np.savez(tmp_path / "c.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match=r"c\.npz: expected"):
        read_npz(tmp_path / "c.npz")
    with pytest.raises(FileNotFoundError):
        read_npz(tmp_path / "absent.npz")


def test_reading_passes_bugs_and_errors_of_the_system_through(tmp_path):
    with pytest.raises(AssertionError), reading("x", "anything"):
        raise AssertionError
    with pytest.raises(FileNotFoundError), reading("x", "anything"):
        open(tmp_path / "absent")  # noqa: PTH123, SIM115
    with pytest.raises(ValueError, match=r"^x: expected a policy \(KeyError: 'price'\)$"), reading("x", "a policy"):
        {}["price"]
    with pytest.raises(ValueError, match=r"^x: column 3$"), reading("x", "a policy"):
        raise ValueError("x: column 3")


def test_a_digest_knows_values_shapes_and_kinds_but_not_layouts(tmp_path):
    x = torch.arange(6.0).reshape(2, 3)
    assert digest(x) == digest(x.numpy()) == digest(x.T.contiguous().T)
    different = [
        x,
        x.T,
        x.double(),
        x.reshape(3, 2),
        x + 1,
        None,
        "x",
        b"x",
        0,
        0.0,
        False,
        torch.zeros(0),
        torch.tensor(0.0),
    ]
    different += [torch.zeros(3, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.bool)]
    assert len({digest(part) for part in different}) == len(different)
    assert digest("ab", "c") != digest("a", "bc")
    for name, text in (("a", "1"), ("b/c", "2")):
        write_text(tmp_path / name, text)
    before = digest(tmp_path)
    assert digest(tmp_path) == before
    (tmp_path / "b" / "c").rename(tmp_path / "b" / "d")
    assert digest(tmp_path) != before
    with pytest.raises(TypeError, match="got list"):
        digest([1])
    with pytest.raises(TypeError, match="Python objects"):
        digest(np.array([{}]))


def test_a_full_disk_says_which_file_it_was(tmp_path):
    def fill():
        with atomic_path(tmp_path / "big.npz"), open("/dev/full", "wb") as full:  # noqa: PTH123
            full.write(b"x" * 100_000)

    with pytest.raises(OSError, match=r"No space left on device: .*big\.npz"):
        fill()
    assert not list(tmp_path.iterdir())


def test_room_is_taken_before_a_file_is_mapped(tmp_path):
    reserve(tmp_path / "new", 10_000)
    assert (tmp_path / "new").stat().st_size == 10_000
    assert (tmp_path / "new").stat().st_blocks * 512 >= 10_000  # no hole that a full disk could not fill later
    np.save(tmp_path / "a.npy", np.arange(5))
    size = (tmp_path / "a.npy").stat().st_size
    reserve(tmp_path / "a.npy", size)
    assert np.load(tmp_path / "a.npy").tolist() == [0, 1, 2, 3, 4]


def test_naming_keeps_the_name_that_an_error_has(tmp_path):
    with pytest.raises(OSError, match=r"\[Errno 28\] No space left on device: 'here'"), naming("here"):
        raise OSError(28, "whatever")
    with pytest.raises(FileNotFoundError, match="there"), naming("here"):
        Path("there").read_text()
    with pytest.raises(OSError, match="no number"), naming("here"):
        raise OSError("no number")
