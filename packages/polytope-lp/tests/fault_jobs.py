"""Long commands of polytope-lp for `tools/faults.py`."""

import subprocess
import sys
from pathlib import Path

JOBS = {
    "generate": {"command": "polytope-lp generate --sources 20000 --destinations 50 -o OUT"},
    "pack": {"command": "polytope-lp pack problem -o OUT"},
    "solve": {
        "command": "polytope-lp solve problem --tol 1e-5 --threads 1 -o OUT",
        "varies": ["certificate.json", "history.parquet", "run.json"],
    },
}


def prepare(folder: Path) -> None:
    program = Path(sys.executable).parent / "polytope-lp"
    size = ("--sources", "20000", "--destinations", "50")
    subprocess.run([program, "generate", *size, "-o", folder / "problem"], check=True, capture_output=True)
