"""Netlib LPs of the shared data, whose bounds are arrays of objects: read without running what a file says.

Used by the tests, the campaign and `reproduce/real_data.py`.
"""

import io
import pickle
import zipfile

import numpy as np

ARRAYS = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype} | {
    (f"numpy.{core}.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0] for core in ("core", "_core")
}  # where NumPy 1 and 2 keep them


class _ArraysOnly(pickle.Unpickler):
    """An unpickler that makes arrays and plain numbers, and refuses whatever else a file names."""

    def find_class(self, module, name):
        if (module, name) not in ARRAYS:
            raise ValueError(f"expected an array of numbers, got {module}.{name}")
        return ARRAYS[module, name]


def _array(archive, name):
    stream = io.BytesIO(archive.read(f"{name}.npy"))
    np.lib.format.read_magic(stream)
    _, _, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype.hasobject:
        return _ArraysOnly(stream).load()
    stream.seek(0)
    return np.load(stream)


def read_netlib(path):
    """Keywords of `linprog_blocks` and `BlockLP.build`, and the published optimum.

    Args:
        path: The npz file.

    Returns:
        Keywords, and the optimum.
    """
    with zipfile.ZipFile(path) as archive:
        z = {name: _array(archive, name) for name in ("c", "obj", "bounds", "A_ub", "b_ub", "A_eq", "b_eq")}
    n, bounds = z["c"].size, np.squeeze(z["bounds"])
    given = {"c": z["c"].astype(float), "bounds": bounds.tolist() if bounds.ndim == 2 else None}
    for side in ("ub", "eq"):
        if z[f"b_{side}"].size:
            given[f"A_{side}"] = z[f"A_{side}"].astype(float).reshape(-1, n)
            given[f"b_{side}"] = z[f"b_{side}"].astype(float).ravel()
    return given, float(z["obj"])
