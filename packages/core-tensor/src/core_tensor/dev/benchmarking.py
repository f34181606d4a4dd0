"""Benchmarks by paired, interleaved runs (A B A B ...) in CPU time; what every `bench.py` and `bars.py` runs."""

import argparse
import gc
import json
import operator
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from core_tensor.app.files import read_json, write_json


@dataclass(frozen=True)
class Comparison:
    """Paired times of two programs that ran in turn.

    Attributes:
        ours: Seconds of the first program, one entry per pair.
        peer: Seconds of the second program, one entry per pair.
    """

    ours: tuple[float, ...]
    peer: tuple[float, ...]

    @property
    def speedup(self) -> float:
        """Median over the pairs of peer's time / our time; above 1 we are faster."""
        return statistics.median(p / o for o, p in zip(self.ours, self.peer, strict=True))

    @property
    def ratio(self) -> float:
        """Median over the pairs of our time / peer's time; below 1 we are faster."""
        return statistics.median(o / p for o, p in zip(self.ours, self.peer, strict=True))

    def spread(self) -> dict[str, Any]:
        """Least, median and greatest of both times and of the speed-up, for reports.

        Returns:
            `{"ours_s": [...], "peer_s": [...], "speedup": [...]}`, each as minimum, median, maximum.
        """
        gains = [p / o for o, p in zip(self.ours, self.peer, strict=True)]
        return {
            name: [round(f(values), 6) for f in (min, statistics.median, max)]
            for name, values in (("ours_s", self.ours), ("peer_s", self.peer), ("speedup", gains))
        }


def seconds(function: Callable[[], Any], clock: Callable[[], float] = time.process_time) -> float:
    """Time of one call, in seconds of CPU time of this process unless another clock is given.

    Args:
        function: What to time.
        clock: Seconds counter.

    Returns:
        Seconds.
    """
    gc.collect()
    start = clock()
    function()
    return clock() - start


def compare(
    ours: Callable[[], Any],
    peer: Callable[[], Any],
    *,
    pairs: int = 5,
    warmup: int = 1,
    clock: Callable[[], float] = time.process_time,
) -> Comparison:
    """Time two functions in turn, so that a drift of the machine's speed hits both.

    A peer whose warm-up takes over five seconds runs one pair only.

    Args:
        ours: Our function.
        peer: The function to compare with.
        pairs: Pairs of counted runs.
        warmup: Runs of each that are not counted.
        clock: Seconds counter, CPU time of this process by default.

    Returns:
        The paired times.
    """
    slowest = 0.0
    for _ in range(warmup):
        slowest = max(slowest, seconds(ours, clock), seconds(peer, clock))
    gc.collect()
    gc.freeze()  # what lives by now need not be looked through again before every run, which takes longer than most
    try:
        times = [(seconds(ours, clock), seconds(peer, clock)) for _ in range(1 if slowest > 5 else pairs)]
    finally:
        gc.unfreeze()
    return Comparison(tuple(o for o, _ in times), tuple(p for _, p in times))


Bar = Callable[[bool], Mapping[str, Any]]


def run_bars(distribution: str, bars: Mapping[str, Bar]) -> None:
    """The `main` of every `benchmarks/bench.py`: `--quick`, `--only KEY`, `--json`, one thread.

    Each bar is a function of `quick` that returns the keys it measures; a key with the suffix `_detail` carries the
    spread. A peer that cannot be imported makes its bar's keys null, with the reason under `<bar>_reason`.

    Args:
        distribution: Name of the distribution.
        bars: Functions by name of the bar.
    """
    parser = argparse.ArgumentParser(description=f"Benchmarks of {distribution}: CPU time of one thread, in pairs.")
    parser.add_argument("--quick", action="store_true", help="finish within six minutes")
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    parser.add_argument("--only", metavar="KEY", action="append", choices=sorted(bars), help="run one bar")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name, bar in bars.items():
        if options.only and name not in options.only:
            continue
        try:
            measured = dict(bar(options.quick))
        except ModuleNotFoundError as error:
            measured = {name: None, f"{name}_reason": f"peer not installed: {error.name}"}
        for key, value in measured.items():
            print(f"{key:44s} {value}", flush=True)
        results |= measured
    if options.json:
        print(json.dumps(results, allow_nan=False))


