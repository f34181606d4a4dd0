"""Benchmarks of lirank: a training step and its table, calibration, 8-bit rows, export, replay, and real logs.

Ratios are CPU time of one thread, in interleaved pairs. The step has the architecture of FuxiCTR's DCNv2 on both sides:
26 categorical and 13 numeric fields embedded at 16 (n = 624), three full cross layers beside an MLP of 512 and 256,
batch 2048, Zipf ids. FuxiCTR trains with dense Adam and clips the norm over all tables, as its `train_step` does,
DeepCTR-Torch with dense Adam; lirank with lazy Adam on the rows of the batch, whose trajectory is another one. A table
that cost nothing would give about 1.35 (1 M rows) and 2.7 (4 M): the dense part is what is left.
"""

import contextlib
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from core_tensor.dev.benchmarking import compare, run_bars, seconds
from core_tensor.memory import huge_pages
from core_tensor.ops.quantized_gather import quantize_rows, quantized_gather
from core_tensor.ops.row_update import reference, row_update
from lirank.layers.cross import CrossNetwork
from lirank.layers.isotonic import IsotonicLayer
from lirank.layers.mlp import MLP
from lirank.layers.table import FusedTable
from lirank.train.row_optimizers import RowOptimizer
from torch import Tensor, nn
from torch.nn import functional as F

REPRODUCE = Path(__file__).resolve().parents[1] / "reproduce"
CATEGORICAL, NUMERIC, DIM, BATCH = 26, 13, 16, 2048
WIDTH = (CATEGORICAL + NUMERIC) * DIM
Step = Callable[[], None]


def zipf_ids(rows: int, count: int, seed: int) -> Tensor:
    """Ids of every field with a long tail, shape (count, CATEGORICAL), each field in its own run of rows."""
    size = rows // CATEGORICAL
    draws = torch.rand(count, CATEGORICAL, generator=torch.Generator().manual_seed(seed)).double()
    local = (size**draws - 1).long().clamp(0, size - 1)  # log-uniform: density 1 / rank
    return local + torch.arange(CATEGORICAL) * size


class Dense(nn.Module):
    """Cross network beside an MLP."""

    def __init__(self, rank: int | None = None) -> None:
        super().__init__()
        self.numeric = nn.Parameter(torch.randn(NUMERIC, DIM) * 0.01)
        self.cross, self.mlp = CrossNetwork(WIDTH, 3, rank), MLP(WIDTH, (512, 256))
        self.head = nn.Linear(WIDTH + 256, 1)

    def forward(self, vectors: Tensor, x: Tensor) -> Tensor:
        """Logits, shape (B,)."""
        x0 = torch.cat([vectors.flatten(1), (x[:, :, None] * self.numeric).flatten(1)], 1)
        logits: Tensor = self.head(torch.cat([self.cross(x0), self.mlp(x0)], 1))[:, 0]
        return logits


def our_step(rows: int, rank: int | None = None) -> Step:
    """A training step with the fused table."""
    torch.manual_seed(0)
    table, model = FusedTable(rows, DIM), Dense(rank)
    rows_optimizer, optimizer = RowOptimizer(table), torch.optim.Adam(model.parameters(), foreach=True)
    batches = [(zipf_ids(rows, BATCH, s), torch.randn(BATCH, NUMERIC), torch.rand(BATCH).round()) for s in range(4)]
    turn = 0

    def step() -> None:
        nonlocal turn
        ids, x, y = batches[turn % 4]
        turn += 1
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(model(table(ids), x), y).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        rows_optimizer.step(table.take_touched())
        optimizer.step()

    return step


def dense_part() -> Step:
    """The same step on vectors that are there already."""
    torch.manual_seed(0)
    model = Dense()
    optimizer = torch.optim.Adam(model.parameters(), foreach=True)
    vectors = torch.randn(BATCH, CATEGORICAL, DIM, requires_grad=True)
    x, y = torch.randn(BATCH, NUMERIC), torch.rand(BATCH).round()

    def step() -> None:
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(model(vectors, x), y).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()

    return step


