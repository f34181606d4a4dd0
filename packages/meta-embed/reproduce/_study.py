"""One user draw: every method tuned on held-back members and scored on members that no training saw.

The members are divided into as many parts as there are draws; draw k tests on part k, so every member is tested once.
Queries are a member's events 33 to 72, supports the first n events.
"""

import argparse
import functools
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import meta_embed
import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from core_tensor.app.files import atomic_path, digest
from meta_embed.adapt.maml import InnerOptions
from meta_embed.config import Config, ModelOptions, TrainOptions
from meta_embed.evaluate import baselines
from meta_embed.evaluate.buckets import SIZES, model_scores
from meta_embed.evaluate.metrics import Scores, paired_bootstrap
from meta_embed.model.build import build_model
from meta_embed.model.personalizer import Personalizer
from meta_embed.tasks.encode import Vocabulary, build_vocabulary
from meta_embed.tasks.events import Events, build_events
from meta_embed.tasks.schema import Schema
from meta_embed.tasks.split import Split, by_key, split_at
from meta_embed.train.outer import fit
from meta_embed.train.tune import EPOCHS, tune

QUERY, START = 40, 32
PRECISIONS = (1.0, 3.0, 10.0, 30.0)
"""Of a member's prior, for the MAP head and for the rows of ID models."""
SUPPORTS = tuple(n for n in SIZES if n > 0)


@dataclass(frozen=True)
class Draw:
    """Members of one draw, and the tasks they are asked.

    Attributes:
        config: Options to start from.
        vocabulary: Of the training members' events.
        train: Log of the training members.
        held_back: Log of the members that options are chosen on.
        tested: Log of the members that figures are measured on.
        epochs: Epochs of any training at most.
        precisions: Of the MAP head's prior, to choose from.
    """

    config: Config
    vocabulary: Vocabulary
    train: Events
    held_back: Events
    tested: Events
    epochs: int = EPOCHS
    precisions: tuple[float, ...] = PRECISIONS

    @functools.cached_property
    def warm(self) -> Config:
        """Options with precision and length of the warm start chosen on the held-back members."""
        return tune(
            self.train, self.held_back, self.config, self.vocabulary, precisions=self.precisions, epochs=self.epochs
        )

    @functools.cached_property
    def second_order(self) -> tuple[tuple[Personalizer, dict[str, Any]], tuple[int, float]]:
        """MAML of second order from its better start, and that start."""
        found = [(gradient_steps(self, InnerOptions(), start), start) for start in starts(self)]
        return min(found, key=lambda pair: pair[0][1]["held_back_loss"])

    def split(self, events: Events, n: int) -> Split:
        """Supports of n events, the same queries for every n."""
        return split_at(events, n, QUERY, start=START)


@dataclass
class Found:
    """What a method made of a draw.

    Attributes:
        tested: Scores of the tested members by support size.
        held_back: Of the held-back members.
        about: What was chosen, and seconds of CPU time.
    """

    tested: dict[int, Scores]
    held_back: dict[int, Scores] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)


def make_draw(
    table: pa.Table, schema: Schema, part: int, parts: int, quick: bool, width: int = 17, hidden: int = 32
) -> Draw:
    """Members of draw `part`: its part tests, 15 % of the others are held back."""
    config = Config(
        columns=schema,
        model=ModelOptions(width=width, hidden=hidden),
        train=TrainOptions(epochs=4 if quick else 25, patience=3),
    )
    empty: dict[str, list[Any]] = {f.name: [] for f in (*schema.row, *schema.member)}
    keys = build_events(table, schema, empty).keys
    tested = by_key(keys, tuple([1 / parts] * parts), 0)[part]
    rest = np.setdiff1d(np.arange(len(keys)), tested)
    held_back, train = (rest[p] for p in by_key(keys[rest], (0.15,), 1))
    seen = table.filter(pc.is_in(table[schema.entity], value_set=pa.array(keys[train])))
    vocabulary = build_vocabulary(seen, schema)
    log = build_events(table, schema, vocabulary)
    return Draw(config, vocabulary, *(log.choose(p) for p in (train, held_back, tested)), epochs=3 if quick else EPOCHS)


def scored(draw: Draw, model: Personalizer, about: dict[str, Any], *, adapted: bool = True) -> Found:
    """Scores of a model at every support size."""

    def by_size(log: Events) -> dict[int, Scores]:
        return {n: model_scores(model, log, draw.split(log, n), adapted=adapted) for n in SIZES}

    return Found(by_size(draw.tested), by_size(draw.held_back), about)


