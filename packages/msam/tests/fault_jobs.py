"""Long commands of msam for `tools/faults.py`."""

import json
from pathlib import Path

SMALL = "--seeds 2 --epochs 1 --methods sgd,sam"
GRID = "--rho 0.1 --micro-batches 1,4 --seeds 1 --epochs 1"
JOBS = {
    "compare": {"command": f"msam compare {SMALL} -o OUT", "varies": ["run.json"]},
    "sweep": {"command": f"msam sweep {GRID} -o OUT", "varies": ["run.json"]},
}


def prepare(folder: Path) -> None:
    """Its data come with scikit-learn."""


def content(path: Path) -> bytes:
    """Accuracy and loss of every run; its times vary."""
    runs = json.loads(path.read_text())["runs"]
    return json.dumps(
        {name: [run["test"], run["validation"], run["train_loss"]] for name, run in runs.items()}
    ).encode()