def dense_adam_step(rows: int) -> Step:
    """The same step with one embedding per field and dense Adam over all of it."""
    torch.manual_seed(0)
    size = rows // CATEGORICAL
    tables = nn.ModuleList(nn.Embedding(size, DIM) for _ in range(CATEGORICAL))
    model = Dense()
    parameters = [*tables.parameters(), *model.parameters()]
    optimizer = torch.optim.Adam(parameters, foreach=True)
    batches = [(zipf_ids(rows, BATCH, s), torch.randn(BATCH, NUMERIC), torch.rand(BATCH).round()) for s in range(4)]
    turn = 0

    def step() -> None:
        nonlocal turn
        ids, x, y = batches[turn % 4]
        turn += 1
        optimizer.zero_grad()
        local = ids - torch.arange(CATEGORICAL) * size
        vectors = torch.stack([t(local[:, j]) for j, t in enumerate(tables)], 1)
        F.binary_cross_entropy_with_logits(model(vectors, x), y).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 10.0)
        optimizer.step()

    return step


def fuxictr_step(rows: int) -> Step:
    """FuxiCTR's own `train_step` on its own layers."""
    from collections import OrderedDict

    from fuxictr.features import FeatureMap
    from fuxictr.pytorch.layers import CrossNetV2, FeatureEmbedding, MLP_Block
    from fuxictr.pytorch.models import BaseModel

    size = rows // CATEGORICAL
    features: Any = FeatureMap("bench", tempfile.mkdtemp())
    features.features = OrderedDict(
        {f"n{j}": {"type": "numeric", "source": ""} for j in range(NUMERIC)}
        | {
            f"c{j}": {"type": "categorical", "source": "", "vocab_size": size, "padding_idx": 0}
            for j in range(CATEGORICAL)
        }
    )
    features.num_fields, features.labels = NUMERIC + CATEGORICAL, ["y"]

    class Model(BaseModel):  # type: ignore[misc,valid-type]
        def __init__(self) -> None:
            super().__init__(
                features, model_id="bench", gpu=-1, verbose=0, metrics=["AUC"], model_root=tempfile.mkdtemp()
            )
            self.embedding_layer = FeatureEmbedding(features, DIM)
            self.cross = CrossNetV2(WIDTH, 3)
            self.mlp = MLP_Block(WIDTH, hidden_units=[512, 256], hidden_activations="ReLU", output_activation=None)
            self.head = nn.Linear(WIDTH + 256, 1)
            self.compile("adam", "binary_crossentropy", 1e-3)
            self.reset_parameters()

        def forward(self, inputs: Any) -> Any:
            x0 = self.embedding_layer(self.get_inputs(inputs), flatten_emb=True)
            return {"y_pred": torch.sigmoid(self.head(torch.cat([self.cross(x0), self.mlp(x0)], -1)))}

    model: Any = Model()
    model._max_gradient_norm = 10.0
    batches = []
    for s in range(4):
        local = zipf_ids(rows, BATCH, s) - torch.arange(CATEGORICAL) * size
        batch = {f"c{j}": local[:, j] for j in range(CATEGORICAL)}
        batch |= {f"n{j}": torch.randn(BATCH) for j in range(NUMERIC)}
        batches.append(batch | {"y": torch.rand(BATCH).round()})
    turn = 0

    def step() -> None:
        nonlocal turn
        model.train()
        model.train_step(batches[turn % 4])
        turn += 1

    return step


def deepctr_step(rows: int) -> Step:
    """The body of DeepCTR-Torch's training loop on its own DCN, without its penalties and metrics.

    It has no embedding of numbers, so it is given their 16 values each. Ids arrive as float32, as its `fit` sends them.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        from deepctr_torch.inputs import DenseFeat, SparseFeat
        from deepctr_torch.models import DCN

    size = rows // CATEGORICAL
    features = [SparseFeat(f"c{j}", vocabulary_size=size, embedding_dim=DIM) for j in range(CATEGORICAL)]
    features += [DenseFeat(f"n{j}", dimension=DIM) for j in range(NUMERIC)]
    options = {"cross_num": 3, "cross_parameterization": "matrix", "dnn_hidden_units": (512, 256)}
    without = {"l2_reg_linear": 0.0, "l2_reg_embedding": 0.0, "l2_reg_cross": 0.0}
    model: Any = DCN([], features, **options, **without)
    model.compile("adam", "binary_crossentropy", metrics=[])
    batches = []
    for s in range(4):
        local = zipf_ids(rows, BATCH, s) - torch.arange(CATEGORICAL) * size
        batches.append((torch.cat([local, torch.randn(BATCH, NUMERIC * DIM)], 1), torch.rand(BATCH).round()))
    turn = 0

    def step() -> None:
        nonlocal turn
        x, y = batches[turn % 4]
        turn += 1
        model.train()
        p = model(x.float()).squeeze(-1)
        model.optim.zero_grad()
        loss = model.loss_func(p, y, reduction="sum")
        total = loss + model.get_regularization_loss() + model.aux_loss
        loss.item()
        total.item()
        total.backward()
        model.optim.step()

    return step


def step_vs_deepctr(quick: bool) -> dict[str, Any]:
    """A step against DeepCTR-Torch's."""
    results: dict[str, Any] = {}
    for name, rows in (("1m", 1_000_000), ("4m", 4_000_000)):
        key = f"step_vs_deepctr_{name}"
        try:
            peer = deepctr_step(rows)
        except ModuleNotFoundError as error:
            results |= {key: None, f"{key}_reason": f"not installed: {error.name}"}
            continue
        found = compare(our_step(rows), peer, pairs=5 if quick else 15)
        results |= {key: round(found.speedup, 2), f"{key}_detail": found.spread()}
    return results


