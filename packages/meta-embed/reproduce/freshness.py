"""How fresh vectors must be: members whose preferences walk at random, asked of vectors refreshed at several intervals.

    python reproduce/freshness.py [--seeds 5] [--quick] [-o FILE]

Writes `results/freshness.json`. The generator's members have an event every six hours; a preference walks away from
where it was, with a standard deviation per day of `drift` times its spread over the members. Without drift a refresh
still brings events, so both are shown.
"""

import argparse
from pathlib import Path
from typing import Any

import _study
import numpy as np
from core_tensor.app.files import read_json, write_json
from meta_embed.evaluate.freshness import by_period
from meta_embed.evidence.generator import DAY, SCHEMA, make_world
from meta_embed.train.tune import tune

RESULTS = Path(__file__).parent / "results" / "freshness.json"
PERIODS = {"never (stale)": float("inf"), "weekly": 7 * DAY, "daily": DAY, "hourly": DAY / 24, "every event": 0.0}
DRIFTS = (0.0, 0.15, 0.3)


def one_world(members: int, drift: float, seed: int, quick: bool) -> list[dict[str, Any]]:
    """AUC of the tested members' events 33 to 72 at every period."""
    world = make_world(members, drift=drift, least=_study.START + _study.QUERY, longest=100, seed=seed)
    draw = _study.make_draw(world.table, SCHEMA, seed % 5, 5, quick, width=9, hidden=0)
    config = tune(draw.train, draw.held_back, draw.config, draw.vocabulary, precisions=(10.0,), epochs=draw.epochs)
    model, _ = _study.trained(draw, config, (1e-3,))
    return by_period(model, draw.tested, _study.START, _study.QUERY, PERIODS, draw.config.episodes.support)


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    options, out, work = _study.arguments(parser, RESULTS, _study.__file__, __file__)
    seeds = range(1 if options.quick else options.seeds)
    rows = []
    for drift in DRIFTS:
        found = []
        for seed in seeds:
            part = work / f"freshness-{drift}-{seed}.json"
            if not part.exists():
                write_json(part, {"rows": one_world(300 if options.quick else 800, drift, seed, options.quick)})
            found.append([row["auc"] for row in read_json(part)["rows"]])
            print("freshness", drift, seed, [round(v, 4) for v in found[-1]], flush=True)
        auc = np.array(found)  # (seeds, periods)
        gain = auc - auc[:, :1]
        for j, name in enumerate(PERIODS):
            row = {"drift": drift, "refresh": name, "auc": float(auc[:, j].mean()), "auc_sd": float(auc[:, j].std())}
            rows.append(row | {"gain": float(gain[:, j].mean()), "gain_sd": float(gain[:, j].std())})
    write_json(out, {"seeds": len(seeds), "rows": rows})


if __name__ == "__main__":
    main()
