"""From Parquet to packed arrays, file to file."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from core_tensor.app.files import reserve
from core_tensor.app.runs import RunFolder
from numpy.typing import NDArray

from polytope_lp.matching.problem import MatchingProblem
from polytope_lp.tables.packed import is_packed, open_packed, write_packed
from polytope_lp.tables.tables import input_hashes, read_problem


def pack(
    path: str | Path, out: str | Path, budgets: str | Path | None = None, *, overwrite: bool = False, **reading: Any
) -> MatchingProblem:
    """Turn Parquet into a packed problem; edges sorted by source go from file to file without being held.

    Args:
        path: As in `read_problem`.
        out: Folder to write; that of the same call is taken up again.
        budgets: As in `read_problem`.
        overwrite: Whether an existing packed problem is replaced.
        **reading: Further arguments of `read_problem`.

    Returns:
        The packed problem, mapped.

    Raises:
        ValueError: If the folder holds something else, or the problem cannot be read.
    """
    root = Path(out)
    hashes = input_hashes(path, budgets, reading.get("sources"))
    inputs = {"files": sorted(hashes.values()), "reading": {name: repr(value) for name, value in reading.items()}}
    with RunFolder.claim(root, "polytope-lp pack", inputs, overwrite=overwrite) as run:
        if run.result is None or not is_packed(root):
            mapped: dict[int, tuple[Path, NDArray[Any]]] = {}  # the arrays too: no address must be given out again

            def allocate(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
                file = root / f"{name}.npy"
                array = np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape)
                reserve(file, file.stat().st_size)
                mapped[array.ctypes.data] = file, array
                return array

            try:
                problem = read_problem(path, budgets, allocate=allocate, **reading)
                write_packed(problem, root, mapped)
            except BaseException:
                shutil.rmtree(root)  # nothing else is in it: the claim made sure
                raise
            run.finish({"sources": problem.data.blocks, "edges": problem.data.variables})
            del problem
    return open_packed(root)