def step_vs_fuxictr(quick: bool) -> dict[str, Any]:
    """A step against FuxiCTR's, and our low-rank model beside it."""
    results: dict[str, Any] = {}
    for name, rows in (("1m", 1_000_000), ("4m", 4_000_000)):
        try:
            peer = fuxictr_step(rows)
        except ModuleNotFoundError as error:
            results |= {
                f"step_vs_fuxictr_{name}": None,
                f"step_vs_fuxictr_{name}_reason": f"not installed: {error.name}",
            }
            continue
        found = compare(our_step(rows), peer, pairs=5 if quick else 15)
        low = compare(our_step(rows, rank=64), peer, pairs=3 if quick else 9)
        results |= {
            f"step_vs_fuxictr_{name}": round(found.speedup, 2),
            f"step_vs_fuxictr_{name}_detail": found.spread(),
            f"low_rank_step_vs_fuxictr_{name}": round(low.speedup, 2),
        }
    return results


def table_cost(quick: bool) -> dict[str, Any]:
    """What the table adds to a step, against what dense Adam over it adds; and a step over 4 M rows over 100 k."""
    pairs = 7 if quick else 15
    results: dict[str, Any] = {}
    for name, rows in (("1m", 1_000_000), ("4m", 4_000_000)):
        ours, peer, bare = our_step(rows), dense_adam_step(rows), dense_part()
        for step in (ours, peer, bare):
            step()
        times = [(seconds(bare), seconds(ours), seconds(peer)) for _ in range(pairs)]
        base, own, dense = (statistics.median(column) for column in zip(*times, strict=True))
        results |= {
            f"table_cost_vs_dense_adam_{name}": round((dense - base) / max(own - base, 1e-4), 1),
            f"table_cost_vs_dense_adam_{name}_detail": {"dense part": base, "ours": own, "dense Adam": dense},
        }
    found = compare(our_step(4_000_000), our_step(100_000), pairs=2 * pairs)
    return results | {"step_4m_vs_100k_rows": round(found.ratio, 3), "step_4m_vs_100k_rows_detail": found.spread()}


def row_updates(quick: bool) -> dict[str, Any]:
    """Segment sum and lazy Adam on 53 k gradients, against unique, index_add and torch; and in pages of 2 MB."""
    n, rows = BATCH * CATEGORICAL, 2_000_000
    ids, grad = zipf_ids(rows, BATCH, 0).flatten(), torch.randn(n, DIM)

    def tables(huge: bool) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        made = [torch.empty(rows, DIM) for _ in range(3)]
        weight, first, second = ((huge_pages(table) if huge else table).zero_() for table in made)
        return weight, (first, second)

    def update(tables: tuple[Tensor, tuple[Tensor, Tensor]]) -> None:
        row_update(*tables, ids, grad, step=2)

    plain, other = tables(huge=False), tables(huge=False)
    pairs = 15 if quick else 50
    found = compare(
        lambda: update(plain),
        lambda: reference.row_update(other[0], *other[1], ids, grad, "adam", 1e-3, 0.9, 0.999, 1e-8, 0.0, 2),
        pairs=pairs,
    )
    paged = tables(huge=True)
    pages = compare(lambda: update(paged), lambda: update(plain), pairs=pairs)
    return {
        "row_update_vs_torch": round(found.speedup, 2),
        "row_update_vs_torch_detail": found.spread(),
        "row_update_in_huge_pages": round(pages.speedup, 2),
        "row_update_in_huge_pages_detail": pages.spread(),
    }


