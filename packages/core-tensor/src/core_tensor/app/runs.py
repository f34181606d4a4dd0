"""Run folders: one run per folder, which records its inputs, resumes after a kill, and is never overwritten silently.

    with RunFolder.claim(out, "frechet-gan train", inputs, overwrite=overwrite) as run:
        if run.result is None:
            ...                                # resume from what run.path holds, else start
            run.finish({"fd": 12.3})

`run.json` in the folder holds the command, all its inputs (options, data digests, version) and, at the end, the result.
"""

import dataclasses
import fcntl
import importlib.metadata
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from core_tensor.app.files import is_partial, naming, read_json, sweep, write_json
from core_tensor.app.ranks import ALONE, Ranks

RECORD = "run.json"
"""File with which a folder says which run it holds."""


@dataclasses.dataclass
class RunFolder:
    """A folder that holds one run, claimed by this process.

    Attributes:
        path: The folder.
        command: The command that writes here, such as `"msam compare"`.
        inputs: All that the result depends on.
        resumed: Whether an earlier process has begun this run.
        result: What `finish` recorded; None for a run that is not finished.
        ranks: The processes that share the run; only rank 0 writes the record.
    """

    path: Path
    command: str
    inputs: dict[str, Any]
    resumed: bool
    result: dict[str, Any] | None
    ranks: Ranks = ALONE

    @classmethod
    @contextmanager
    def claim(
        cls,
        path: str | os.PathLike[str],
        command: str,
        inputs: Mapping[str, Any],
        *,
        overwrite: bool = False,
        ranks: Ranks = ALONE,
    ) -> Iterator["RunFolder"]:
        """Take a folder for a run, or take up the same run again; other processes are kept out until the end.

        Args:
            path: The folder; it is created.
            command: The command; the version of the distribution that its first word names counts as an input.
            inputs: All that the result depends on and that may not change between two processes of one run, as plain
                values, dataclasses, paths; data as `files.digest`. Numbers of threads and the like stay out.
            overwrite: Delete the run that the folder holds, whatever its inputs.
            ranks: The processes that share the run: rank 0 claims the folder for all.

        Yields:
            The claimed folder.

        Raises:
            ValueError: If the folder holds another run or something else, or another process is using it.
            OSError: If the folder cannot be made or read.
        """
        folder, wanted = Path(path), _plain({"version": _version(command), **inputs})
        lock, found = _claim_for_all(folder, command, wanted, overwrite, ranks)
        try:
            run = cls(folder, command, wanted, found is not None, (found or {}).get("result"), ranks)
            with naming(folder):
                if found is None:
                    run._record()
                yield run
        finally:
            if lock is not None:
                os.close(lock)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Record that the run is complete.

        Args:
            result: Plain values that the command prints, also when it is called again.
        """
        self.result = _plain(result)
        self._record()

    def _record(self) -> None:
        if self.ranks.first:
            write_json(self.path / RECORD, {"command": self.command, "inputs": self.inputs, "result": self.result})


def _claim_for_all(
    folder: Path, command: str, inputs: dict[str, Any], overwrite: bool, ranks: Ranks
) -> tuple[int | None, dict[str, Any] | None]:
    """Lock and prepare the folder on rank 0; every rank gets what it holds, or the error."""
    lock, failure, found = None, None, None
    if ranks.first:
        try:
            lock = _lock(folder)
            found = _prepare(folder, command, inputs, overwrite)
        except (OSError, ValueError) as error:
            failure = error  # goes to every rank, or the others would wait for ever
    failure, found = ranks.share((failure, found))
    if failure is not None:
        if lock is not None:
            os.close(lock)
        raise failure
    return lock, found


def _version(command: str) -> str:
    """Version of the distribution that a command belongs to."""
    try:
        return importlib.metadata.version(command.split()[0])
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _lock(folder: Path) -> int:
    """Keep other processes out of a folder; the lock goes with the process, so a kill leaves none."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if isinstance(error, BlockingIOError):
            raise ValueError(
                f"{folder}: another process is writing here; wait for it or choose another folder"
            ) from error
        raise
    return handle


def _prepare(folder: Path, command: str, inputs: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """Clean up after killed processes and compare the run that a folder holds with the one that is wanted."""
    sweep(folder)
    record = folder / RECORD
    if not record.exists():
        if any(not is_partial(entry) for entry in folder.iterdir()):
            raise ValueError(f"{folder}: expected an empty folder or one of an earlier run, found other files in it")
        return None
    if overwrite:
        for entry in folder.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        return None
    found = read_record(folder)
    advice = "choose another folder, or start anew with --overwrite"
    if found["command"] != command:
        raise ValueError(f"{folder}: holds a run of `{found['command']}`; {advice}")
    changes = _differences(found["inputs"], inputs)
    if changes:
        raise ValueError(f"{folder}: holds a run with other inputs ({'; '.join(changes)}); {advice}")
    return found


def read_record(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What a run folder says about its run.

    Args:
        folder: The folder.

    Returns:
        `command`, `inputs` and `result` (None for a run that is not finished).

    Raises:
        ValueError: If the folder holds no run, or its record is broken.
    """
    record = Path(folder) / RECORD
    if not record.exists():
        raise ValueError(f"{folder}: expected the folder of a run, found no {RECORD} in it")
    found = read_json(record)
    kinds = {"command": str, "inputs": dict, "result": dict | None}
    if not isinstance(found, dict) or any(
        name not in found or not isinstance(found[name], kind) for name, kind in kinds.items()
    ):
        raise ValueError(f"{record}: expected the record of a run (command, inputs, result)")
    return found


def _differences(then: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Each input that differs, by its dotted name, as it was and as it is."""
    found = []
    for name in dict.fromkeys([*then, *now]):
        before, after = then.get(name), now.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            found += _differences(before, after, f"{prefix}{name}.")
        elif before != after:
            found.append(f"{prefix}{name}: {_short(before)} then, {_short(after)} now")
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _plain(value: Any) -> Any:
    """A value as JSON holds it; infinities and NaN become text, since JSON has none."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item"):  # a number of numpy or torch
        return _plain(value.item())
    return str(value)
