"""A training from files to a run folder: `meta-embed train`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
from core_tensor.app.files import read_json, write_json
from core_tensor.app.ranks import Ranks
from core_tensor.app.runs import RunFolder

from meta_embed.config import Config, parse_config
from meta_embed.model.build import build_model, load_model, save_model
from meta_embed.model.personalizer import Personalizer
from meta_embed.tasks.encode import Vocabulary, build_vocabulary, entity_keys, with_scales
from meta_embed.tasks.events import Events, build_events, read_table
from meta_embed.train.outer import fit, split_members
from meta_embed.train.tune import tune

_TUNED = "tuned.json"
Report = Callable[[dict[str, float]], None]


def train_run(
    run: RunFolder, events: Path, config: Config, seed: int, ranks: Ranks, *, tuned: bool, report: Report | None = None
) -> dict[str, Any]:
    """Train in a claimed folder, or resume where a killed process stopped.

    Args:
        run: The folder.
        events: Parquet file or folder.
        config: Options.
        seed: Seed.
        ranks: The processes that share the work.
        tuned: Whether shrinkage and length of the warm start are chosen on the held-back members.
        report: Called with every trial's and every epoch's figures.

    Returns:
        What the folder records: version, figures, and where the events are.
    """
    table = read_table(events, config.columns)
    train, held_back, vocabulary, config = training_parts(table, config, seed)
    if tuned and config.model.method == "map" and config.train.warm_epochs:
        config = _tuned(run.path, train, held_back, config, vocabulary, seed, ranks, report)
    model = build_model(config, vocabulary, seed)
    progress = fit(model, train, held_back, config, seed=seed, folder=run.path, ranks=ranks, report=report)
    version = save_model(run.path, model, config, vocabulary) if ranks.first else ""
    return {
        "version": ranks.share(version),
        "events": str(events.resolve()),
        "seed": seed,
        "members": len(train),
        "best_epoch": progress.best_epoch,
        "held_back_loss": progress.best,
        "warm_epochs": config.train.warm_epochs,
        "precision": config.model.precision,
    }


def training_parts(table: pa.Table, config: Config, seed: int) -> tuple[Events, Events, dict[str, list[Any]], Config]:
    """Training and held-back members of a log, and what the training members' events say of the columns.

    Args:
        table: The log.
        config: Columns and shares.
        seed: Seed.

    Returns:
        Training log, held-back log, vocabulary, and the options with the dense columns' means and scales.
    """
    empty: dict[str, list[Any]] = {f.name: [] for f in (*config.columns.row, *config.columns.member)}
    keys = build_events(table, config.columns, empty)
    train, held_back, _ = split_members(keys, config, seed)
    column = entity_keys(config.columns.entity, table[config.columns.entity])
    seen = pa.array(keys.keys[train].tolist(), column.type)
    known = table.filter(pc.is_in(column, value_set=seen))
    vocabulary = build_vocabulary(known, config.columns)
    config = msgspec.structs.replace(config, columns=with_scales(known, config.columns))
    log = build_events(table, config.columns, vocabulary)
    return log.choose(train), log.choose(held_back), vocabulary, config


def _tuned(
    folder: Path, train: Events, held_back: Events, config: Config, vocabulary: Vocabulary, seed: int, ranks: Ranks,
    report: Report | None,
) -> Config:  # fmt: skip
    """Tune once on rank 0; a resumed run finds what was chosen."""
    chosen: Any = None
    if ranks.first:
        path = folder / _TUNED
        if path.exists():
            chosen = read_json(path)
        else:
            chosen = msgspec.to_builtins(tune(train, held_back, config, vocabulary, seed, report=report))
            write_json(path, chosen)
    return parse_config(ranks.share(chosen))


def load_with_parts(
    folder: Path, events: Path | None
) -> tuple[Personalizer, Config, Vocabulary, str, tuple[Events, Events, Events]]:
    """The model of a finished run, and the parts of the members that its training made.

    Args:
        folder: The run folder.
        events: Events; None for those of the training.

    Returns:
        Model, options, vocabulary, version, and training, held-back and test log.

    Raises:
        ValueError: If the run is not finished.
    """
    from core_tensor.app.runs import read_record

    model, config, vocabulary, version = load_model(folder)
    result = read_record(folder)["result"] or {}
    if not isinstance(result.get("events"), str) or not isinstance(result.get("seed"), int):
        raise ValueError(f"{folder}: expected a finished `meta-embed train`")
    table = read_table(events or Path(result["events"]), config.columns)
    log = build_events(table, config.columns, vocabulary)
    train, held_back, tested = (log.choose(part) for part in split_members(log, config, result["seed"]))
    if not len(tested):
        raise ValueError(f"{folder}: no member was set aside to test on; train with train.tested above 0")
    return model, config, vocabulary, version, (train, held_back, tested)
