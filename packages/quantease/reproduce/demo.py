"""The table of `quantease demo --quick`: SmolLM2-135M at 3 bits per channel by every method on five disjoint texts.

    python packages/quantease/reproduce/demo.py [--quick] [-o FOLDER]

Writes `quick.json`, with the divergence on each of the texts, and fails unless `quantease` is first on all of them.
About two minutes of one core; a run that was killed continues. `--quick` changes nothing.
"""

import argparse
import sys
from importlib.metadata import version
from pathlib import Path

from core_tensor.app.files import write_json
from quantease.demo import DemoConfig, run_demo

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Run the quick demonstration and keep its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="changes nothing")
    parser.add_argument("--folder", type=Path, default=Path("out") / "quantease-demo", help="working folder")
    parser.add_argument("-o", "--out", type=Path, default=RESULTS, help="folder for quick.json")
    options = parser.parse_args()

    def stage(what: str, done: int, total: int) -> None:
        if done == total:
            print(what, file=sys.stderr, flush=True)

    result = run_demo(DemoConfig.quick(), options.folder, stage=stage)
    summary = {"measured_at": f"version {version('quantease')}"} | result.to_dict()
    rows = {row["method"]: row for row in result.compared.rows}
    summary["rows"] = [row | {"over fp32": row["perplexity"] / rows["fp32"]["perplexity"]} for row in rows.values()]
    for place in ("picture", "checkpoint"):
        del summary[place]
    by_text = result.kl_by_text()
    first = [min(by_text, key=lambda name: by_text[name][i]) for i in range(result.config.texts)]
    summary["first_by_text"] = first
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "quick.json", summary)
    print(result.render())
    if set(first) != {"quantease"}:
        sys.exit(f"expected quantease first on every text, got {', '.join(first)}")


if __name__ == "__main__":
    main()
