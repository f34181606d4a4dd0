"""Long commands of msam for `tools/faults.py`."""

from pathlib import Path

SMALL = "--seeds 2 --epochs 1 --methods sgd,sam"
JOBS = {"compare": {"command": f"msam compare {SMALL} -o OUT", "varies": ["runs.json", "run.json"]}}


def prepare(folder: Path) -> None:
    """Its data come with scikit-learn."""
