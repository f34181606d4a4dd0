"""What the scripts of this folder share: options, and the scores of finished runs, so that a killed script goes on."""

import argparse
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from core_tensor.app.files import atomic_path, digest, read_json, write_json

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Study:
    """A script's options.

    Attributes:
        quick: Whether a small form of everything is asked for, which proves that it runs and no more.
        out: Folder of JSON and pictures.
        cache: Folder of scores of finished runs; delete it after a change of the code.
        seeds: Repetitions.
        only: Names of the parts to run; empty for all.
    """

    quick: bool
    out: Path
    cache: Path
    seeds: int
    only: tuple[str, ...]

    def scores(self, key: Mapping[str, Any], run: Callable[[], np.ndarray]) -> np.ndarray:
        """What `run` returns, or returned when it last ran under the same key.

        Args:
            key: Everything that decides the result, as JSON types; `name` is for people.
            run: Makes the scores.

        Returns:
            The scores.
        """
        path = self._path(key, ".npy")
        if not path.exists():
            found = run()
            with atomic_path(path) as temporary:
                np.save(temporary, found)
        kept: np.ndarray = np.load(path, allow_pickle=False)
        return kept

    def record(self, key: Mapping[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """`scores` of what JSON can hold.

        Args:
            key: Everything that decides the result, as JSON types; `name` is for people.
            run: Makes the record.

        Returns:
            The record.
        """
        path = self._path(key, ".json")
        if not path.exists():
            write_json(path, run())
        kept: dict[str, Any] = read_json(path)
        return kept

    def _path(self, key: Mapping[str, Any], suffix: str) -> Path:
        name = re.sub(r"\W+", "-", str(key["name"])).strip("-")
        return self.cache / f"{name}-{digest(json.dumps(key, sort_keys=True))[:12]}{suffix}"

    def update(self, name: str, parts: Mapping[str, Any]) -> dict[str, Any]:
        """Write some parts of a JSON file; parts that this call did not run stay as they are.

        Args:
            name: Of the file.
            parts: Values by name.

        Returns:
            The whole file.
        """
        path = self.out / name
        held: dict[str, Any] = read_json(path) if path.exists() else {}
        write_json(path, held | dict(parts))
        return held | dict(parts)


def study(doc: str | None, parts: tuple[str, ...] = (), seeds: int = 5) -> Study:
    """Read the options that every script of this folder has, and set one thread.

    Args:
        doc: The script's docstring.
        parts: What `--only` can name.
        seeds: Repetitions unless told otherwise.

    Returns:
        The options.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed of small logs, under two minutes")
    parser.add_argument("-o", "--out", type=Path, help="folder of JSON and pictures [results/; out/ with --quick]")
    parser.add_argument("--cache", type=Path, default=Path("out/lirank-runs"), help="where finished runs are kept")
    parser.add_argument("--seeds", type=int, default=seeds)
    if parts:
        parser.add_argument("--only", action="append", choices=parts, default=[], help="all if not given")
    options = parser.parse_args()
    torch.set_num_threads(1)
    out = options.out or (Path("out/lirank-quick") if options.quick else RESULTS)
    seeds = min(options.seeds, 1) if options.quick else options.seeds
    return Study(options.quick, out, options.cache, seeds, tuple(getattr(options, "only", ())))
