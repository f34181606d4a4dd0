"""Packed problems: one `.npy` file per array, mapped and never read as a whole, so that a solve streams the disk."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from core_tensor import BlockData
from core_tensor.app.files import read_json, write_json
from numpy.typing import NDArray
from torch import Tensor

from polytope_lp.matching.problem import MatchingProblem

DESCRIPTION = "packed.json"
_BLOCKS = ("offsets", "index", "cost", "coefficient", "cap", "upper", "weight")
_REST = ("budgets", "equality", "bounds")
_KEYS = ("source_keys", "destination_keys")


def is_packed(path: str | Path) -> bool:
    """Whether a folder is one that `pack` wrote.

    Args:
        path: Any path.

    Returns:
        Whether it holds `packed.json`.
    """
    return (Path(path) / DESCRIPTION).is_file()


def pack(path: str | Path, out: str | Path, budgets: str | Path | None = None, **reading: Any) -> MatchingProblem:
    """Turn Parquet into a packed problem; edges sorted by source go from file to file without being held.

    Args:
        path: As in `read_problem`.
        out: Folder to write, which must not exist.
        budgets: As in `read_problem`.
        **reading: Further arguments of `read_problem`.

    Returns:
        The packed problem, mapped.

    Raises:
        ValueError: If the folder exists, or the problem cannot be read.
    """
    from polytope_lp.tables.tables import read_problem

    root = Path(out)
    if root.exists():
        raise ValueError(f"{root}: already exists; choose another folder")
    partial = root.with_name(f"{root.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        mapped: dict[int, tuple[Path, Any]] = {}  # the arrays too: an address must not be given out again

        def allocate(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
            file = partial / f"{name}.npy"
            array = np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape)
            mapped[array.ctypes.data] = file, array
            return array

        problem = read_problem(path, budgets, allocate=allocate, **reading)
        _write(problem, partial, mapped)
        del problem
        partial.rename(root)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return open_packed(root)


def _write(problem: MatchingProblem, folder: Path, mapped: dict[int, tuple[Path, Any]]) -> None:
    arrays = {name: getattr(problem.data, name) for name in _BLOCKS}
    arrays |= {name: getattr(problem, name) for name in _REST}
    for name, array in arrays.items():
        if array is None:
            continue
        held = mapped.get(array.data_ptr())
        if held is not None and held[1].shape == tuple(array.shape) and held[0].exists():
            held[0].rename(folder / f"{name}.npy")
        else:
            np.save(folder / f"{name}.npy", array.numpy())
    for file, _ in mapped.values():  # sorted or stacked into another array
        if file.name != "index.npy":
            file.unlink(missing_ok=True)
    for name in _KEYS:
        keys = getattr(problem, name)
        if keys is not None:
            table = pa.table({"keys": keys})
            with pa.OSFile(str(folder / f"{name}.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
    write_json(
        folder / DESCRIPTION,
        {
            "arrays": {name: list(array.shape) for name, array in arrays.items() if array is not None},
            "equality": problem.data.equality,
            "skipped": problem.skipped,
            "resources": list(problem.resources),
        },
    )


def open_packed(path: str | Path) -> MatchingProblem:
    """Map a packed problem. Its pages are read when they are needed, and may be dropped by the system at any time.

    Args:
        path: Folder that `pack` wrote.

    Returns:
        The problem.

    Raises:
        ValueError: If a file is missing, truncated or foreign.
    """
    root = Path(path)
    try:
        described = read_json(root / DESCRIPTION)
        found = {name: _map(root / f"{name}.npy", shape) for name, shape in described["arrays"].items()}
        keys = {name: _keys(root / f"{name}.arrow") for name in _KEYS}
        data = BlockData(**{name: found.get(name) for name in _BLOCKS}, equality=bool(described["equality"]))  # type: ignore[arg-type]
        budgets = found["budgets"].clone()
        data.check(budgets.shape[0])
    except (KeyError, OSError, TypeError, json.JSONDecodeError, pa.ArrowException) as error:
        raise ValueError(f"{root}: not a packed problem ({error})") from error
    return MatchingProblem(
        data,
        budgets,
        found["equality"].clone(),
        found["bounds"].clone(),
        **keys,
        skipped=int(described["skipped"]),
        resources=tuple(described["resources"]),
    )


def _map(file: Path, shape: list[int]) -> Tensor:
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"{file}: truncated or not an array of a packed problem ({error})") from error
    if list(array.shape) != shape:
        raise ValueError(f"{file}: expected shape {tuple(shape)}, got {array.shape}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has no read-only tensors; nothing here writes to a problem
        return torch.from_numpy(array)


def _keys(file: Path) -> Any:
    if not file.exists():
        return None
    return pa.ipc.open_file(pa.memory_map(str(file))).read_all().column("keys").combine_chunks()
