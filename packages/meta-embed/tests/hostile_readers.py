"""Readers of files that somebody else can have written, for `tools/hostile.py`.

Not LMDB's: it maps its file into memory and has no checksums, so a spoiled page can end the process. Only truncated and
foreign files are refused there (tests/store); a store from elsewhere should come as SQLite or Parquet.
"""

from pathlib import Path
from typing import Any

CONFIG = """
columns:
  entity: member
  time: time
  label: clicked
  known: seen
  weight: weight
  row: [{name: item}, {name: shelf, buckets: 8}, {name: price, kind: dense}]
  member: [{name: profile, kind: dense, width: 2}]
model: {width: 3, hidden: 2, member_hidden: 2, precision: 2.5}
inner: {steps: 2, lr: 0.1}
episodes: {tasks: 4, support: 4, query: 4, cold: 0.25}
train: {epochs: 1, warm_epochs: 0, lr: 0.001, held_back: 0.2}
"""


def _table() -> Any:
    import numpy as np
    import pyarrow as pa

    n = 40
    rng = np.random.default_rng(0)
    return pa.table(
        {
            "member": np.arange(n) % 5,
            "time": np.arange(n) * 1.0,
            "seen": np.arange(n) + 0.5,
            "clicked": np.arange(n) % 2 * 1.0,
            "weight": rng.random(n),
            "item": rng.integers(4, size=n),
            "shelf": pa.array([f"shelf {i % 3}" for i in range(n)]),
            "price": rng.random(n),
            "profile": pa.array([[float(i % 5), 1.0] for i in range(n)], pa.list_(pa.float32())),
        }
    )


def _parts() -> Any:
    import yaml
    from meta_embed.config import parse_config
    from meta_embed.model.build import build_model
    from meta_embed.tasks.encode import build_vocabulary

    config = parse_config(yaml.safe_load(CONFIG))
    vocabulary = build_vocabulary(_table(), config.columns)
    return config, vocabulary, build_model(config, vocabulary)


def _config(folder: Path) -> Path:
    (folder / "c.yaml").write_text(CONFIG)
    return folder / "c.yaml"


def _read_config(path: Path) -> None:
    from meta_embed.config import read_config

    read_config(path)


def _events(folder: Path) -> Path:
    import pyarrow.parquet as pq

    pq.write_table(_table(), folder / "events.parquet")
    return folder / "events.parquet"


def _read_events(path: Path) -> None:
    from meta_embed.generate.history import merge, pack, unpack
    from meta_embed.tasks.events import build_events, read_table

    config, vocabulary, _ = _parts()
    log = build_events(read_table(path, config.columns), config.columns, vocabulary)
    again = unpack(log.keys, pack(log, config.columns), config.columns)
    merge(again, log, 8)


def _run(folder: Path) -> Path:
    from meta_embed.model.build import save_model

    config, vocabulary, model = _parts()
    save_model(folder, model, config, vocabulary)
    return folder


def _read_run(path: Path) -> None:
    import torch
    from meta_embed.model.build import load_model

    model, *_ = load_model(path)
    model.logits(torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 1), torch.zeros(2, 3))


def _trainer() -> Any:
    import numpy as np
    import torch

    _, _, model = _parts()
    return model, torch.optim.AdamW(model.parameters(), lr=0.1), np.random.default_rng(0)


def _checkpoint(folder: Path) -> Path:
    from meta_embed.train import checkpoint

    model, optimizer, rng = _trainer()
    sum(p.square().sum() for p in model.parameters()).backward()
    optimizer.step()
    best = {n: t.clone() for n, t in model.state_dict().items()}
    checkpoint.save(folder, model, optimizer, rng, checkpoint.Progress(1, 0.5, 1, best, [{"epoch": 1.0}]))
    return folder


def _read_checkpoint(path: Path) -> None:
    from meta_embed.train import checkpoint

    model, optimizer, rng = _trainer()
    checkpoint.load(path, model, optimizer, rng)
    sum(p.square().sum() for p in model.parameters()).backward()
    optimizer.step()
    rng.random()


def _store(kind: str) -> Any:
    def make(folder: Path) -> Path:
        import numpy as np
        from meta_embed.store.address import create_store
        from meta_embed.store.codec import Records, StoreInfo, encode_key, encode_records

        info = StoreInfo(version="v", width=3, key="str", precision="diagonal", cold=(0.0,) * 3, history=8)
        records = Records(np.ones((9, 3), np.float32), np.arange(9.0), np.arange(9), np.ones((9, 3), np.float32))
        keys = sorted(encode_key(f"member {k}", "str") for k in range(9))
        items = zip(keys, encode_records(records, info), [b"eight by"] * 9, strict=True)
        create_store(f"{kind}:{folder}", info, items)
        (folder / f".store.{kind}.writer").unlink()
        return folder

    return make


def _read_store(kind: str) -> Any:
    def read(folder: Path) -> None:
        from meta_embed.serve.lookup import Lookup
        from meta_embed.store.address import open_store
        from meta_embed.store.version import freshness

        with open_store(f"{kind}:{folder}") as store:
            Lookup(store)([f"member {k}" for k in range(12)])
            store.fetch_history(store.keys_of(["member 1"]))
            list(store.members())
            freshness(store, 10.0, 5.0)

    return read


READERS = [
    ("options", _config, _read_config),
    ("events", _events, _read_events),
    ("run", _run, _read_run),
    ("checkpoint", _checkpoint, _read_checkpoint),
    ("SQLite store", _store("sqlite"), _read_store("sqlite")),
    ("Parquet store", _store("parquet"), _read_store("parquet")),
]