def none(draw: Draw) -> Found:
    """No personalization."""
    model = baselines.no_personalization(draw.train, draw.held_back, draw.config, draw.vocabulary, epochs=draw.epochs)
    return scored(draw, model, {}, adapted=False)


def retrained(maker: Callable[[Config, Vocabulary], baselines.Maker]) -> Callable[[Draw], Found]:
    """An ID model, retrained for every support size."""

    def run(draw: Draw) -> Found:
        make, lr = maker(draw.config, draw.vocabulary), draw.config.train.warm_lr
        splits = [draw.split(draw.held_back, n) for n in SUPPORTS]
        tuned = baselines.tune_id(
            make, draw.train, draw.held_back, splits, lr, epochs=draw.epochs, shrinkages=PRECISIONS
        )
        found = Found({})
        for n, best in zip(SUPPORTS, tuned, strict=True):
            split = draw.split(draw.tested, n)
            found.tested[n] = baselines.retrained_id(make, draw.train, draw.tested, split, best.choice, lr)
            found.held_back[n] = best.scores
            found.about[f"n{n}"] = {**vars(best.choice), "held_back_loss": best.loss}
        return found

    return run


def trained(draw: Draw, config: Config, rates: tuple[float, ...], seed: int = 0) -> tuple[Personalizer, dict[str, Any]]:
    """Meta-train at each outer rate and keep the best by the held-back members' loss."""
    best: tuple[float, Personalizer, dict[str, Any]] | None = None
    for lr in rates:
        trial = msgspec.structs.replace(config, train=msgspec.structs.replace(config.train, lr=lr))
        model = build_model(trial, draw.vocabulary, seed)
        progress = fit(model, draw.train, draw.held_back, trial, seed=seed)
        about = {
            "lr": lr,
            "warm_epochs": config.train.warm_epochs,
            "precision": config.model.precision,
            "best_epoch": progress.best_epoch,
            "held_back_loss": progress.best,
        }
        if best is None or progress.best < best[0]:
            best = (progress.best, model, about)
    assert best is not None
    return best[1], best[2]


def map_head(seed: int = 0, *, meta: bool = True) -> Callable[[Draw], Found]:
    """The MAP head; with `meta=False` fold-in over the trained item vectors, without meta-training."""

    def run(draw: Draw) -> Found:
        config = draw.warm
        if not meta:
            config = msgspec.structs.replace(config, train=msgspec.structs.replace(config.train, epochs=0))
        return scored(draw, *trained(draw, config, (1e-3, 3e-4) if meta else (1e-3,), seed))

    return run


def map_narrow(width: int) -> Callable[[Draw], Found]:
    """The MAP head with another width."""

    def run(draw: Draw) -> Found:
        model = msgspec.structs.replace(draw.config.model, width=width)
        narrow = replace(draw, config=msgspec.structs.replace(draw.config, model=model))
        return scored(draw, *trained(narrow, narrow.warm, (1e-3, 3e-4)))

    return run


def starts(draw: Draw) -> tuple[tuple[int, float], ...]:
    """Warm epochs and outer rate of the two ways to begin: from the warm start, or cold at a higher rate."""
    return (draw.warm.train.warm_epochs, 1e-3), (0, 5e-3)


def gradient_steps(draw: Draw, inner: InnerOptions, start: tuple[int, float]) -> tuple[Personalizer, dict[str, Any]]:
    """Meta-train gradient steps from one start."""
    config = msgspec.structs.replace(
        draw.warm,
        model=msgspec.structs.replace(draw.warm.model, method="maml"),
        inner=inner,
        train=msgspec.structs.replace(draw.warm.train, warm_epochs=start[0]),
    )
    return trained(draw, config, (start[1],))


def maml(*inner: InnerOptions) -> Callable[[Draw], Found]:
    """Gradient steps, from the start that is best for MAML of second order; the best of several inner loops.

    Start and inner loop are chosen on the held-back members.
    """

    def run(draw: Draw) -> Found:
        best, start = draw.second_order
        found = [best if each == InnerOptions() else gradient_steps(draw, each, start) for each in inner]
        chosen = min(range(len(inner)), key=lambda i: found[i][1]["held_back_loss"])
        model, about = found[chosen]
        return scored(draw, model, {**about, "inner_lr": inner[chosen].lr})

    return run


