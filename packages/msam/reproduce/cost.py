"""What a step costs over a plain one, by engine and number of micro-batches: `results/cost.json` and its picture.

    python packages/msam/reproduce/cost.py [--models mlp,cnn] [--repeats 5] [-o FOLDER]
    python packages/msam/reproduce/cost.py --quick -o FOLDER    # the small MLP, one round

Models that are not asked for keep the figures they have. CPU time of one thread; all engines run in turn, so that a
drift of the machine hits all of them.
"""

import argparse
from pathlib import Path

import torch
from core_tensor.app.files import read_json, write_json
from msam.study import plots
from msam.study.cost import ratios
from msam.study.names import MODELS, MODES

RESULTS = Path(__file__).parent / "results"
COUNTS = (2, 4, 8, 16, 32)


def main() -> None:
    """Time every model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round of the small MLP")
    parser.add_argument("-o", "--out", type=Path, default=RESULTS, help="folder for what is written")
    options = parser.parse_args()
    if options.quick:
        options.models, options.repeats = MODELS[0], 1
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    path, asked = options.out / "cost.json", options.models.split(",")
    rows = [row for row in read_json(path)["rows"] if row["model"] not in asked] if path.exists() else []
    rows += [row for name in asked for row in ratios(name, COUNTS, MODES, options.repeats)]
    rows.sort(key=lambda row: MODELS.index(row["model"]))
    by_pair = {(row["model"], row["mode"], row["m"]): row["ratio"] for row in rows}
    table = [
        {"model": name, "mode": mode} | {f"m{m}": by_pair[name, mode, m] for m in COUNTS}
        for name in dict.fromkeys(row["model"] for row in rows)
        for mode in MODES
        if (name, mode, COUNTS[0]) in by_pair
    ]
    by_name = {f"{row['model']}-{row['mode']}": row for row in table}
    write_json(path, {"rows": rows, "table": table, "by_name": by_name})
    plots.cost(rows, options.out / "cost.png", "CPU time of a step against the number of micro-batches, one thread")


if __name__ == "__main__":
    main()
