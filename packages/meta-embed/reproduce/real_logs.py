"""MovieLens-100k and Amazon: what personalization brings by support size, at five user draws.

    python reproduce/real_logs.py [--log movielens] [--draws 5] [--quick] [-o FILE] [--work FOLDER]

Writes `results/real_logs.json` and a picture per log. Every method of every draw is a file in the work folder, so a
killed run goes on where it stopped. Intervals are of a paired bootstrap over members.
"""

import argparse
from pathlib import Path
from typing import Any

import _logs
import _study
import numpy as np
from _study import SUPPORTS, Found
from core_tensor.app.files import read_json, write_json
from meta_embed.evaluate.buckets import SIZES
from meta_embed.evaluate.metrics import Scores
from meta_embed.evaluate.mixture import fit_mixture
from meta_embed.evaluate.plots import bucket_plot

RESULTS = Path(__file__).parent / "results" / "real_logs.json"
LABELS = {
    "none": "no personalization",
    "id": "retrained ID embedding",
    "deep": "retrained ID embedding, MLP",
    "wide": "retrained wide and deep",
    "best_id": "best of the three, chosen on held-back members",
    "fold_in": "MAP head without meta-training",
    "map": "MAP head",
    "maml": "MAML, second order",
    "hybrid": "ID and MAP head, mixed per n",
    "map_again": "MAP head, another seed",
    "two_heads": "two MAP heads, mixed per n",
}
TITLES = {"movielens": "MovieLens-100k", "amazon": "Amazon"}
METHODS = ("none", "id", "fold_in", "map", "map_again", "maml")
OTHER_ID_MODELS, OTHER_DRAWS = ("deep", "wide"), 3
"""Two more ID models, on the first draws only: each takes as long as all of `METHODS` but the ID model."""
QUICK = ("none", "id", "map", "maml")
AGAINST = ("none", "id", "deep", "wide", "best_id", "fold_in", "maml")


def one_draw(draw: _study.Draw, methods: tuple[str, ...], work: Path, prefix: str) -> dict[str, Found]:
    """All methods on one draw."""
    found = {}
    for method in methods:
        found[method] = _study.run(method, draw, work / f"{prefix}-{method}.npz")
        line = " ".join(f"{n}:{s.figures()['auc']:.4f}" for n, s in sorted(found[method].tested.items()))
        print(prefix, method, line, f"{found[method].about['cpu_seconds']} s", flush=True)
    return found


def mixed(draws: list[dict[str, Found]], first: str, second: str) -> list[Found]:
    """Two methods mixed with weights per support size, fitted on each draw's held-back members."""
    out = []
    for found in draws:
        a, b = found[first], found[second]
        weights = fit_mixture(
            {n: (a.held_back[n].logit, b.held_back[n].logit) for n in SUPPORTS},
            {n: a.held_back[n].y for n in SUPPORTS},
        )
        tested = {}
        for n in SUPPORTS:
            one, other = a.tested[n], b.tested[n]
            z = weights.mix((one.logit, other.logit), np.full(len(one.y), n))
            tested[n] = Scores(z, one.y, one.owner)
        tested[0] = found["map"].tested[0]  # an ID embedding knows nobody at 0 events
        out.append(Found(tested, about={"weights": weights.weights.tolist()}))
    return out


def best_id(draws: list[dict[str, Found]]) -> list[Found]:
    """Of the retrained ID models, the one with the lowest loss on the held-back members, at every size."""
    out = []
    for found in draws:
        names = [name for name in ("id", "deep", "wide") if name in found]
        chosen = {n: min(names, key=lambda m: found[m].about[f"n{n}"]["held_back_loss"]) for n in SUPPORTS}
        out.append(Found({n: found[m].tested[n] for n, m in chosen.items()}, about={"chosen": list(chosen.values())}))
    return out