Limit = tuple[Literal["<=", ">="], float] | None


def record_bars(
    script: str,
    limits: Mapping[str, Limit],
    *,
    elsewhere: Callable[[Path], Mapping[str, float]] | None = None,
    quick: Sequence[str] = (),
) -> None:
    """The `main` of every `reproduce/bars.py`: `--only KEY`, `--runs`, `--quick`, `-o`; writes `bars.json`.

    Runs `benchmarks/bench.py` with the interpreter that runs this; peers are installed where `nox -s bench` has put its
    environment. Of every bar it writes the median, least and greatest of the runs and their number, beside its limit. A
    bar that was not asked for, or is null here, keeps what it has.

    Args:
        script: `__file__` of the script, which lies in `reproduce`.
        limits: What each bar has to reach; None for one that is reported only.
        elsewhere: Gives bars that other scripts have measured, from the folder of their results.
        quick: Keys of `bench.py` that `--quick` runs; all if empty.
    """
    folder = Path(script).parent
    usage = "Run benchmarks/bench.py and write down its bars beside their limits."
    parser = argparse.ArgumentParser(description=usage)
    parser.add_argument("--only", metavar="KEY", action="append", default=[], help="run one key of bench.py")
    parser.add_argument("--runs", type=int, default=3, help="runs of each bar, whose median counts [3; 1 with --quick]")
    parser.add_argument("--quick", action="store_true", help="once, as bench.py --quick, and not into results/")
    parser.add_argument("-o", "--out", type=Path, help="folder for bars.json [results/; out/ with --quick]")
    options = parser.parse_args()
    out = options.out or (Path("out") / f"{folder.parent.name}-bars-quick" if options.quick else folder / "results")
    out.mkdir(parents=True, exist_ok=True)
    keys = [word for key in options.only or (quick if options.quick else ()) for word in ("--only", key)]
    command = [sys.executable, folder.parent / "benchmarks" / "bench.py", "--json", *keys, *["--quick"] * options.quick]

    # 1. what the benchmark says, run by run
    found: dict[str, list[float]] = {}
    for _ in range(1 if options.quick else options.runs):
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        for bar, value in json.loads(done.stdout.splitlines()[-1]).items():
            if isinstance(value, int | float) and not bar.endswith("_detail"):
                found.setdefault(bar, []).append(value)

    # 2. beside what is known already
    path = out / "bars.json"
    bars: dict[str, Any] = read_json(path)["bars"] if path.exists() else {}
    for bar, value in (elsewhere(folder / "results") if elsewhere else {}).items():
        bars[bar] = {"measured": value, "least": None, "greatest": None, "runs": None}  # their own page tells
    for bar, values in found.items():
        ends = {"least": min(values), "greatest": max(values)}
        bars[bar] = {"measured": statistics.median(values), **ends, "runs": len(values)}
    names = [*limits, *(bar for bar in bars if bar not in limits)]
    write_json(path, {"bars": bars, "table": [_row(bar, limits.get(bar), bars.get(bar)) for bar in names]})


def _row(bar: str, limit: Limit, found: Mapping[str, Any] | None) -> dict[str, Any]:
    """One line of the docs' table."""
    figures = {name: found[name] if found else None for name in ("measured", "least", "greatest", "runs")}
    if limit is None:
        return {"bar": bar, "limit": "reported", **figures, "met": None}
    relation, value = limit
    holds = {"<=": operator.le, ">=": operator.ge}[relation]
    met = holds(found["measured"], value) if found else None
    return {"bar": bar, "limit": f"{relation} {value:g}", **figures, "met": met}
