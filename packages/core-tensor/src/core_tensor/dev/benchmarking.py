"""Benchmarks by paired, interleaved runs (A B A B ...) in CPU time, and the `bench.py` shell of every package."""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


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
