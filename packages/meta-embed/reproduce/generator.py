"""The generator, whose best possible predictor is known: share of the gap from no personalization to it that is closed.

    python reproduce/generator.py [--world small] [--seeds 5] [--gradient-steps] [--quick] [-o FILE] [--work FOLDER]

Writes `results/generator.json` and a picture. Every world and its members come from a seed of their own. Finished parts
lie in the work folder, so a killed run goes on where it stopped.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import _study
import numpy as np
from core_tensor.app.files import read_json, write_json
from meta_embed.evaluate.buckets import SIZES
from meta_embed.evaluate.plots import bucket_plot
from meta_embed.evidence.generator import SCHEMA, make_world
from meta_embed.evidence.oracle import oracle_scores

RESULTS = Path(__file__).parent / "results" / "generator.json"
LABELS = {
    "none": "no personalization",
    "maml": "MAML, second order",
    **_study.VARIANTS,
    "fold_in": "MAP head without meta-training",
    "map": "MAP head",
    "map_narrow": "MAP head of the truth's width, 7 instead of 9",
    "oracle": "near-oracle",
}


WORLDS = {"small": (1500, 100), "full": (2000, 500)}
"""Members, and the most events of one before the last 72."""
FIRST = {"small": ("none", "fold_in", "map", "map_narrow"), "full": ("none", "fold_in", "map")}
"""Run on the worlds; gradient steps, which take several times as long, where they are asked for."""


def one_world(kind: str, seed: int, methods: Sequence[str], work: Path, quick: bool) -> dict[str, _study.Found]:
    """Some methods, and the near-oracle, on one world."""
    members, longest = (400, 100) if quick else WORLDS[kind]
    world = make_world(members, least=_study.START + _study.QUERY, longest=longest, seed=seed)
    draw = _study.make_draw(world.table, SCHEMA, seed % 5, 5, quick, width=9, hidden=0)
    draw = replace(draw, precisions=(3.0, 10.0))
    tested = {n: oracle_scores(world, draw.tested, draw.split(draw.tested, n)) for n in SIZES}
    found = {"oracle": _study.Found(tested, about={"trained_on": len(draw.train), "events": len(draw.train.time)})}
    for name in methods:
        found[name] = _study.run(name, draw, work / f"generator-{kind}-{seed}-{name}.npz")
        line = " ".join(f"{n}:{s.figures()['auc']:.4f}" for n, s in sorted(found[name].tested.items()))
        print("generator", kind, seed, name, line, f"{found[name].about['cpu_seconds']} s", flush=True)
    return found


def report(worlds: list[dict[str, _study.Found]]) -> dict[str, Any]:
    """AUC and share of the gap by support size, for methods that ran on all worlds."""
    rows = []
    labels = {name: label for name, label in LABELS.items() if all(name in w for w in worlds)}
    for name, label in labels.items():
        row: dict[str, Any] = {"key": name, "method": label}
        for n in SIZES:
            auc = np.array([[w[m].tested[n].figures()["auc"] for m in ("none", name, "oracle")] for w in worlds])
            closed = (auc[:, 1] - auc[:, 0]) / (auc[:, 2] - auc[:, 0])
            row |= {f"auc{n}": float(auc[:, 1].mean()), f"auc{n}_sd": float(auc[:, 1].std())}
            row |= {f"closed{n}": float(closed.mean()), f"closed{n}_sd": float(closed.std())} if n else {}
        rows.append(row)
    first = next(row for row in rows if row["key"] == "map")
    bars = {"gap_closed_n16": first["closed16"], "gap_closed_n16_sd": first["closed16_sd"]}
    chosen = {name: [w[name].about for w in worlds] for name in labels if name != "oracle"}
    members = sum(len(np.unique(w["none"].tested[0].owner)) for w in worlds)
    pairs = [("map", peer) for peer in ("fold_in", "maml", *_study.VARIANTS)]
    pairs += [("maml", peer) for peer in _study.VARIANTS] + [("map_narrow", "map")]
    pairs = [(ours, peer) for ours, peer in pairs if ours in labels and peer in labels]
    return {
        "worlds": len(worlds),
        "members": members,
        "trained_on": float(np.mean([w["oracle"].about["trained_on"] for w in worlds])),
        "events": float(np.mean([w["oracle"].about["events"] for w in worlds])),
        "rows": rows,
        "differences": _study.differences(pairs, {name: [w[name] for w in worlds] for name in labels}, LABELS),
        "bars": bars,
        "chosen": chosen,
    }


def picture(found: dict[str, Any], kind: str, path: Path) -> None:
    """AUC over the support size."""
    keys = [row["key"] for row in found["rows"]]
    shown = {name: LABELS[name] for name in ("none", "maml", "map", "oracle") if name in keys}
    rows = [{"support": n, **{f"{row['key']}_auc": row[f"auc{n}"] for row in found["rows"]}} for n in SIZES]
    note = f"{found['bars']['gap_closed_n16']:.0%} of the gap closed at 16 events"
    bucket_plot(rows, "support", shown, path, f"generator, {kind} worlds", note)


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", action="append", choices=list(WORLDS), help="one of the kinds of worlds")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--gradient-steps", action="store_true", help="MAML, first and second order, and ANIL too")
    options, out, work = _study.arguments(parser, RESULTS, _study.__file__, __file__)
    steps = ("maml", *_study.VARIANTS)
    results = read_json(out) if out.exists() else {}
    seeds = range(1 if options.quick else options.seeds)
    for kind in options.world or (["small"] if options.quick else list(WORLDS)):
        worlds: list[dict[str, _study.Found]] = [{} for _ in seeds]
        for methods in (FIRST[kind], steps) if options.gradient_steps else (FIRST[kind],):
            for seed in seeds:
                worlds[seed] |= one_world(kind, seed, methods, work, options.quick)
            results[kind] = report(worlds)
            results["bars"] = results["full" if "full" in results else kind]["bars"]
            write_json(out, results)
        picture(results[kind], kind, out.with_name(f"{out.stem}_{kind}.png"))


if __name__ == "__main__":
    main()