VARIANTS = {
    "maml_first_order": "MAML, first order",
    "anil": "ANIL (last layer)",
    "maml_tensor": "MAML, a learned rate per tensor",
    "maml_fixed": "MAML, one tuned rate",
}
"""Of MAML of second order with one learned rate."""

METHODS: Mapping[str, Callable[[Draw], Found]] = {
    "none": none,
    "id": retrained(baselines.id_maker),
    "deep": retrained(baselines.deep_maker),
    "wide": retrained(baselines.wide_maker),
    "fold_in": map_head(meta=False),
    "map": map_head(),
    "map_again": map_head(seed=1),
    "map_narrow": map_narrow(7),
    "maml": maml(InnerOptions()),
    "maml_first_order": maml(InnerOptions(order=1)),
    "anil": maml(InnerOptions(adapt="last")),
    "maml_tensor": maml(InnerOptions(rates="tensor")),
    "maml_fixed": maml(*(InnerOptions(rates="fixed", lr=lr) for lr in (0.03, 0.1, 0.3, 1.0))),
}


def differences(
    pairs: Sequence[tuple[str, str]], methods: Mapping[str, Sequence[Found]], labels: Mapping[str, str]
) -> list[dict[str, Any]]:
    """AUC of one method over another by support size, with intervals of a paired bootstrap over members."""
    rows = []
    for ours, peer in pairs:
        row: dict[str, Any] = {"pair": f"{ours}-{peer}", "ours": ours, "peer": peer}
        row["compared"] = f"{labels[ours]} over {labels[peer]}"
        for n in SIZES:
            both = [[f.tested[n] for f in methods[m] if n in f.tested] for m in (ours, peer)]
            if not (both[0] and both[1]):  # an ID embedding says nothing at 0 events
                row |= {f"n{n}": None, f"n{n}_low": None, f"n{n}_high": None, f"n{n}_text": None}
                continue
            d = paired_bootstrap(*both, draws=400)
            text = f"{d.value:+.4f} ({d.low:+.4f} to {d.high:+.4f})"
            row |= {f"n{n}": d.value, f"n{n}_low": d.low, f"n{n}_high": d.high, f"n{n}_text": text}
        rows.append(row)
    return rows


def run(method: str, draw: Draw, path: Path) -> Found:
    """What a method makes of a draw, from its file if it is there already."""
    if not path.exists():
        start = time.process_time()
        found = METHODS[method](draw)
        found.about["cpu_seconds"] = round(time.process_time() - start, 1)
        save(found, path)
    return load(path)


def save(found: Found, path: Path) -> None:
    """One file per method and draw."""
    arrays: dict[str, Any] = {"about": np.frombuffer(msgspec.json.encode(found.about), np.uint8)}
    for part in ("tested", "held_back"):
        for n, scores in getattr(found, part).items():
            arrays |= {f"{part}-{n}-{name}": value for name, value in vars(scores).items()}
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def load(path: Path) -> Found:
    """Read such a file."""
    with np.load(path) as arrays:
        found = Found({}, {}, msgspec.json.decode(arrays["about"].tobytes()))
        for name in arrays.files:
            if name.endswith("-logit"):
                part, n, _ = name.split("-")
                scores = Scores(*(arrays[f"{part}-{n}-{key}"] for key in ("logit", "y", "owner")))
                getattr(found, part)[int(n)] = scores
    return found


def arguments(parser: argparse.ArgumentParser, results: Path, *code: str) -> tuple[argparse.Namespace, Path, Path]:
    """The options all scripts share, the file to write, and the folder of finished parts.

    Parts of other code, in the files of `code` or in the package, are never taken for this code's.
    """
    parser.add_argument("--quick", action="store_true", help="one small draw, few epochs: under two minutes")
    parser.add_argument("-o", "--out", type=Path, help="file to write, or a folder for it")
    parser.add_argument("--work", type=Path, help="folder of finished parts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    out = options.out or (Path(f"{results.stem}_quick.json") if options.quick else results)
    out = out / results.name if out.is_dir() else out
    package = sorted(Path(meta_embed.__file__).parent.rglob("*.py"))
    kind = f"{'quick' if options.quick else 'full'}-{digest(*(Path(name) for name in code), *package)[:8]}"
    work = (options.work or Path(tempfile.gettempdir()) / "meta-embed-reproduce") / kind
    work.mkdir(parents=True, exist_ok=True)
    return options, out, work
