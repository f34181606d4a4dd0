import hashlib
import json
import os
import stat

import pytest
from core_tensor.app.files import atomic_path, read_json, sha256, write_json, write_text


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
