"""SmolLM2-135M at 3 bits per channel by every method: the table and the picture of the docs.

About forty minutes of one core, with `--quick` (the quick demonstration, two blocks) about a minute and a half; a run
that was killed continues.
"""

import argparse
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

from core_tensor.app.files import write_json
from quantease.demo import DemoConfig, run_demo

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Run the demonstration in full and keep its figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="working folder")
    parser.add_argument("--quick", action="store_true", help="the quick demonstration, to quick.json")
    options = parser.parse_args()
    name = "quick" if options.quick else "smollm2"
    folder = options.folder or Path("out") / f"quantease-{name}"

    def stage(what: str, done: int, total: int) -> None:
        if done == total:
            print(what, file=sys.stderr, flush=True)

    result = run_demo(DemoConfig.quick() if options.quick else DemoConfig(), folder, stage=stage)
    summary = {"measured_at": f"version {version('quantease')}"} | result.to_dict()
    rows = {row["method"]: row for row in result.compared.rows}
    summary["rows"] = [row | {"over fp32": row["perplexity"] / rows["fp32"]["perplexity"]} for row in rows.values()]
    for place in ("picture", "checkpoint"):
        del summary[place]
    write_json(RESULTS / f"{name}.json", summary)
    if not options.quick:
        shutil.copyfile(result.picture, RESULTS / "smollm2_layer_errors.png")
    print(result.render())


if __name__ == "__main__":
    main()