def isotonic(quick: bool) -> dict[str, Any]:
    """Forward and backward in prefix sums, against rows of 501 bucket activations; ten calls in a row at a time.

    A call of ours takes a tenth of a millisecond, so what the dense form leaves behind (cold caches, megabytes that the
    system has yet to take back) weighs on the ten calls after it. `isotonic_vs_dense_form_alone` times a hundred of
    ours against five of the dense form's, per call: each nearly by itself.
    """
    layer = IsotonicLayer(501, -17.0, 8.05)
    logits = torch.randn(8192, requires_grad=True)
    edges = torch.arange(501) * layer.step

    def prefix_sums() -> None:
        layer(logits).sum().backward()

    def dense_form() -> None:
        y = logits.clamp(layer.low, layer.high) - layer.low
        activation = (y[:, None] - edges).clamp(0, layer.step)
        (activation @ layer.slope.clamp_min(0) + layer.bias).sum().backward()

    def times(count: int, call: Step) -> Step:
        def calls() -> None:
            for _ in range(count):
                call()

        return calls

    found = compare(times(10, prefix_sums), times(10, dense_form), pairs=15 if quick else 45)
    alone = compare(times(100, prefix_sums), times(5, dense_form), pairs=15 if quick else 45)
    return {
        "isotonic_vs_dense_form": round(found.speedup, 1),
        "isotonic_vs_dense_form_detail": found.spread(),
        "isotonic_vs_dense_form_alone": round(alone.speedup * 100 / 5, 1),
        "isotonic_vs_dense_form_alone_detail": alone.spread() | {"calls": [100, 5]},
    }


def _fresh(rows: int, count: int) -> Callable[[], Tensor]:
    """Random ids that are new for longer than a cache remembers: a server's next request is not its last one."""
    pool = [torch.randint(rows, (count,)) for _ in range(64)]
    turn = 0

    def draw() -> Tensor:
        nonlocal turn
        turn += 1
        return pool[turn % 64]

    return draw


def _lines(stride: int, count: int) -> float:
    """Bytes of the cache lines that `count` rows of `stride` bytes at random places lie on, together."""
    return 64 * count * (1 + (stride - 1) / 64 if stride % 64 else stride / 64)


def _read_rate() -> float:
    """Bytes per second of one thread that reads memory in order."""
    memory = torch.ones(32 << 20)  # 128 MB, more than a cache holds
    return memory.numel() * 4 / min(seconds(memory.sum) for _ in range(5))


def int8_lookup(quick: bool) -> dict[str, Any]:
    """8-bit rows against float32 embeddings: one id per field, and bags of 20; and against torch's own 8-bit bags.

    `int8_lookup_of_floor` is the time in which memory could deliver the lines of the rows and the ids and take the
    result, over ours. A row of 22 bytes lies on 1.33 lines on average and one of float32 on 1: at D = 16 random rows in
    8 bits cost no less memory traffic, only less room in the caches.
    """
    results: dict[str, Any] = {}
    pairs = 15 if quick else 50
    rate = _read_rate()
    for dim, rows in ((16, 2_000_000), (64, 1_000_000)):
        weight = huge_pages(torch.empty(rows, dim)).normal_()  # as the table in 8 bits lies
        table = quantize_rows(weight)
        packed = torch.ops.quantized.embedding_bag_byte_prepack(weight)
        draw, count = _fresh(rows, BATCH * CATEGORICAL), BATCH * CATEGORICAL
        single = compare(
            lambda t=table, draw=draw: quantized_gather(t, draw().view(BATCH, CATEGORICAL)),
            lambda w=weight, draw=draw: F.embedding(draw().view(BATCH, CATEGORICAL), w).flatten(1),
            pairs=pairs,
        )
        floor = (_lines(dim + 6, count) + count * (8 + 2 * 4 * dim)) / rate
        offsets = torch.arange(0, 40_001, 20)
        draw = _fresh(rows, 40_000)
        bags = compare(
            lambda t=table, draw=draw, o=offsets: quantized_gather(t, draw(), o),
            lambda w=weight, draw=draw, o=offsets: F.embedding_bag(draw(), w, o[:-1], mode="sum"),
            pairs=pairs,
        )
        torch_bags = compare(
            lambda t=table, draw=draw, o=offsets: quantized_gather(t, draw(), o),
            lambda p=packed, draw=draw, o=offsets: torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
                p, draw(), o[:-1], mode=0
            ),
            pairs=pairs,
        )
        results |= {
            f"int8_lookup_vs_fp32_{dim}": round(single.speedup, 2),
            f"int8_bags_vs_fp32_{dim}": round(bags.speedup, 2),
            f"int8_bags_vs_torch_{dim}": round(torch_bags.speedup, 2),
            f"int8_lookup_of_floor_{dim}": round(floor / statistics.median(single.ours), 2),
            f"int8_lookup_vs_fp32_{dim}_detail": {
                "single": single.spread(),
                "bags": bags.spread(),
                "memory, GB/s": rate / 1e9,
                "floor_s": floor,
            },
        }
        if dim == 16:
            results["int8_memory"] = round(weight.numel() * 4 / table.numel(), 2)
    return results


