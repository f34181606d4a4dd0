"""Isolation by construction against the engine of proofs that it has replaced: `results/engines.json`.

    git worktree add OLD 67cae9a                      # the last commit with proofs
    uv venv OLD/.venv && uv pip install --python OLD/.venv/bin/python OLD/packages/core-tensor OLD/packages/msam
    python packages/msam/reproduce/engines.py --proofs OLD/.venv/bin/python [--rounds 2] [-o FOLDER]

CPU time of a ghost step over a plain one, one thread. The two engines are different versions of the package, so each
measurement is a process of its own; they take turns. Within a process plain and ghost steps take turns too.
"""

import argparse
import copy
import importlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
CASES = {
    "small MLP": ("mlp", 8, 20, 24), "large MLP": ("large-mlp", 8, 2, 12),
    "transformer": ("transformer", 4, 1, 12), "CNN": ("cnn", 4, 1, 16),
}  # fmt: skip
"""Model, micro-batches, steps of a turn, pairs of turns."""


def measured(name: str, micro_batches: int, repeats: int, pairs: int) -> float:
    """Median over pairs of turns, at two places in memory, with the version that this interpreter has."""
    import torch
    from msam import MSAM
    from torch.nn import functional as F

    torch.set_num_threads(1)
    try:
        make = importlib.import_module("msam.study.cost").model_and_batch
    except ModuleNotFoundError:  # before the package had rooms
        make = importlib.import_module("msam.cost").model_and_batch

    def loss_of(model: Any) -> Callable[[Any], Any]:
        return lambda part: F.cross_entropy(model(part[0]), part[1])

    def turn(step: Callable[[], Any]) -> float:
        start = time.process_time()
        for _ in range(repeats):
            step()
        return time.process_time() - start

    ratios = []
    for _ in range(2):
        model, batch = make(name)
        twin = copy.deepcopy(model)
        sgd = torch.optim.SGD(model.parameters(), lr=1e-4)
        ours = MSAM(twin, torch.optim.SGD, lr=1e-4, num_micro_batches=micro_batches, mode="ghost")

        def plain(sgd: Any = sgd, model: Any = model, batch: Any = batch) -> None:
            sgd.zero_grad()
            loss_of(model)(batch).backward()
            sgd.step()

        def ghost(ours: Any = ours, twin: Any = twin, batch: Any = batch) -> None:
            ours.step(loss_of(twin), batch)

        for step in (plain, ghost, ghost):
            turn(step)
        pairs_of_turns = [(turn(plain), turn(ghost)) for _ in range(pairs // 2)]
        ratios += [late / early for early, late in pairs_of_turns]
    return statistics.median(ratios)


def main() -> None:
    """Let both versions take turns and write down what they say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--proofs", metavar="PYTHON", help="interpreter with the version that proved")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--one", choices=CASES, help="print one measurement of this interpreter's version")
    parser.add_argument("-o", "--out", type=Path, default=RESULTS, help="folder for engines.json")
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(measured(*CASES[options.one])))
        return
    if options.proofs is None:
        parser.error("--proofs: expected an interpreter with msam of the last commit that proved")
    rows = []
    for case, (_, micro_batches, *_) in CASES.items():
        found: dict[str, list[float]] = {"proofs": [], "construction": []}
        for _ in range(options.rounds):
            for engine, python in (("proofs", options.proofs), ("construction", sys.executable)):
                done = subprocess.run([python, __file__, "--one", case], check=True, stdout=subprocess.PIPE, text=True)
                found[engine].append(float(done.stdout))
        rows.append({"model": case, "m": micro_batches} | {name: statistics.median(v) for name, v in found.items()})
    from core_tensor.app.files import write_json  # which the older version does not have

    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "engines.json", {"table": rows})


if __name__ == "__main__":
    main()