def report(draws: list[dict[str, Found]]) -> dict[str, Any]:
    """Tables of one log."""
    methods = {name: [found[name] for found in draws] for name in draws[0]}
    if "wide" in methods:
        methods["best_id"] = best_id(draws)
    methods["hybrid"] = mixed(draws, "id", "map")
    if "map_again" in methods:
        methods["two_heads"] = mixed(draws, "map_again", "map")
    auc, loss = [], []
    for name, label in LABELS.items():
        if name not in methods:
            continue
        rows: list[dict[str, Any]] = [{"key": name, "method": label} for _ in range(2)]
        for n in SIZES:
            figures = [f.tested[n].figures() for f in methods[name] if n in f.tested]
            for row, key in zip(rows, ("auc", "logloss"), strict=True):
                row[f"n{n}"] = float(np.mean([f[key] for f in figures])) if figures else None
                row[f"n{n}_sd"] = float(np.std([f[key] for f in figures])) if figures else None
        seconds = [f.about["cpu_seconds"] for f in methods[name] if "cpu_seconds" in f.about]
        rows[0]["cpu_seconds"] = float(np.mean(seconds)) if seconds else None
        auc.append(rows[0])
        loss.append(rows[1])
    pairs = [("map", name) for name in AGAINST if name in methods]
    pairs += [("hybrid", name) for name in ("map", "id", "best_id", "two_heads") if name in methods]
    one = draws[0]["none"].tested[0]
    return {
        "draws": len(draws),
        "members": sum(len(np.unique(found["none"].tested[0].owner)) for found in draws),
        "rows": sum(len(found["none"].tested[0].y) for found in draws),
        "liked": float(one.y.mean()),
        "auc": auc,
        "logloss": loss,
        "differences": _study.differences(pairs, methods, LABELS),
        "mixture_weights_of_id": [[w[0] for w in f.about["weights"]] for f in methods["hybrid"]],
        "chosen": {name: [f.about for f in found] for name, found in methods.items() if name != "hybrid"},
    }


def picture(found: dict[str, Any], name: str, path: Path) -> None:
    """AUC over the support size."""
    shown = {k: LABELS[k] for k in ("none", "id", "maml", "map") if k in {row["key"] for row in found["auc"]}}
    rows = []
    for n in SIZES:
        row: dict[str, Any] = {"support": n}
        for method in found["auc"]:
            value = method[f"n{n}"]
            row[f"{method['key']}_auc"] = float("nan") if value is None else value
        rows.append(row)
    bucket_plot(rows, "support", shown, path, name, f"mean of {found['draws']} user draws")


def bars(results: dict[str, Any]) -> dict[str, float]:
    """The keys of the specification that these logs decide, over both logs."""
    logs = [results[name] for name in _logs.LOGS if name in results]
    pairs = [{(d["ours"], d["peer"]): d for d in log["differences"]} for log in logs]

    def worst(ours: str, peer: str) -> float:
        return min(by[ours, peer][f"n{n}"] for by in pairs for n in SUPPORTS)

    return {
        "no_retrain_vs_id": worst("map", "id"),
        "hybrid_worst_bucket_vs_best": min(worst("hybrid", "map"), worst("hybrid", "id")),
        "n0_auc_vs_no_personalisation": min(by["map", "none"]["n0"] for by in pairs),
        "maml_vs_map_n32": max(-by["map", "maml"]["n32"] for by in pairs if ("map", "maml") in by),
    }


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", action="append", choices=list(_logs.LOGS), help="one of the logs")
    parser.add_argument("--draws", type=int, default=5)
    options, out, work = _study.arguments(parser, RESULTS, _logs.__file__, _study.__file__)
    results = read_json(out) if out.exists() else {}
    for name in options.log or (["movielens"] if options.quick else list(_logs.LOGS)):
        table, schema = _logs.LOGS[name]()
        draws = []
        for part in range(1 if options.quick else options.draws):
            parts = 5 if options.quick else options.draws
            draw = _study.make_draw(table, schema, part, parts, options.quick)
            prefix = f"{name}-{part}-of-{parts}"
            methods = QUICK if options.quick else METHODS
            if name == "movielens" and part < OTHER_DRAWS and not options.quick:
                methods += OTHER_ID_MODELS
            draws.append(one_draw(draw, methods, work, prefix))
        common = [method for method in LABELS if all(method in found for found in draws)]
        results[name] = report([{method: found[method] for method in common} for found in draws])
        full = [found for found in draws if "wide" in found]
        if full:
            results[f"{name}_id_models"] = report(full)
        results["bars"] = bars(results)
        write_json(out, results)
        picture(results[name], TITLES[name], out.with_name(f"{out.stem}_{name}.png"))


if __name__ == "__main__":
    main()
