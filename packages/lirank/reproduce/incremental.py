"""Incremental training against retraining, under drift and without: gains over a model that stays, and their cost.

Thirty days of 60,000 impressions, in which items rise and fall or stay as they are. A first model learns the first
twenty days. Then, every two days, each way of keeping up trains on what has come in, and scores the two days after; the
last eight days judge. `full` retrains on all rows so far, `recent` on those of the last six days, `warm` continues on
the two new days alone (`lirank train --from --prior 0`), and `prior` does so with the curvature prior (`--prior 1`, the
default). Gains are over the first model, left as it is; the cost is the CPU time of the trainings after the first,
preparation of the rows included. No histories and no popularity, which would follow the drift in all of them.
"""

import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from _study import study
from core_tensor.app.cli import progress
from lirank.data.parquet import ParquetLog
from lirank.data.split import Split
from lirank.evaluate.compare import compare
from lirank.evaluate.metrics import auc, logloss
from lirank.evidence.ablation import BASE
from lirank.evidence.generator import Generated, Market, generate, without
from lirank.schema.features import Popularity
from lirank.train.incremental import Start
from lirank.train.loop import TrainConfig
from lirank.train.run import TrainedModel
from lirank.workflow import scored_rows, train_run

MARKET = Market(users=300, items=200, events=60_000, days=30.0, ids=0.8, crosses=0.5)
WORLDS = {"drift": dataclasses.replace(MARKET, drift=1.0), "no drift": MARKET}
FIRST, EVERY, RECENT = 20.0, 2.0, 6.0
"""Days that the first model learns, days between trainings, and days that `recent` retrains on."""
TRAINING = TrainConfig(epochs=4, batch_size=512, lr=3e-3, row_lr=1e-2)
ONCE = msgspec.structs.replace(TRAINING, epochs=2)
"""Of two new days; fewer passes, since what was learned before is there."""
WAYS = ("full", "recent", "warm", "prior")


class Keeper:
    """Trains on pieces of one generated log and measures what a training costs."""

    def __init__(self, made: Generated, folder: Path) -> None:
        self.made, self.folder = made, folder
        self.schema = without(made.schema, Popularity)
        self.seconds = 0.0
        t = made.log["time"].to_numpy()
        self.days = (t - t[0]) / 86_400

    def rows(self, name: str, first: float, last: float) -> Path:
        """The rows of days [first, last) as a file."""
        path = self.folder / f"{name}.parquet"
        pq.write_table(self.made.log.filter(pa.array((self.days >= first) & (self.days < last))), path)
        return path

    def train(self, name: str, first: float, last: float, training: TrainConfig, start: Start | None = None) -> Path:
        """Train on the rows of some days."""
        log, run = self.rows(name, first, last), self.folder / name
        run.mkdir()
        begun = time.process_time()
        train_run(ParquetLog.open(log), self.schema, Split("time", 0.0, 0.0), BASE, training, run, start=start)
        self.seconds += time.process_time() - begun
        return run

    def score(self, run: Path, first: float, last: float) -> np.ndarray:
        """Probabilities of the rows of some days."""
        found = scored_rows(TrainedModel.load(run), run, self.rows("judged", first, last), "")
        p: np.ndarray = found["p"][:, 0].astype(np.float64)
        return p


def run(market: Market, seed: int) -> dict[str, Any]:
    """One log: CPU seconds and metrics by way, and paired differences to the model that stays."""
    made = generate(dataclasses.replace(market, seed=seed))
    training = msgspec.structs.replace(TRAINING, seed=seed)
    once = msgspec.structs.replace(ONCE, seed=seed)
    with tempfile.TemporaryDirectory() as scratch:
        keeper = Keeper(made, Path(scratch))
        first = keeper.train("first", 0.0, FIRST, training)
        cost, scores = {"first": keeper.seconds}, {"stays": [], **{way: [] for way in WAYS}}
        # the pieces that are trained on, each with the days that judge the result
        ends = np.arange(FIRST + EVERY, MARKET.days, EVERY)
        scores["stays"] = [keeper.score(first, end, end + EVERY) for end in ends]
        steps: dict[str, Callable[[str, float, Path], Path]] = {
            "full": lambda name, end, _: keeper.train(name, 0.0, end, training),
            "recent": lambda name, end, _: keeper.train(name, end - RECENT, end, training),
            "warm": lambda name, end, last: keeper.train(name, end - EVERY, end, once, Start(last, prior=0.0)),
            "prior": lambda name, end, last: keeper.train(name, end - EVERY, end, once, Start(last)),
        }
        for way, step in steps.items():
            keeper.seconds, last = 0.0, first
            for end in ends:
                last = step(f"{way}-{end:g}", float(end), last)
                scores[way].append(keeper.score(last, end, end + EVERY))
            cost[way] = keeper.seconds
        judged = made.log.filter(pa.array((keeper.days >= ends[0]) & (keeper.days < ends[-1] + EVERY)))
    y, user = judged[made.market.label].to_numpy().astype(np.float64), judged["user"].to_numpy()
    p = {way: np.concatenate(pieces) for way, pieces in scores.items()}
    found: dict[str, Any] = {"seed": seed, "rows": len(y), "cpu_seconds": cost}
    for way, value in p.items():
        found[way] = {"auc": auc(value, y), "logloss": logloss(value, y)}
        if way != "stays":
            gain = compare(value, p["stays"], y, user, draws=300).auc
            found[way]["gain"], found[way]["low"], found[way]["high"] = gain.value, gain.low, gain.high
    return found


def table(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line per way: means over seeds; shares of the gain and of the time of full retraining."""
    rows = []
    for way in ("stays", *WAYS):
        gains = np.array([found[way].get("gain", 0.0) for found in runs])
        full = np.array([found["full"]["gain"] for found in runs])
        seconds = [found["cpu_seconds"].get(way, 0.0) for found in runs]
        several = len(runs) > 1
        rows.append(
            {
                "way": way,
                "auc": float(np.mean([found[way]["auc"] for found in runs])),
                "logloss": float(np.mean([found[way]["logloss"] for found in runs])),
                "gain": float(gains.mean()),
                "gain_se": float(gains.std(ddof=1)) / len(runs) ** 0.5 if several else None,
                "over_full": float((gains - full).mean()),
                "over_full_se": float((gains - full).std(ddof=1)) / len(runs) ** 0.5 if several else None,
                "share_of_gain": float(gains.sum() / full.sum()),
                "share_of_time": float(np.sum(seconds) / np.sum([found["cpu_seconds"]["full"] for found in runs])),
            }
        )
    return rows


def main() -> None:
    """Run what is missing, then write the tables."""
    options = study(__doc__, tuple(WORLDS))
    for world in options.only or WORLDS:
        market = dataclasses.replace(WORLDS[world], events=8_000) if options.quick else WORLDS[world]
        runs = []
        for seed in progress(range(options.seeds), world, unit="seed"):
            key = {"name": f"incremental {world}", "seed": seed, "market": repr(market), "ways": WAYS}
            key |= {"training": repr(TRAINING), "once": repr(ONCE)}
            runs.append(options.record(key, lambda market=market, seed=seed: run(market, seed)))
        found = {"ways": table(runs), "runs": runs, "rows": runs[0]["rows"]}
        options.update("incremental.json", {world.replace(" ", "_"): found, "seeds": len(runs)})


if __name__ == "__main__":
    main()
