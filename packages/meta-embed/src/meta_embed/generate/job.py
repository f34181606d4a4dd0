"""The batch job: a log of events of any length to a store with a vector for every member.

1. The log is read once and written into buckets by member, so that each fits into memory.
2. Each bucket becomes a part: the latest events of every member, adapted, encoded, sorted by key. A part is complete or
   absent, and a killed job continues with those that are missing. Under `torchrun` every process has its share of them.
3. The parts are merged into the store, in the order of the keys, in one go.

The same events give the same bytes, whatever was killed and however many processes there were.
"""

import heapq
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from core_tensor.app.files import atomic_path, reading, sweep
from core_tensor.app.ranks import ALONE, Ranks

from meta_embed.config import Config
from meta_embed.generate import history
from meta_embed.generate.spill import read_spilled, spill
from meta_embed.generate.vectors import make_vectors
from meta_embed.model.personalizer import Personalizer
from meta_embed.store.address import create_store
from meta_embed.store.base import Item
from meta_embed.store.codec import StoreInfo, encode_key, encode_records
from meta_embed.tasks.encode import Vocabulary
from meta_embed.tasks.events import build_events

_SCHEMA = pa.schema([("key", pa.binary()), ("value", pa.binary()), ("history", pa.binary()), ("time", pa.float64())])


@dataclass(frozen=True)
class GenerateOptions:
    """What to store.

    Attributes:
        codec: `int8` or `float32`.
        precision: Of the posterior precision: `none`, `diagonal` or `full` (for Thompson sampling).
        history: Whether to keep the latest events of each member, which a refresh needs.
        as_of: Events after this time, and labels known after it, are left out; seconds.
        buckets: Parts of the job; each must fit into memory.
    """

    codec: Literal["int8", "float32"] = "int8"
    precision: Literal["none", "diagonal", "full"] = "none"
    history: bool = True
    as_of: float = float("inf")
    buckets: int = 16

    def __post_init__(self) -> None:
        """Refuse a job without parts."""
        if self.buckets < 1:
            raise ValueError(f"buckets: expected at least 1, got {self.buckets}")


def generate(
    model: Personalizer,
    config: Config,
    vocabulary: Vocabulary,
    version: str,
    events: Path,
    store: str,
    work: Path,
    options: GenerateOptions | None = None,
    *,
    device: str = "cpu",
    ranks: Ranks = ALONE,
    report: Callable[[int], object] | None = None,
) -> dict[str, Any]:
    """Run the job, or what is left of it.

    Args:
        model: The model.
        config: Its options.
        vocabulary: Its vocabulary.
        version: Its version.
        events: Parquet file or folder.
        store: Address of the store.
        work: Folder for the parts, on a disk that all processes see; it is removed at the end.
        options: What to store.
        device: Where to compute.
        ranks: The processes that share the job.
        report: Called with the number of every finished bucket.

    Returns:
        `members`, `as_of` and `version`.
    """
    options = options or GenerateOptions()
    first, last = ranks.range(options.buckets)
    own = work / f"rank-{ranks.rank}-of-{ranks.size}"
    own.mkdir(parents=True, exist_ok=True)
    sweep(work)
    sweep(own)
    missing = [b for b in range(first, last) if not (work / f"part-{b}.parquet").exists()]
    kind = _kind(own)
    if missing and not kind:
        kind = spill(events, config.columns, own, range(first, last), options.buckets)
    for b in missing:
        _write_part(work / f"part-{b}.parquet", model, config, vocabulary, read_spilled(own, b), kind, options, device)
        if report is not None:
            report(b)
    kinds = [k for k in ranks.gather(kind) if k]
    ranks.barrier()
    result: dict[str, Any] = {}
    if ranks.first:
        result = _assemble(model, config, version, store, work, options, kinds[0] if kinds else "int")
        shutil.rmtree(work)
    return ranks.share(result)


def _kind(folder: Path) -> str:
    """Kind of the keys, where a process has spilled its buckets already."""
    mark = folder / "spilled"
    return mark.read_text() if mark.exists() else ""


def _write_part(
    path: Path,
    model: Personalizer,
    config: Config,
    vocabulary: Vocabulary,
    table: pa.Table | None,
    kind: str,
    options: GenerateOptions,
    device: str,
) -> None:
    """Members of one bucket, sorted by key."""
    rows: list[tuple[bytes, bytes, bytes, float]] = []
    if table is not None:
        log = history.until(build_events(table, config.columns, vocabulary), options.as_of)
        log = log.latest(config.episodes.support)
        records = make_vectors(model, log, options.precision, device)
        values = encode_records(records, _info(model, config, "", options, kind))
        histories = history.pack(log, config.columns) if options.history else [b""] * len(log)
        keys = [encode_key(key, kind) for key in log.keys.tolist()]
        rows = sorted(zip(keys, values, histories, records.times.tolist(), strict=True))
    columns = [
        pa.array(list(c), f.type) for c, f in zip(zip(*rows, strict=True) if rows else [()] * 4, _SCHEMA, strict=True)
    ]
    with atomic_path(path) as temporary:
        pq.write_table(pa.table(columns, schema=_SCHEMA), temporary)


def _info(model: Personalizer, config: Config, version: str, options: GenerateOptions, kind: str) -> StoreInfo:
    return StoreInfo(
        version=version,
        width=model.width,
        key=cast(Literal["int", "str"], kind),
        codec=options.codec,
        precision=options.precision,
        support=config.episodes.support,
        history=history.row_layout(config.columns).itemsize if options.history else 0,
    )


def _assemble(
    model: Personalizer, config: Config, version: str, store: str, work: Path, options: GenerateOptions, kind: str
) -> dict[str, Any]:
    """Merge the parts into the store."""
    parts = [work / f"part-{b}.parquet" for b in range(options.buckets)]
    newest, members = 0.0, 0
    for part in parts:
        with reading(part, "a part of this job"):
            times = pq.read_table(part, columns=["time"])["time"].to_numpy()
            members, newest = members + len(times), max(newest, float(times.max()) if len(times) else 0.0)
    info = _info(model, config, version, options, kind)
    info = StoreInfo(
        **{**{f: getattr(info, f) for f in info.__struct_fields__}, "as_of": newest, "cold": cold(model, config)}
    )
    create_store(store, info, heapq.merge(*(_items(part) for part in parts)))
    return {"members": members, "as_of": newest, "version": version}


def _items(part: Path) -> Iterator[Item]:
    with reading(part, "a part of this job"):
        for batch in pq.ParquetFile(part).iter_batches(4096, columns=["key", "value", "history"]):
            yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)


def cold(model: Personalizer, config: Config) -> tuple[float, ...]:
    """Vector of a member of whom nothing is known, not even features: unknown categories, numbers at their means.

    Args:
        model: The model.
        config: Its options.

    Returns:
        The vector.
    """
    layout = history.member_layout(config.columns)
    nobody = np.zeros(1, layout)
    with torch.no_grad():
        device = next(model.parameters()).device
        ids, dense = torch.from_numpy(nobody["ids"].copy()), torch.from_numpy(nobody["dense"].copy())
        return tuple(float(v) for v in model.prior(ids.to(device), dense.to(device))[0])
