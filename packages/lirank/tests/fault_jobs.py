"""Long commands of lirank for `tools/faults.py`."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA = """
time: {column: time}
labels: [{name: click}]
features:
- {kind: id, name: user, rows: 256}
- {kind: id, name: item, type: string, rows: 64}
- {kind: dense, name: price, transform: log1p}
- {kind: history, name: seen, key: user, item: item, action: click, length: 5}
"""
SMALL = "--schema schema.yaml --model model.yaml --epochs 3 --batch-size 64 --checkpoint-every 10 --threads 1"
JOBS = {
    "train": {"command": f"lirank train log.parquet {SMALL} -o OUT", "varies": ["run.json", "history.json"]},
    "calibrate": {"command": "lirank calibrate run --threads 1 -o OUT", "varies": ["run.json", "history.json"]},
    "compress": {"command": "lirank compress run --threads 1 -o OUT/table.safetensors"},
    "export onnx": {"command": "lirank export run --threads 1 -o OUT/model.onnx"},
    "export pt2": {"command": "lirank export run --threads 1 -o OUT/model.pt2"},
}


def prepare(folder: Path) -> None:
    rng = np.random.default_rng(0)
    user, item = rng.integers(30, size=3000), rng.integers(40, size=3000)
    z = rng.normal(size=30)[user] + rng.normal(size=40)[item] + rng.normal(size=3000)
    columns = {
        "time": np.arange(3000) * 10,
        "user": user,
        "item": [f"item-{i}" for i in item],
        "price": np.exp(rng.normal(size=3000)),
        "click": (z > 0).astype(np.int64),
    }
    pq.write_table(pa.table(columns), folder / "log.parquet", row_group_size=500)
    (folder / "schema.yaml").write_text(SCHEMA)
    (folder / "model.yaml").write_text("dim: 8\nwidths: [16, 8]\ncross_rank: 8\nhistory_width: 8\n")
    program = Path(sys.executable).parent / "lirank"
    command = [program, "train", "log.parquet", *SMALL.split(), "-o", "run"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
