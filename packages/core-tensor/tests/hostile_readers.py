"""The readers of the applications' shell, for `tools/hostile.py`."""

import gzip
import json
import struct
from pathlib import Path

import numpy as np
from core_tensor.app.datasets import read_idx
from core_tensor.app.files import read_json, read_npz, write_json
from core_tensor.app.runs import RunFolder, read_record
from core_tensor.app.serving.bodies import RefusalError, parse_arrow, parse_json


def _json(folder: Path) -> Path:
    write_json(folder / "a.json", {"n": 3, "rows": [1.5, None, "x"], "nested": {"a": [True]}})
    return folder / "a.json"


def _npz(folder: Path) -> Path:
    np.savez_compressed(folder / "a.npz", x=np.arange(6.0).reshape(2, 3), n=np.int64(3), s=np.array("text"))
    return folder / "a.npz"


def _idx(folder: Path) -> Path:
    raw = struct.pack(">4B3I", 0, 0, 8, 3, 2, 3, 4) + bytes(range(24))
    (folder / "images-idx3-ubyte.gz").write_bytes(gzip.compress(raw, mtime=0))
    return folder / "images-idx3-ubyte.gz"


def _run(folder: Path) -> Path:
    with RunFolder.claim(folder / "run", "core-tensor test", {"lr": 0.1, "sizes": [1, 2]}) as run:
        run.finish({"loss": 0.5})
    return folder / "run"


def _resume(path: Path) -> None:
    read_record(path)
    with RunFolder.claim(path, "core-tensor test", {"lr": 0.1, "sizes": [1, 2]}) as run:
        str(run.result)


def _schema():
    import pyarrow as pa

    return pa.schema([("id", pa.int64()), ("score", pa.float64()), ("tags", pa.list_(pa.string()))])


def _body(folder: Path) -> Path:
    rows = [{"id": 1, "score": 0.5, "tags": ["a", "b"]}, {"id": 2, "score": 1.5, "tags": []}]
    (folder / "body.json").write_text(json.dumps({"rows": rows, "options": {"top": 3}}))
    return folder / "body.json"


def _arrow(folder: Path) -> Path:
    import pyarrow as pa

    table = pa.table({"id": [1, 2], "score": [0.5, 1.5], "tags": [["a"], []]}, schema=_schema())
    with pa.OSFile(str(folder / "body.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as sink:
        sink.write_table(table)
    return folder / "body.arrow"


def _answered(parse):
    def read(path: Path) -> None:
        try:
            table, _ = parse(path.read_bytes(), _schema(), 100)
            table.to_pylist()
        except RefusalError as error:  # is answered with its status
            raise ValueError(str(error)) from None

    return read


READERS = [
    ("read_json", _json, read_json),
    ("read_npz", _npz, lambda path: read_npz(path, "x", "n", "s")["x"].sum()),
    ("read_idx", _idx, read_idx),
    ("run folder", _run, _resume),
    ("JSON body", _body, _answered(parse_json)),
    ("Arrow body", _arrow, _answered(parse_arrow)),
]
