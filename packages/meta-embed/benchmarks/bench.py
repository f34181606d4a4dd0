"""Benchmarks of meta-embed: MAML steps, the MAP head, lookups, refresh, and the quality bars on logs.

Ratios are CPU time of one thread, in interleaved pairs. The MAML step has 16 support and 16 query events, a meta block
of 32-64-16 and a head of 48-32-1 on [vector, item, vector * item]; it is the training step, backward pass of the outer
loss included. Peers adapt one task after the other, so they run on fewer tasks, and the ratio is per task.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from core_tensor.dev.benchmarking import compare, run_bars
from meta_embed.adapt.maml import InnerOptions
from meta_embed.adapt.map_head import MapHead
from meta_embed.evaluate.latency import lookup_latency
from meta_embed.model.blocks import perceptron
from meta_embed.model.meta_model import MetaModel
from meta_embed.store.address import create_store, open_store
from meta_embed.store.codec import Records, StoreInfo, encode_key, encode_records
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import binary_cross_entropy_with_logits as log_loss

FEATURES, ITEM, EVENTS, TASKS, FEW, RATE = 32, 16, 16, 512, 64, 0.1
Step = Callable[[], Any]


class Head(nn.Module):
    """g: a perceptron on [vector, item, vector * item]."""

    def __init__(self) -> None:
        super().__init__()
        self.net = perceptron([3 * ITEM, 32, 1])

    def forward(self, e: Tensor, x: Tensor) -> Tensor:
        """Logits of rows."""
        e = e.expand(*x.shape[:-1], -1)
        out: Tensor = self.net(torch.cat([e, x, e * x], -1))[..., 0]
        return out


def blocks() -> tuple[nn.Module, Head]:
    """Meta block and head, the same every time."""
    torch.manual_seed(0)
    return perceptron([FEATURES, 64, ITEM]), Head()


def tasks(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Members' features (T, 32), items (T, 2, 16, 16) and labels (T, 2, 16) of support and query."""
    g = torch.Generator().manual_seed(1)
    m, x = torch.randn(count, FEATURES, generator=g), torch.randn(count, 2, EVENTS, ITEM, generator=g)
    return m, x, (torch.rand(count, 2, EVENTS, generator=g) < 0.5).float()


def our_model(steps: int, order: int = 2) -> MetaModel:
    """Our MAML over the two blocks."""
    return MetaModel(*blocks(), InnerOptions(steps=steps, lr=RATE, order=order, rates="fixed"))  # type: ignore[arg-type]


