"""Readers of files that somebody else can have written, for `tools/hostile.py`."""

from pathlib import Path
from typing import Any

SCHEMA = """
time: {column: t}
group: u
labels: [{name: y}]
features:
- {kind: id, name: u, rows: 16}
- {kind: id, name: i, vocabulary: static, rows: 16}
- {kind: dense, name: x, transform: quantile}
- {kind: history, name: h, key: u, item: i, action: y, length: 3}
- {kind: popularity, name: p, key: [i], label: y}
"""


def _table() -> Any:
    import numpy as np
    import pyarrow as pa

    n = 40
    rng = np.random.default_rng(0)
    return pa.table(
        {
            "t": np.arange(n),
            "u": rng.integers(4, size=n),
            "i": rng.integers(4, size=n),
            "x": rng.random(n),
            "y": np.arange(n) % 2,
        }
    )


def _schema(folder: Path) -> Path:
    (folder / "schema.yaml").write_text(SCHEMA)
    return folder / "schema.yaml"


def _read_schema(path: Path) -> None:
    from lirank.schema.features import load_schema
    from lirank.schema.layout import Layout

    layout = Layout(load_schema(path))
    _ = layout.ranges, layout.dense, layout.sequences


def _config(folder: Path) -> Path:
    (folder / "model.yaml").write_text("dim: 8\ncross: residual\nwidths: [16, 8]\ndropout: 0.1\n")
    return folder / "model.yaml"


def _read_config(path: Path) -> None:
    from lirank.model.config import load_config

    load_config(path)


def _log(folder: Path) -> Path:
    import pyarrow.parquet as pq

    pq.write_table(_table(), folder / "log.parquet")
    return folder / "log.parquet"


def _read_log(path: Path) -> None:
    from lirank.data.batch import Encoder
    from lirank.data.parquet import ParquetLog
    from lirank.features.causal import CausalFeatures
    from lirank.schema.features import parse_schema

    schema = parse_schema(SCHEMA)
    log = ParquetLog.open(path)
    log.require(schema.columns())
    encoder = Encoder(schema)
    for table in log.read(schema.columns()):
        extended = CausalFeatures(schema, 1.0).extend(table)
        encoder.encode(extended)
        encoder.observe(extended)


def _run(folder: Path) -> Path:
    import torch
    from lirank.data.batch import Encoder
    from lirank.features.causal import CausalFeatures
    from lirank.model.config import ModelConfig
    from lirank.model.ranker import Ranker
    from lirank.schema.features import parse_schema
    from lirank.train.run import TrainedModel

    schema = parse_schema(SCHEMA)
    encoder, causal = Encoder(schema), CausalFeatures(schema, 1.0)
    table = causal.extend(_table())
    encoder.observe(table)
    torch.manual_seed(0)
    config = ModelConfig(dim=2, widths=(2,), cross_rank=2, history_width=2, calibration_buckets=3)
    TrainedModel(Ranker(encoder, config), encoder, causal, {}, table.slice(0, 4)).save(folder)
    return folder


def _read_run(path: Path) -> None:
    import pyarrow as pa
    from lirank.train.run import TrainedModel

    trained = TrainedModel.load(path)
    if trained.sample is not None:
        trained.model.predict(trained.encoder.encode(trained.sample))
    row = pa.table({"t": [10**6], "u": [1], "i": [2], "x": [0.5]})
    trained.model.predict(trained.encoder.encode(trained.causal.lookup(row), labels=False))


def _checkpoint(folder: Path) -> Path:
    import torch
    from lirank.train import checkpoint

    checkpoint.save(folder / "checkpoint.safetensors", {"a": torch.zeros(3)}, {"epoch": 1})
    return folder / "checkpoint.safetensors"


def _read_checkpoint(path: Path) -> None:
    from lirank.train import checkpoint

    checkpoint.load(path)


def _posterior(folder: Path) -> Path:
    import torch
    from lirank.explore.posterior import LogisticPosterior

    generator = torch.Generator().manual_seed(0)
    phi = torch.randn(20, 3, generator=generator)
    posterior = LogisticPosterior.prior(3).updated(phi, (phi[:, 0] > 0).double())
    posterior.save(folder / "posterior.safetensors", {"run": "x", "label": "y"})
    return folder / "posterior.safetensors"


def _read_posterior(path: Path) -> None:
    import torch
    from lirank.explore.posterior import Posterior

    posterior, _ = Posterior.read(path)
    phi = torch.ones(2, len(posterior.mean))
    posterior.variance(phi), posterior.score(phi)


def _labeler(folder: Path) -> Path:
    import pyarrow as pa
    from lirank.features.dwell import DwellLabeler

    labeler = DwellLabeler(["device"], least=2)
    labeler.add(pa.table({"device": ["a", "b", "a", "a"], "dwell": [1.0, 2.0, 3.0, 4.0]}))
    labeler.save(folder / "dwell.safetensors")
    return folder / "dwell.safetensors"


def _read_labeler(path: Path) -> None:
    import pyarrow as pa
    from lirank.features.dwell import DwellLabeler

    DwellLabeler.load(path).label(pa.table({"device": ["a", "c"], "dwell": [1.0, 2.0]}))


def _shards(folder: Path) -> Path:
    import torch
    from core_tensor.app.ranks import ALONE
    from lirank.distributed.reshard import save_shards

    save_shards(folder, {"weight": torch.arange(14.0).view(7, 2), "first": torch.zeros(7)}, 7, ALONE)
    return folder


def _read_shards(path: Path) -> None:
    from core_tensor.app.ranks import ALONE
    from lirank.distributed.reshard import load_shards

    load_shards(path, 7, ALONE)


def _curvature(folder: Path) -> Path:
    from lirank.train.prior import save_curvature

    save_curvature(folder / "curvature.safetensors", dict(_linear().state_dict()))
    return folder / "curvature.safetensors"


def _linear() -> Any:
    import torch

    return torch.nn.Linear(3, 2)


def _read_curvature(path: Path) -> None:
    from lirank.train.prior import load_curvature

    load_curvature(path, _linear())


def _onnx(folder: Path) -> Path:
    from lirank.serve import deploy
    from lirank.train.run import TrainedModel

    run = folder / "run"
    run.mkdir()
    trained = TrainedModel.load(_run(run))
    deploy.export(trained, trained.encoder.encode(trained.sample), folder / "model.onnx")
    return folder / "model.onnx"


def _read_onnx(path: Path) -> None:
    from lirank.serve.export import OnnxModel

    OnnxModel(path)


READERS = [
    ("schema", _schema, _read_schema),
    ("model configuration", _config, _read_config),
    ("log", _log, _read_log),
    ("run", _run, _read_run),
    ("checkpoint", _checkpoint, _read_checkpoint),
    ("posterior", _posterior, _read_posterior),
    ("dwell labeler", _labeler, _read_labeler),
    ("shards", _shards, _read_shards),
    ("curvature", _curvature, _read_curvature),
    ("ONNX model", _onnx, _read_onnx),
]
