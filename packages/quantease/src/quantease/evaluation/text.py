"""Calibration and evaluation text, and the token windows cut from it."""

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from core_tensor.app.extras import require
from core_tensor.app.files import reading
from core_tensor.checks import check_choice, check_number
from torch import Tensor

CHATS = ("messages", "conversations")
"""Columns that hold a chat: turns with role and content, or with from and value as ShareGPT has them."""


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


def read_text(
    paths: Sequence[str | Path],
    column: str = "text",
    limit: int | None = None,
    *,
    tokenizer: Any = None,
    stream_limit: int | None = None,
) -> str:
    """Read text, Parquet or JSON Lines files, or a dataset of the Hugging Face hub (`hf:name[:config[:split]]`).

    Args:
        paths: Files in order; `.parquet`, `.jsonl` and `.json` (a list of rows, or a row per line) hold one text or one
            chat per row, anything else is UTF-8 text.
        column: Column or key of the text. Rows without it that have `messages` (or `conversations`, as ShareGPT) are
            chats, which the tokenizer's template turns into text.
        limit: Stop after this many characters; None reads all.
        tokenizer: Tokenizer with a chat template; needed for chats.
        stream_limit: The same for each data set of the hub, which is streamed; None is `limit`.

    Returns:
        The texts joined by blank lines.

    Raises:
        ValueError: If a file is not UTF-8, a row has neither text nor chat (the file and line are named), or there is
            no text at all.
    """
    pieces: list[str] = []
    size = 0
    for path in map(str, paths):
        most = stream_limit if path.startswith("hf:") and stream_limit is not None else None
        taken = 0
        for where, row in _rows(path, column):
            piece = row if isinstance(row, str) else _row_text(where, row, column, tokenizer)
            pieces.append(piece)
            size, taken = size + len(piece) + 2, taken + len(piece) + 2
            if (limit is not None and size >= limit) or (most is not None and taken >= most):
                break
        if limit is not None and size >= limit:
            break
    text = "\n\n".join(pieces)[:limit]
    if not text.strip():
        raise ValueError(f"text: expected some text, got none from {', '.join(map(str, paths)) or 'no file'}")
    return text


def _rows(path: str, column: str) -> Iterator[tuple[str, str | dict[str, Any]]]:
    """Rows of a file (or all of a text) and where each is, read as they are asked for."""
    if path.startswith("hf:"):
        name, *rest = path[3:].split(":")
        config, part = (*rest, None, None)[:2]
        rows = require("datasets", "datasets").load_dataset(name, config or None, split=part or "train", streaming=True)
        yield from ((f"{path}, row {number}", dict(row)) for number, row in enumerate(rows, 1))
    elif path.endswith(".parquet"):
        parquet = require("pyarrow.parquet", "quantease[parquet]")
        with reading(path, "a Parquet file"):
            file = parquet.ParquetFile(path)
            names = [name for name in (column, *CHATS) if name in file.schema_arrow.names]
            if not names:
                raise ValueError(f"{path}: expected a column {column!r}, got {', '.join(file.schema_arrow.names)}")
            number = 0
            for batch in file.iter_batches(columns=names[:1]):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    else:
        with reading(path, "UTF-8 text"):
            text = Path(path).read_text(encoding="utf-8-sig")
        if not path.endswith((".jsonl", ".json")):
            yield path, text
            return
        for where, line in _json_rows(path, text):
            with reading(where, "a JSON object"):
                row = json.loads(line) if isinstance(line, str) else line
            if not isinstance(row, dict):
                raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}")
            yield where, row


