"""Packed problems: one `.npy` file per array, mapped and never read as a whole, so that a solve streams the disk."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from core_tensor import BlockData
from core_tensor.app.files import read_json, reading, sha256, write_json
from numpy.typing import NDArray
from torch import Tensor

from polytope_lp.matching.problem import MatchingProblem
from polytope_lp.matching.statistics import Statistics, measure

DESCRIPTION = "packed.json"
_BLOCKS = ("offsets", "index", "cost", "coefficient", "cap", "upper", "weight")
_REST = ("budgets", "equality", "bounds")
_KEYS = ("source_keys", "destination_keys")
_STATISTICS = "statistics-"


def is_packed(path: str | Path) -> bool:
    """Whether a folder is one that `pack` wrote.

    Args:
        path: Any path.

    Returns:
        Whether it holds `packed.json`.
    """
    return (Path(path) / DESCRIPTION).is_file()


def write_packed(problem: MatchingProblem, folder: Path, mapped: dict[int, tuple[Path, NDArray[Any]]]) -> None:
    """Write a problem; `packed.json` comes last, so that a folder without it is incomplete.

    Args:
        problem: The problem.
        folder: Where to.
        mapped: Arrays already in files of the folder, by address: the file and the array.
    """
    arrays = {name: getattr(problem.data, name) for name in _BLOCKS}
    arrays |= {name: getattr(problem, name) for name in (*_REST, "at_least")}
    arrays |= {f"{_STATISTICS}{name}": array for name, array in measure(problem).arrays().items()}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    for name, array in arrays.items():
        held = mapped.get(array.data_ptr())
        if held is not None and held[1].shape == tuple(array.shape) and held[0].exists():
            held[0].rename(folder / f"{name}.npy")
        else:
            np.save(folder / f"{name}.npy", array.numpy())
    for file, _ in mapped.values():  # sorted or stacked into another array
        if file.stem not in arrays:
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
            "arrays": {name: list(array.shape) for name, array in arrays.items()},
            "equality": problem.data.equality,
            "skipped": problem.skipped,
            "resources": list(problem.resources),
            "sha256": {f.name: sha256(f) for f in sorted(folder.iterdir()) if f.suffix in {".npy", ".arrow"}},
        },
    )


def changed_files(path: str | Path) -> list[str]:
    """Files of a packed problem that are not as `pack` wrote them.

    Args:
        path: Folder that `pack` wrote.

    Returns:
        Names.
    """
    root = Path(path)
    with reading(root / DESCRIPTION, "the description of a packed problem"):
        written = dict(read_json(root / DESCRIPTION)["sha256"])
    return [name for name, digest in written.items() if not (root / name).is_file() or sha256(root / name) != digest]


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
    with reading(root / DESCRIPTION, "the description of a packed problem"):
        described = read_json(root / DESCRIPTION)
        shapes = {str(name): [int(n) for n in shape] for name, shape in described["arrays"].items()}
        equality, skipped, resources = described["equality"], described["skipped"], described["resources"]
        if not isinstance(equality, bool) or not isinstance(skipped, int) or not isinstance(resources, list):
            raise ValueError("equality, skipped or resources of another type")
        missing = [name for name in ("offsets", "index", "cost", "cap", *_REST) if name not in shapes]
        if missing:
            raise ValueError(f"no array {missing[0]}")
    found = {name: _map(root / f"{name}.npy", shape) for name, shape in shapes.items()}
    keys = {name: _keys(root / f"{name}.arrow") for name in _KEYS}
    data = BlockData(**{name: found.get(name) for name in _BLOCKS}, equality=equality)  # type: ignore[arg-type]
    kept = {name.removeprefix(_STATISTICS): a for name, a in found.items() if name.startswith(_STATISTICS)}
    problem = MatchingProblem(
        data,
        found["budgets"].clone(),
        found["equality"].clone(),
        found["bounds"].clone(),
        **keys,
        skipped=skipped,
        resources=tuple(str(name) for name in resources),
        at_least=found["at_least"].clone() if "at_least" in found else None,
    )
    with reading(root, "a packed problem"):
        problem.check()
        return problem.with_statistics(Statistics.from_arrays(kept, problem.rows))


def _map(file: Path, shape: list[int]) -> Tensor:
    with reading(file, "an array of a packed problem"):
        array = np.load(file, mmap_mode="r", allow_pickle=False)
        if list(array.shape) != shape:
            raise ValueError(f"shape {tuple(shape)} is described, {array.shape} is there")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch has no read-only tensors; nothing here writes to a problem
            return torch.from_numpy(array)


def _keys(file: Path) -> Any:
    if not file.exists():
        return None
    with reading(file, "the keys of a packed problem"):
        keys = pa.ipc.open_file(pa.memory_map(str(file))).read_all().column("keys").combine_chunks()
        keys.validate(full=True)
        if keys.null_count:
            raise ValueError(f"{keys.null_count} nulls")
        return keys