def our_vectors(model: MetaModel, m: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Adapted vectors of all tasks."""
    lengths = torch.full((len(m),), EVENTS)
    labels = y[:, 0].flatten()
    return model.adapt((m,), (x[:, 0].flatten(0, 1),), labels, torch.ones_like(labels), lengths)


def our_step(steps: int, order: int = 2) -> Step:
    """A training step on all tasks."""
    model, (m, x, y) = our_model(steps, order), tasks(TASKS)

    def step() -> None:
        model.zero_grad()
        e = our_vectors(model, m, x, y)
        log_loss(model(e[:, None], x[:, 1]), y[:, 1]).backward()

    return step


def loop_step(steps: int, order: int = 2) -> Step:
    """The same on fewer tasks, one after the other with torch.autograd."""
    (meta, head), (m, x, y) = blocks(), tasks(FEW)

    def step() -> None:
        meta.zero_grad(), head.zero_grad()
        for t in range(FEW):
            e = loop_vector(meta, head, m[t], x[t, 0], y[t, 0], steps, order)
            (log_loss(head(e, x[t, 1]), y[t, 1]) / FEW).backward()

    return step


def loop_vector(
    meta: nn.Module, head: nn.Module, m: Tensor, x: Tensor, y: Tensor, steps: int, order: int = 2
) -> Tensor:
    """The adapted vector of one task."""
    names, values = zip(*meta.named_parameters(), strict=True)
    for _ in range(steps):
        e = functional_call(meta, dict(zip(names, values, strict=True)), (m,))
        gradients = torch.autograd.grad(log_loss(head(e, x), y), values, create_graph=order == 2)
        values = tuple(v - RATE * g for v, g in zip(values, gradients, strict=True))
    out: Tensor = functional_call(meta, dict(zip(names, values, strict=True)), (m,))
    return out


def torchopt_step(steps: int) -> Step:
    """TorchOpt's differentiable SGD, as in its tutorial on meta-optimizers."""
    import torchopt

    (meta, head), (m, x, y) = blocks(), tasks(FEW)
    optimizer = torchopt.MetaSGD(meta, lr=RATE)

    def step() -> None:
        meta.zero_grad(), head.zero_grad()
        weights, state = torchopt.extract_state_dict(meta, by="reference"), torchopt.extract_state_dict(optimizer)
        for t in range(FEW):
            for _ in range(steps):
                optimizer.step(log_loss(head(meta(m[t]), x[t, 0]), y[t, 0]))
            (log_loss(head(meta(m[t]), x[t, 1]), y[t, 1]) / FEW).backward()
            torchopt.recover_state_dict(meta, weights)
            torchopt.recover_state_dict(optimizer, state)

    return step


def higher_step(steps: int) -> Step:
    """`higher` with its inner-loop context."""
    import higher

    (meta, head), (m, x, y) = blocks(), tasks(FEW)
    inner = torch.optim.SGD(meta.parameters(), lr=RATE)

    def step() -> None:
        meta.zero_grad(), head.zero_grad()
        for t in range(FEW):
            with higher.innerloop_ctx(meta, inner, copy_initial_weights=False) as (live, optimizer):
                for _ in range(steps):
                    optimizer.step(log_loss(head(live(m[t]), x[t, 0]), y[t, 0]))
                (log_loss(head(live(m[t]), x[t, 1]), y[t, 1]) / FEW).backward()

    return step


def learn2learn_step(steps: int) -> Step:
    """learn2learn's MAML."""
    from learn2learn.algorithms import MAML

    (meta, head), (m, x, y) = blocks(), tasks(FEW)
    maml = MAML(meta, lr=RATE)

    def step() -> None:
        meta.zero_grad(), head.zero_grad()
        for t in range(FEW):
            learner = maml.clone()
            for _ in range(steps):
                learner.adapt(log_loss(head(learner(m[t]), x[t, 0]), y[t, 0]))
            (log_loss(head(learner(m[t]), x[t, 1]), y[t, 1]) / FEW).backward()

    return step


def against(name: str, peer: Callable[[int], Step]) -> Callable[[bool], dict[str, Any]]:
    """Tasks per second of a training step over a peer's, at one and at five inner steps."""

    def bar(quick: bool) -> dict[str, Any]:
        results: dict[str, Any] = {}
        for steps in (1, 5):
            key = f"tasks_vs_{name}_k{steps}"
            try:
                theirs = peer(steps)
            except ModuleNotFoundError as error:
                results |= {key: None, f"{key}_reason": f"peer not installed: {error.name}"}
                continue
            found = compare(our_step(steps), theirs, pairs=5 if quick else 15)
            results |= {key: round(found.speedup * TASKS / FEW, 1), f"{key}_detail": found.spread()}
        return results

    return bar


def vmap_vs_loop(quick: bool) -> dict[str, Any]:
    """Largest difference of adapted vectors from the loop's, float32, and what first order saves."""
    worst = 0.0
    for steps in (1, 5):
        model, (m, x, y) = our_model(steps), tasks(FEW)
        e = our_vectors(model, m, x, y)
        loop = [loop_vector(*blocks(), m[t], x[t, 0], y[t, 0], steps) for t in range(FEW)]
        worst = max(worst, float((e - torch.stack(loop)).detach().abs().max()))
    found = compare(our_step(5, 1), our_step(5, 2), pairs=5 if quick else 15)
    return {"vmap_vs_loop_max_diff": worst, "first_vs_second_order_k5": round(found.speedup, 2)}


def map_generation(quick: bool) -> dict[str, Any]:
    """Vectors of 4096 members with 16 events: the exact MAP estimate against five vmapped gradient steps."""
    count = 4096
    m, x, y = tasks(count)
    meta, _ = blocks()
    head, model, lengths = MapHead(meta, ITEM), our_model(5), torch.full((count,), EVENTS)
    rows, labels = x[:, 0].flatten(0, 1), y[:, 0].flatten()
    zeros, ones = torch.zeros_like(labels), torch.ones_like(labels)

    def exact() -> None:
        with torch.no_grad():
            head(rows, zeros, labels, ones, lengths, m)

    def steps() -> None:
        with torch.no_grad():
            our_vectors(model, m, x, y)

    found = compare(exact, steps, pairs=5 if quick else 15)
    detail = {
        "map_tasks_per_s": round(count / np.median(found.ours)),
        "vmap_tasks_per_s": round(count / np.median(found.peer)),
        "speedup": found.spread()["speedup"],
    }
    return {"map_generation_vs_vmap_k5": round(found.speedup, 1), "map_generation_vs_vmap_k5_detail": detail}


def map_optimality(quick: bool) -> dict[str, Any]:
    """Largest entry of the gradient at the returned vectors, float64, separable and degenerate supports among them."""
    from core_tensor.ops.map_head import map_head

    del quick
    g = torch.Generator().manual_seed(0)
    worst = 0.0
    for d in (2, 8, 17, 32):
        h = torch.randn(256, EVENTS, d, generator=g, dtype=torch.float64)
        base = torch.randn(256, EVENTS, generator=g, dtype=torch.float64)
        y = (torch.rand(256, EVENTS, generator=g) < 0.5).double()
        lengths = torch.randint(0, EVENTS + 1, (256,), generator=g)
        y[64:128], base[64:128] = (h[64:128].sum(2) > 0).double(), 0.0  # a plane separates the labels
        h[128:192, 1:] = h[128:192, :1]  # the same row over and over
        for precision in (1e-4, 1.0):
            P = precision * torch.eye(d, dtype=torch.float64)
            mu = torch.randn(256, d, generator=g, dtype=torch.float64)
            e, _ = map_head(h, base, y, torch.ones_like(y), lengths, mu, P)
            inside = torch.arange(EVENTS) < lengths[:, None]
            z = base + (h @ e[..., None])[..., 0]
            gradient = (torch.where(inside, z.sigmoid() - y, 0.0)[..., None] * h).sum(1) + (e - mu) @ P
            worst = max(worst, float(gradient.abs().max()))
    return {"map_optimality": worst}


def lookup(quick: bool) -> dict[str, Any]:
    """Lookups of 64 random members among a million 8-bit vectors of width 32, and what 8 bits save."""
    count, width = 200_000 if quick else 1_000_000, 32
    rng = np.random.default_rng(0)
    info = StoreInfo(version="bench", width=width, key="int", cold=(0.0,) * width)

    def items() -> Any:
        for first in range(0, count, 50_000):
            vectors = rng.standard_normal((50_000, width)).astype(np.float32)
            records = Records(vectors, np.zeros(50_000), np.full(50_000, 16), np.zeros((50_000, 0), np.float32))
            keys = [encode_key(key, "int") for key in range(first, first + 50_000)]
            yield from zip(keys, encode_records(records, info), [b""] * 50_000, strict=True)

    results: dict[str, Any] = {"lookup_members": count}
    with tempfile.TemporaryDirectory() as folder:
        for kind, prefix in (("lmdb", ""), ("sqlite", "sqlite:")):
            address = f"{prefix}{folder}/{kind}"
            create_store(address, info, items())
            with open_store(address) as store:
                found = lookup_latency(store, range(count), 64, 300 if quick else 2000)
            results |= {f"lookup_p{p}_ms_batch64_{kind}": round(found[f"p{p}_ms"], 3) for p in (50, 99)}
    floats = StoreInfo(**{f: getattr(info, f) for f in info.__struct_fields__} | {"codec": "float32"})
    return results | {"int8_memory": round(floats.vector_bytes / info.vector_bytes, 2)}


def served(quick: bool) -> dict[str, Any]:
    """A small world: incremental refresh against full generation, and AUC of 8-bit vectors against float32."""
    from meta_embed.evidence.demo import trained_world
    from meta_embed.evidence.served import int8_auc_change, serve_once

    world = trained_world(600 if quick else 2000, 0)
    return {
        "refresh_vs_full_max_diff": serve_once(world)["refresh_vs_full_max_diff"],
        "int8_auc_change": int8_auc_change(world),
    }


def quality(quick: bool) -> dict[str, Any]:
    """The AUC bars, by the scripts in `reproduce`: generator, MovieLens-100k and Amazon."""
    keys = (
        "gap_closed_n16", "no_retrain_vs_id", "hybrid_worst_bucket_vs_best", "n0_auc_vs_no_personalisation",
        "maml_vs_map_n32",
    )  # fmt: skip
    if quick:
        return dict.fromkeys(keys) | {"quality_reason": "an hour of training; without --quick"}
    import subprocess
    import sys

    from core_tensor.app.files import read_json

    results: dict[str, Any] = {}
    scripts = Path(__file__).parents[1] / "reproduce"
    with tempfile.TemporaryDirectory() as folder:
        for name in ("generator", "real_logs"):
            out = Path(folder) / f"{name}.json"
            subprocess.run([sys.executable, str(scripts / f"{name}.py"), "-o", str(out)], check=True)
            results |= read_json(out)["bars"]
    return {key: results.get(key) for key in keys}


BARS = {
    "tasks_vs_torchopt": against("torchopt", torchopt_step),
    "tasks_vs_higher": against("higher", higher_step),
    "tasks_vs_learn2learn": against("learn2learn", learn2learn_step),
    "tasks_vs_loop": against("loop", loop_step),
    "vmap_vs_loop_max_diff": vmap_vs_loop,
    "map_generation_vs_vmap_k5": map_generation,
    "map_optimality": map_optimality,
    "lookup_p99_ms_batch64": lookup,
    "refresh_vs_full_max_diff": served,
    "quality": quality,
}

if __name__ == "__main__":
    run_bars("meta-embed", BARS)
