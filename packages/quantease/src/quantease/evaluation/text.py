"""Calibration and evaluation text, and the token windows cut from it."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from core_tensor.app.extras import require
from core_tensor.checks import check_number
from torch import Tensor


@dataclass(frozen=True)
class TextSplit:
    """A text of which one part calibrates and another evaluates.

    Attributes:
        calibration: First part.
        evaluation: Second part.
        source: Where it came from, for reports.
    """

    calibration: str
    evaluation: str
    source: str

    @property
    def digest(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of both parts."""
        return hashlib.sha256(f"{self.calibration}\0{self.evaluation}".encode()).hexdigest()[:16]


def split(text: str, source: str, calibration: float = 0.5) -> TextSplit:
    """Cut a text in two at the paragraph end nearest to a fraction of it.

    Args:
        text: The whole text.
        source: Where it came from.
        calibration: Fraction of the characters that calibrate, in (0, 1).

    Returns:
        The parts.

    Raises:
        ValueError: If the text is too short to have two parts.
    """
    check_number("calibration", calibration, low=0.0, high=1.0, open_low=True, open_high=True)
    middle = int(len(text) * calibration)
    cut = text.find("\n\n", middle)
    cut = middle if cut == -1 else cut
    if not text[:cut].strip() or not text[cut:].strip():
        raise ValueError(f"text: expected enough of it for two parts, got {len(text)} characters from {source}")
    return TextSplit(text[:cut], text[cut:].lstrip("\n"), source)


def python_topics() -> TextSplit:
    """The Python language reference as `pydoc` carries it: English prose that every installation has.

    Topics alternate between the parts, so both cover the whole reference. Some topics quote others in full: every
    paragraph is kept once, so none is in both parts. The text differs between Python versions; reports name its digest.

    Returns:
        Topics of even and of odd rank by name.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    parts: tuple[list[str], list[str]] = ([], [])
    for rank, name in enumerate(sorted(topics)):
        for paragraph in topics[name].split("\n\n"):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                parts[rank % 2].append(paragraph)
    return TextSplit("\n\n".join(parts[0]), "\n\n".join(parts[1]), "pydoc_data.topics")


def read_text(paths: Sequence[str | Path], column: str = "text", limit: int | None = None) -> str:
    """Read text, Parquet or JSON Lines files, or a dataset of the Hugging Face hub (`hf:name[:config[:split]]`).

    Args:
        paths: Files in order; `.parquet` and `.jsonl` hold one text per row, anything else is UTF-8 text.
        column: Column or key of the text in Parquet, JSON Lines and datasets.
        limit: Stop after this many characters; None reads all.

    Returns:
        The texts joined by blank lines.

    Raises:
        ValueError: If a file is not UTF-8, lacks the column, or there is no text at all.
    """
    pieces: list[str] = []
    size = 0
    for path in paths:
        for piece in _pieces(str(path), column):
            pieces.append(piece)
            size += len(piece) + 2
            if limit is not None and size >= limit:
                break
    text = "\n\n".join(pieces)[:limit]
    if not text.strip():
        raise ValueError(f"text: expected some text, got none from {', '.join(map(str, paths)) or 'no file'}")
    return text


def _pieces(path: str, column: str) -> Sequence[str]:
    if path.startswith("hf:"):
        name, *rest = path[3:].split(":")
        config, part = (*rest, None, None)[:2]
        rows = require("datasets", "datasets").load_dataset(name, config, split=part or "train")
        return _column(path, rows.column_names, column, lambda: rows[column])
    if path.endswith(".parquet"):
        parquet = require("pyarrow.parquet", "quantease[parquet]")
        names = parquet.read_schema(path).names
        return _column(path, names, column, lambda: parquet.read_table(path, columns=[column])[column].to_pylist())
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text ({error.reason} at byte {error.start})") from error
    if not path.endswith(".jsonl"):
        return [text]
    rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    return _column(path, rows[0] if rows else [], column, lambda: [row[column] for row in rows])


def _column(path: str, names: Any, column: str, read: Callable[[], Sequence[str]]) -> Sequence[str]:
    if column not in names:
        raise ValueError(f"{path}: expected a column {column!r}, got {', '.join(names) or 'none'}")
    return read()


def windows(tokenizer: Any, text: str, length: int, count: int | None = None) -> Tensor:
    """Disjoint token windows from the start of a text.

    Args:
        tokenizer: A transformers tokenizer.
        text: The text.
        length: Tokens per window, at least 2.
        count: Number of windows; None takes all that fit.

    Returns:
        Token ids, shape (count, length), int64.

    Raises:
        ValueError: If the text has too few tokens.
    """
    check_number("length", length, low=2, integer=True)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    available = len(ids) // length
    count = available if count is None else count
    if not 1 <= count <= available:
        raise ValueError(
            f"text: expected at least {max(count, 1) * length} tokens for {max(count, 1)} windows of {length}, "
            f"got {len(ids)}"
        )
    return torch.tensor(ids[: count * length], dtype=torch.int64).reshape(count, length)