def serving(quick: bool) -> dict[str, Any]:
    """Export of a trained model, its latency, and a log replayed through the HTTP service."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from core_tensor.app.serving import ARROW
    from fastapi.testclient import TestClient
    from lirank.data.parquet import ParquetLog
    from lirank.data.split import Split
    from lirank.evidence.generator import Market, generate
    from lirank.features.causal import CausalFeatures
    from lirank.model.config import ModelConfig
    from lirank.serve import deploy
    from lirank.serve.export import OnnxModel, ServedModel, feeds_of
    from lirank.serve.scorer import build, request_schema
    from lirank.train.loop import TrainConfig
    from lirank.train.run import TrainedModel
    from lirank.workflow import calibrate_run, train_run

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        made = generate(Market(users=300, items=150, events=20_000, ids=1.0, history=1.0, calibration=0.5))
        pq.write_table(made.log, folder / "log.parquet", row_group_size=4096)
        for name in ("run", "calibrated"):
            (folder / name).mkdir()
        log = ParquetLog.open(folder / "log.parquet")
        training = TrainConfig(epochs=1, batch_size=512)
        train_run(log, made.schema, Split(), ModelConfig(), training, folder / "run")
        calibrate_run(folder / "run", None, folder / "calibrated")
        model = TrainedModel.load(folder / "calibrated")
        batch = model.encoder.encode(model.sample)
        gaps = [deploy.export(model, batch, folder / f"m{suffix}")["max_difference"] for suffix in (".onnx", ".pt2")]
        served = ServedModel(model.model)
        times = deploy.latency(OnnxModel(folder / "m.onnx"), served, batch, 100 if quick else 500)
        # the log from its first row, through HTTP in requests of one time each, then /observe
        model.causal = CausalFeatures(made.schema, model.causal.seconds)
        model.save(folder / "calibrated")
        rows = made.log.slice(0, 1500 if quick else 20_000)
        offline = CausalFeatures(made.schema, model.causal.seconds).extend(rows)
        expected = OnnxModel(folder / "m.onnx")(feeds_of(served, model.encoder.encode(offline)))[:, 0]
        requests = request_schema(made.schema)
        wanted = request_schema(made.schema, labels=True).names
        found = []
        ends = np.flatnonzero(np.diff(np.asarray(rows["time"]), append=-1) != 0) + 1
        with TestClient(build(folder / "calibrated", folder / "m.onnx")) as client:
            for start, end in zip([0, *ends[:-1]], ends, strict=True):
                piece = rows.slice(start, end - start)
                for path, names in (("/score", requests.names), ("/observe", wanted)):
                    sink = pa.BufferOutputStream()
                    body = piece.select(names)
                    with pa.ipc.new_stream(sink, body.schema) as writer:
                        writer.write_table(body)
                    answer = client.post(path, content=sink.getvalue().to_pybytes(), headers={"content-type": ARROW})
                    answer.raise_for_status()
                    if path == "/score":
                        found += answer.json()[made.schema.labels[0].name]
        different = int((np.abs(np.array(found) - expected) > 1e-6).sum())
    return {
        "export_max_diff": max(gaps),
        **{f"onnx_p50_ms_{count}": round(entry["p50_ms"], 3) for count, entry in times.items()},
        "replay_equals_serve": different,
        "replay_equals_serve_detail": {"rows": len(found), "largest": float(np.abs(np.array(found) - expected).max())},
    }


def reader(quick: bool) -> dict[str, Any]:
    """Reading, hashing and encoding a batch of the step's shape, over the step."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from lirank.data.batch import Encoder
    from lirank.data.parquet import ParquetLog
    from lirank.data.shuffle import windows
    from lirank.schema.features import Dense as DenseFeature
    from lirank.schema.features import Id, Label, Schema

    schema = Schema(
        features=(
            *(Id(name=f"c{j}", rows=1_000_000 // CATEGORICAL) for j in range(CATEGORICAL)),
            *(DenseFeature(name=f"n{j}") for j in range(NUMERIC)),
        ),
        labels=(Label(name="y"),),
    )
    count = 64 * BATCH
    ids = zipf_ids(1_000_000, count, 0).numpy()
    columns: dict[str, Any] = {f"c{j}": ids[:, j] for j in range(CATEGORICAL)}
    columns |= {f"n{j}": np.random.default_rng(j).normal(size=count) for j in range(NUMERIC)}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "log.parquet"
        pq.write_table(pa.table(columns | {"y": np.arange(count) % 2}), path, row_group_size=8192)
        log, encoder = ParquetLog.open(path), Encoder(schema)
        for table in log.read():
            encoder.observe(table)

        def read() -> None:
            for window in windows(log, None, BATCH, 0, 1):
                batch = encoder.encode(window.table)
                for start in range(0, len(batch), BATCH):
                    batch.take(torch.from_numpy(window.order[start : start + BATCH]))

        step = our_step(1_000_000)
        step()
        pairs = [(seconds(read) / 64, seconds(step)) for _ in range(3 if quick else 9)]
    return {
        "reader_share_of_step": round(statistics.median(a / b for a, b in pairs), 3),
        "reader_share_of_step_detail": {"batch_s": [a for a, _ in pairs], "step_s": [b for _, b in pairs]},
    }


def neural_linear(quick: bool) -> dict[str, Any]:
    """Thompson scores of 1000 candidates, d = 128."""
    from lirank.explore.posterior import GaussianPosterior

    generator = torch.Generator().manual_seed(0)
    features = torch.randn(4096, 128, generator=generator, dtype=torch.float64)
    targets = torch.randn(4096, generator=generator, dtype=torch.float64)
    posterior = GaussianPosterior.prior(128).updated(features, targets)
    candidates = torch.randn(1000, 128, generator=generator, dtype=torch.float64)

    def once() -> None:
        posterior.sample(1, generator) @ candidates.T

    once()
    times = [seconds(once, time.perf_counter) for _ in range(50 if quick else 200)]
    return {"neural_linear_1000_candidates_ms": round(1e3 * statistics.median(times), 3)}


def calibration_shift(quick: bool) -> dict[str, Any]:
    """Of iPinYou by time: logloss after recalibration on the first tenth of the test rows, over the constant's."""
    sys.path.insert(0, str(REPRODUCE))
    import _shift

    found = _shift.evidence(range(1 if quick else 5))
    return {
        "calibration_shift": round(found["calibration_shift"], 4),
        "calibration_shift_detail": {row["calibration"]: row["logloss_over_constant"] for row in found["rows"]}
        | {"auc": found["auc"], "clicks": found["clicks"]},
    }


def real_logs(quick: bool) -> dict[str, Any]:
    """AUC of the full model minus a tuned LightGBM's, from what `reproduce/real_logs.py` measures."""
    keys = {"movielens_tuned": "auc_vs_lightgbm_ml100k", "amazon": "auc_vs_lightgbm_amazon"}
    if quick:
        return dict.fromkeys(keys.values()) | {"auc_vs_lightgbm_reason": "five seeds take minutes; run without --quick"}
    with tempfile.TemporaryDirectory() as folder:
        parts = [argument for name in keys for argument in ("--only", name)]
        command = [sys.executable, REPRODUCE / "real_logs.py", "-o", folder, "--cache", folder, *parts]
        subprocess.run(command, check=True, stdout=sys.stderr)
        found = json.loads((Path(folder) / "real_logs.json").read_text())
    return {key: round(found[name]["auc_vs_lightgbm"], 4) for name, key in keys.items()} | {
        f"{key}_logloss": round(found[name]["logloss_vs_lightgbm"], 4) for name, key in keys.items()
    }


if __name__ == "__main__":
    run_bars(
        "lirank",
        {
            "step_vs_fuxictr": step_vs_fuxictr,
            "step_vs_deepctr": step_vs_deepctr,
            "table_cost_vs_dense_adam": table_cost,
            "row_update_vs_torch": row_updates,
            "isotonic_vs_dense_form": isotonic,
            "int8_lookup_vs_fp32": int8_lookup,
            "export_and_replay": serving,
            "reader_share_of_step": reader,
            "neural_linear_1000_candidates_ms": neural_linear,
            "calibration_shift": calibration_shift,
            "auc_vs_lightgbm": real_logs,
        },
    )
