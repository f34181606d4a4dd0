"""How fresh vectors must be: members whose preferences walk at random, asked of vectors refreshed at several intervals.

    python reproduce/freshness.py [--seeds 5] [--quick] [-o FILE] [--work FOLDER]

Writes `results/freshness.json` and a picture. The generator's members have four events a day on average and are asked
about events 33 to 72. A preference walks away from where it was, with a standard deviation per day of `drift` times its
spread over the members. A support is the latest 32 events, so a refresh exchanges old ones for new ones; the line
without drift shows what that alone is worth. Every draw is a world of its own, with members of its own that training
never saw; finished draws lie in the work folder, so a killed run goes on where it stopped.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import _study
from core_tensor.app import figures
from core_tensor.app.files import write_json
from meta_embed.evaluate.freshness import freshness_scores
from meta_embed.evaluate.metrics import paired_bootstrap
from meta_embed.evidence.generator import DAY, SCHEMA, make_world
from meta_embed.train.tune import tune

RESULTS = Path(__file__).parent / "results" / "freshness.json"
PERIODS = {"never (stale)": float("inf"), "weekly": 7 * DAY, "daily": DAY, "hourly": DAY / 24, "every event": 0.0}
DRIFTS = (0.0, 0.15, 0.3)
COLORS = ("#9aa0a6", "#1f77b4", "#1b9e77")


def one_world(members: int, drift: float, seed: int, quick: bool) -> _study.Found:
    """Scores of the tested members' events 33 to 72, by position of the period."""
    began = time.process_time()
    world = make_world(members, drift=drift, least=_study.START + _study.QUERY, longest=100, seed=seed)
    draw = _study.make_draw(world.table, SCHEMA, seed % 5, 5, quick, width=9, hidden=0)
    config = tune(draw.train, draw.held_back, draw.config, draw.vocabulary, precisions=(10.0,), epochs=draw.epochs)
    model, about = _study.trained(draw, config, (1e-3,))
    support = draw.config.episodes.support
    asked = {
        j: freshness_scores(model, draw.tested, _study.START, _study.QUERY, period, support)
        for j, period in enumerate(PERIODS.values())
    }
    return _study.Found(asked, about={**about, "cpu_seconds": round(time.process_time() - began, 1)})


def report(by_drift: dict[float, list[_study.Found]]) -> dict[str, Any]:
    """AUC of every period, and its gain over never and over the period before it."""
    rows, members = [], 0
    for drift, worlds in by_drift.items():
        members = sum(len(set(world.tested[0].owner.tolist())) for world in worlds)
        for j, name in enumerate(PERIODS):
            row: dict[str, Any] = {"drift": drift, "refresh": name}
            for figure in ("auc", "logloss"):
                row[figure] = sum(world.tested[j].figures()[figure] for world in worlds) / len(worlds)
            for other, key in ((0, "gain"), (j - 1, "step")):
                if j == 0:
                    row |= {f"{key}_text": None}
                    continue
                d = paired_bootstrap([w.tested[j] for w in worlds], [w.tested[other] for w in worlds], draws=400)
                text = f"{d.value:+.4f} ({d.low:+.4f} to {d.high:+.4f})"
                row |= {key: d.value, f"{key}_low": d.low, f"{key}_high": d.high, f"{key}_text": text}
            rows.append(row)
    worlds = max(len(worlds) for worlds in by_drift.values())
    return {"draws": worlds, "members": members, "rows": rows}


def picture(found: dict[str, Any], path: Path) -> None:
    """Gain over stale vectors, by period, one line per drift."""
    plt = figures.pyplot("meta-embed[plot]")
    figure, axis = plt.subplots(figsize=(6.0, 3.6))
    names = list(PERIODS)
    for drift, color in zip(DRIFTS, COLORS, strict=True):
        rows = [row for row in found["rows"] if row["drift"] == drift]
        gain = [1000 * row.get("gain", 0.0) for row in rows]
        ends = [[1000 * (row.get("gain", 0.0) - row.get("gain_low", 0.0)) for row in rows]]
        ends += [[1000 * (row.get("gain_high", 0.0) - row.get("gain", 0.0)) for row in rows]]
        label = f"{drift:g} of the spread per day" if drift else "no drift"
        axis.errorbar(range(len(names)), gain, ends, label=label, color=color, marker="o", markersize=4, capsize=3)
    axis.set_xticks(range(len(names)), names)
    axis.set_xlabel("vectors are refreshed")
    axis.set_ylabel("gain over stale vectors,\nthousandths of AUC")
    axis.set_title(f"members that training never saw, {found['draws']} worlds")
    axis.grid(axis="y", linewidth=0.4, alpha=0.6)
    axis.legend(fontsize=8, title="drift of preferences")
    figures.save(figure, path)


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    options, out, work = _study.arguments(parser, RESULTS, _study.__file__, __file__)
    by_drift: dict[float, list[_study.Found]] = {drift: [] for drift in DRIFTS}
    for seed in range(1 if options.quick else options.seeds):
        for drift in DRIFTS:
            part = work / f"freshness-{drift}-{seed}.npz"
            if not part.exists():
                _study.save(one_world(300 if options.quick else 1000, drift, seed, options.quick), part)
            found = _study.load(part)
            by_drift[drift].append(found)
            auc = [round(scores.figures()["auc"], 4) for _, scores in sorted(found.tested.items())]
            print("freshness", drift, seed, auc, f"{found.about['cpu_seconds']} s", flush=True)
    found_all = report(by_drift)
    write_json(out, found_all)
    picture(found_all, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
