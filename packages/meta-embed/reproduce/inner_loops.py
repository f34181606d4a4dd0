"""MovieLens-100k: gradient steps of first and second order, ANIL and kinds of rates, beside the MAP head.

    python reproduce/inner_loops.py [--draws 5] [--quick] [-o FILE] [--work FOLDER]

Writes `results/inner_loops.json`. Every method of every draw is a file in the work folder, so a killed run goes on
where it stopped. Intervals are of a paired bootstrap over members.
"""

import argparse
from pathlib import Path
from typing import Any

import _logs
import _study
import numpy as np
from core_tensor.app.files import write_json
from meta_embed.evaluate.buckets import SIZES

RESULTS = Path(__file__).parent / "results" / "inner_loops.json"
LABELS = {"map": "MAP head", "maml": "MAML, second order, one learned rate", **_study.VARIANTS}


def report(draws: list[dict[str, _study.Found]]) -> dict[str, Any]:
    """AUC and log loss by support size, and differences from the MAP head and from MAML of second order."""
    tables: dict[str, list[dict[str, Any]]] = {"auc": [], "logloss": []}
    for figure, rows in tables.items():
        for name, label in LABELS.items():
            row: dict[str, Any] = {"key": name, "method": label}
            for n in SIZES:
                row[f"n{n}"] = float(np.mean([found[name].tested[n].figures()[figure] for found in draws]))
            row["cpu_seconds"] = float(np.mean([found[name].about["cpu_seconds"] for found in draws]))
            rows.append(row)
    pairs = [("map", name) for name in LABELS if name != "map"] + [("maml", name) for name in _study.VARIANTS]
    methods = {name: [found[name] for found in draws] for name in LABELS}
    return {
        "draws": len(draws),
        "members": sum(len(np.unique(found["map"].tested[0].owner)) for found in draws),
        **tables,
        "differences": _study.differences(pairs, methods, LABELS),
        "chosen": {name: [f.about for f in found] for name, found in methods.items()},
    }


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=5)
    options, out, work = _study.arguments(parser, RESULTS, _logs.__file__, _study.__file__)
    table, schema = _logs.movielens()
    draws = []
    for part in range(1 if options.quick else options.draws):
        draw = _study.make_draw(table, schema, part, 5, options.quick)
        found = {name: _study.run(name, draw, work / f"movielens-{part}-of-5-{name}.npz") for name in LABELS}
        for name, one in found.items():
            line = " ".join(f"{n}:{s.figures()['auc']:.4f}" for n, s in sorted(one.tested.items()))
            print("movielens", part, name, line, f"{one.about['cpu_seconds']} s", flush=True)
        draws.append(found)
    write_json(out, report(draws))


if __name__ == "__main__":
    main()
