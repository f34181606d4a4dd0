"""Long commands of meta-embed for `tools/faults.py`."""

import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
from meta_embed.evidence.generator import make_world

CONFIG = """
columns:
  entity: member
  time: time
  label: clicked
  row: [{name: item}]
  member: [{name: profile, kind: dense, width: 4}]
model: {width: 4, hidden: 0, member_hidden: 0}
episodes: {tasks: 16, support: 8, query: 8}
train: {epochs: 6, warm_epochs: 2}
"""
MADE = "meta-embed generate run --events events.parquet --threads 1"
JOBS = {
    "train": {
        "command": "meta-embed train events.parquet -c config.yaml --no-tune --threads 1 -o OUT",
        "varies": ["run.json"],
    },
    "generate lmdb": {"command": f"{MADE} --work OUT/work --store OUT/store", "varies": ["*.mdb", "*/store.json"]},
    "export": {"command": "meta-embed export run -o OUT/block.pt2"},
    "generate parquet": {"command": f"{MADE} --work OUT/work --store parquet:OUT/store", "varies": ["*/store.json"]},
}


def prepare(folder: Path) -> None:
    pq.write_table(make_world(120, items=30, d=3, longest=60, least=6, seed=1).table, folder / "events.parquet")
    (folder / "config.yaml").write_text(CONFIG)
    program = Path(sys.executable).parent / "meta-embed"
    command = [program, "train", "events.parquet", "-c", "config.yaml", "--no-tune", "-o", "run"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