def _json_rows(path: str, text: str) -> Iterator[tuple[str, Any]]:
    """Rows of a list, or lines that hold one each, and where each is."""
    if path.endswith(".json") and text.lstrip().startswith("["):
        with reading(path, "a JSON list"):
            rows = json.loads(text)
        yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))
    else:
        yield from ((f"{path}:{number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def _row_text(where: str, row: Mapping[str, Any], column: str, tokenizer: Any) -> str:
    """The text of a row, or of its chat."""
    if column in row:
        if not isinstance(row[column], str):
            raise ValueError(f"{where}: expected text in {column!r}, got {type(row[column]).__name__}")
        return str(row[column])
    chat = next((row[name] for name in CHATS if name in row), None)
    if chat is None:
        raise ValueError(f"{where}: expected a column {column!r}, got {', '.join(map(str, row)) or 'none'}")
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"{where}: is a chat, but the model's tokenizer has no chat template")
    try:
        return str(tokenizer.apply_chat_template([_message(turn) for turn in chat], tokenize=False))
    except Exception as error:  # templates are programs that come with the model
        raise ValueError(f"{where}: the chat template cannot render its messages ({error})") from error


def _message(turn: Mapping[str, Any]) -> Mapping[str, Any]:
    """A turn as templates expect it; ShareGPT names its parts otherwise."""
    if "role" in turn or "from" not in turn:
        return turn
    roles = {"human": "user", "gpt": "assistant"}
    return {"role": roles.get(turn["from"], turn["from"]), "content": turn["value"]}


def first_token(tokenizer: Any, bos: str = "auto") -> int | None:
    """The beginning-of-text token that precedes every window.

    Args:
        tokenizer: A transformers tokenizer.
        bos: `auto` where the tokenizer itself puts one before a text, `yes` or `no`.

    Returns:
        Its id, or None for none.

    Raises:
        ValueError: If one is wanted and the tokenizer has none.
    """
    check_choice("bos", bos, ("auto", "yes", "no"))
    token: int | None = getattr(tokenizer, "bos_token_id", None)
    if bos == "no" or (bos == "auto" and token is None):
        return None
    if token is None:
        raise ValueError("bos: expected a tokenizer with a beginning-of-text token, got one without")
    return token if bos == "yes" or tokenizer("a", verbose=False)["input_ids"][:1] == [token] else None


def windows(tokenizer: Any, text: str, length: int, count: int | None = None, *, bos: str = "auto") -> Tensor:
    """Cut a text into consecutive token windows from its start.

    Args:
        tokenizer: A transformers tokenizer.
        text: The text.
        length: Tokens per window.
        count: Number of windows; None takes all complete ones.
        bos: Whether every window begins with the beginning-of-text token; see `first_token`.

    Returns:
        Token ids, shape (count, length), int64.

    Raises:
        ValueError: If the text is too short.
    """
    check_number("length", length, low=2, integer=True)
    first = first_token(tokenizer, bos)
    body = length - (first is not None)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    available = len(ids) // body
    count = available if count is None else count
    if not 1 <= count <= available:
        raise ValueError(
            f"text: expected at least {max(count, 1) * body} tokens for {max(count, 1)} windows of {length}, "
            f"got {len(ids)}"
        )
    return _led(torch.tensor(ids[: count * body], dtype=torch.int64).reshape(count, body), first)


def sample_windows(
    tokenizer: Any, text: str, length: int, count: int, other: int = 0, *, seed: int = 0, bos: str = "auto"
) -> tuple[Tensor, Tensor | None]:
    """Token windows spread over a whole text at random, and others that share nothing with them.

    The text is cut into as many parts as there are windows, each of which gives one from a random place of it. Only
    what the windows need is tokenized.

    Args:
        tokenizer: A transformers tokenizer.
        text: The text.
        length: Tokens per window.
        count: Number of windows.
        other: Number of further windows, spread evenly.
        seed: Of the places.
        bos: Whether every window begins with the beginning-of-text token; see `first_token`.

    Returns:
        Token ids, shapes (count, length) and (other, length), int64; None for no further windows.

    Raises:
        ValueError: If the text is too short.
    """
    check_number("length", length, low=2, integer=True)
    check_number("count", count, low=1, integer=True)
    check_number("other", other, low=0, integer=True)
    first, generator = first_token(tokenizer, bos), random.Random(seed)
    body, parts = length - (first is not None), count + other
    evaluates = {round((i + 0.5) * parts / other - 0.5) for i in range(other)} if other else set[int]()
    found: tuple[list[list[int]], list[list[int]]] = ([], [])
    for part in range(parts):
        piece = text[len(text) * part // parts : len(text) * (part + 1) // parts]
        place = piece.find(" ", generator.randrange(max(1, len(piece) - 16 * body))) + 1
        ids = tokenizer(piece[place : place + 16 * body], add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) < body:
            ids = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) < body:
            raise ValueError(
                f"text: expected at least {parts * body} tokens for {parts} windows of {length}, got about "
                f"{parts * len(ids)}"
            )
        found[part in evaluates].append(ids[:body])
    chosen, others = (torch.tensor(ids, dtype=torch.int64).reshape(-1, body) for ids in found)
    return _led(chosen, first), _led(others, first) if other else None


def _led(ids: Tensor, first: int | None) -> Tensor:
    return ids if first is None else torch.nn.functional.pad(ids, (1, 0), value=first)
