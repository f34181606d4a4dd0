"""Benchmarks of msam: ghost mode against SGD, SAM and sequential mode, memory, parity, and flatness on MNIST-1D.

Ratios are CPU time of one thread, in interleaved pairs. Models and batch sizes are those of the reference experiment;
the transformer and the CNN are reported, since a shard's rows (tokens, positions) make most of their layers
materialised, where 2.0 is expected.
"""

import copy
import importlib.util
import statistics
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from core_tensor.dev.benchmarking import Comparison, compare, run_bars
from msam import MSAM
from msam.study.cost import model_and_batch
from msam.study.data import mnist1d
from msam.study.training import train
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

Batch = tuple[Tensor, Tensor]
Programs = tuple[Callable[[], None], Callable[[], None]]
MLPS = {"small": "mlp", "large": "large-mlp"}


def stepper(
    model: nn.Module, batch: Batch, micro_batches: int, mode: str, repeats: int, ascent: str = "full"
) -> Callable[[], None]:
    """Training steps with SGD inside: plain for `micro_batches` 0, otherwise mSAM."""

    def loss_fn(part: Batch) -> Tensor:
        return F.cross_entropy(model(part[0]), part[1])

    if micro_batches == 0:
        sgd = torch.optim.SGD(model.parameters(), lr=1e-4)

        def plain() -> None:
            for _ in range(repeats):
                sgd.zero_grad()
                loss_fn(batch).backward()
                sgd.step()

        return plain
    opt = MSAM(model, torch.optim.SGD, lr=1e-4, num_micro_batches=micro_batches, mode=mode, ascent=ascent)

    def step() -> None:
        for _ in range(repeats):
            opt.step(loss_fn, batch)
        assert opt.record is not None
        assert mode in {opt.record.mode, "auto"}

    return step


def placed(make: Callable[[], Programs], pairs: int, warmup: int, places: int) -> Comparison:
    """Turns of two programs, a share of them at each of several places in memory.

    Where weights and buffers lie moves a small model's times by 3 % for as long as they lie there.

    Args:
        make: Makes both programs anew; all are kept, so that the next ones lie elsewhere.
        pairs: Pairs of turns in all.
        warmup: Turns at each place that are not counted.
        places: Number of places.

    Returns:
        The times of all pairs.
    """
    programs = [make() for _ in range(places)]
    found = [compare(*both, pairs=pairs // places, warmup=warmup) for both in programs]
    return Comparison(tuple(t for f in found for t in f.ours), tuple(t for f in found for t in f.peer))


def paired(
    name: str, ours: tuple[int, str], peer: tuple[int, str], repeats: int, pairs: int, places: int = 1
) -> Comparison:
    """Steps of two methods on copies of one model, in turn."""

    def make() -> Programs:
        model, batch = model_and_batch(name)
        return stepper(model, batch, *ours, repeats), stepper(copy.deepcopy(model), batch, *peer, repeats)

    return placed(make, pairs, warmup=2, places=places)


def perceptrons(quick: bool) -> dict[str, Any]:
    """Ghost against SGD and SAM on both MLPs, in turns that are short, since the machine's speed changes between them.

    Twenty small steps make a turn, so that few of them run on what the other side left in the caches, as in training.
    """
    results: dict[str, Any] = {}
    for size, repeats, pairs, places in (("small", 20, 50, 5), ("large", 2, 24, 2)):
        pairs = pairs if quick else 3 * pairs
        for micro_batches in (8, 32):
            found = paired(MLPS[size], (micro_batches, "ghost"), (0, "plain"), repeats, pairs, places)
            key = f"ghost_vs_sgd_{size}_m{micro_batches}"
            results |= {key: round(found.ratio, 3), f"{key}_detail": found.spread()}
        found = paired(MLPS[size], (8, "ghost"), (1, "sequential"), repeats, pairs, places)
        key = f"ghost_vs_sam_{size}_m8"
        results |= {key: round(found.ratio, 3), f"{key}_detail": found.spread()}
    return results


def sequential(quick: bool) -> dict[str, Any]:
    """How much faster ghost is than sequential at 16 micro-batches: the lesser of both MLPs."""
    gains = [
        paired(MLPS[size], (16, "ghost"), (16, "sequential"), repeats, 5 if quick else 15).speedup
        for size, repeats in (("small", 8), ("large", 2))
    ]
    return {
        "ghost_vs_sequential_m16": round(min(gains), 2),
        "ghost_vs_sequential_m16_detail": {"small": round(gains[0], 2), "large": round(gains[1], 2)},
    }


def others(quick: bool) -> dict[str, Any]:
    """Transformer and CNN: ghost and sequential against SGD."""
    results: dict[str, Any] = {}
    for name in ("transformer", "cnn"):
        for micro_batches in (4, 8, 16):
            for mode in ("ghost", "sequential"):
                found = paired(name, (micro_batches, mode), (0, "plain"), 2, 7 if quick else 15)
                results[f"{mode}_vs_sgd_{name}_m{micro_batches}"] = round(found.ratio, 3)
    return results


def chained(quick: bool) -> dict[str, Any]:
    """Chained ascent in ghost mode against SGD."""
    results: dict[str, Any] = {}
    for key, name, micro_batches, repeats, pairs, places in (
        ("small_m8", "mlp", 8, 20, 50, 5), ("large_m8", "large-mlp", 8, 2, 24, 2),
        ("transformer_m4", "transformer", 4, 2, 7, 1), ("cnn_m4", "cnn", 4, 2, 30, 2),
    ):  # fmt: skip

        def make(name: str = name, micro_batches: int = micro_batches, repeats: int = repeats) -> Programs:
            model, batch = model_and_batch(name)
            ours = stepper(model, batch, micro_batches, "ghost", repeats, "chained")
            return ours, stepper(copy.deepcopy(model), batch, 0, "plain", repeats)

        found = placed(make, pairs=pairs if quick else 3 * pairs, warmup=2, places=places)
        results |= {f"chained_vs_sgd_{key}": round(found.ratio, 3), f"chained_vs_sgd_{key}_detail": found.spread()}
    return results


class Tagger(nn.Module):
    """An embedding, an LSTM of width 128 over 32 tokens, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.layer, self.head = (
            nn.Embedding(1000, 64),
            nn.LSTM(64, 128, batch_first=True),
            nn.Linear(128, 10),
        )

    def forward(self, ids: Tensor) -> Tensor:
        """Class scores, shape (N, 10)."""
        found: Tensor = self.head(self.layer(self.tokens(ids))[0].mean(1))
        return found


def residual() -> nn.Module:
    """A small convolutional network with batch norm and a residual branch."""

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
            )  # fmt: skip

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = torch.relu(x + self.body(x))
            return found

    stem = [nn.Conv2d(3, 24, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU()]
    return nn.Sequential(
        *stem, Block(24), nn.MaxPool2d(2), Block(24), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10)
    )


def automatic(quick: bool) -> dict[str, Any]:
    """`mode="auto"` against the better one of ghost and sequential: the worst of several models."""
    torch.manual_seed(0)
    images = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))
    tokens = torch.randint(1, 1000, (64, 32)), torch.randint(10, (64,))
    cases: dict[str, tuple[nn.Module, Batch, int, int]] = {
        "mlp_m1": (*model_and_batch("mlp"), 1, 20), "mlp_m8": (*model_and_batch("mlp"), 8, 20),
        "resnet_m4": (residual(), images, 4, 2), "lstm_m8": (Tagger(), tokens, 8, 2),
        "transformer_m4": (*model_and_batch("transformer"), 4, 1),
    }  # fmt: skip
    found = {}
    for name, (model, batch, micro_batches, repeats) in cases.items():
        auto = stepper(model, batch, micro_batches, "auto", repeats)
        fixed = [stepper(copy.deepcopy(model), batch, micro_batches, mode, repeats) for mode in ("ghost", "sequential")]
        ratios = [compare(auto, step, pairs=9 if quick else 21, warmup=2) for step in fixed]
        found[name] = round(max(r.ratio for r in ratios), 3)
    return {"auto_vs_best_engine": max(found.values()), "auto_vs_best_engine_detail": found}


def silent_error(quick: bool) -> dict[str, Any]:
    """The largest error over the zoo of the tests, in float64, with what stands in for ghost mode where it warns."""
    del quick
    spec = importlib.util.spec_from_file_location("msam_zoo", Path(__file__).parents[1] / "tests" / "zoo.py")
    assert spec is not None
    assert spec.loader is not None
    zoo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(zoo)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        errors = {
            f"{case}, {ascent}": zoo.error(case, "ghost", ascent)
            for case in (*zoo.LOSSES, *zoo.RANDOM) for ascent in ("full", "chained")
        }  # fmt: skip
    finally:
        torch.set_default_dtype(before)
    worst = max(errors, key=lambda name: errors[name])
    return {
        "silent_error_max": errors[worst],
        "silent_error_max_detail": worst,
        "silent_error_models": len(errors) // 2,
    }


def parity(quick: bool) -> dict[str, Any]:
    """Largest relative error of ghost gradients against sequential ones in float64, over models and m."""
    del quick
    worst = 0.0
    for name in ("mlp", "transformer", "cnn"):
        model, (x, y) = model_and_batch(name)
        model = model.double()
        batch = (x.double() if x.is_floating_point() else x, y)
        for micro_batches in (1, 5, 8):
            found = []
            for mode in ("sequential", "ghost"):
                model.zero_grad()
                opt = MSAM(model, torch.optim.SGD, lr=0.0, num_micro_batches=micro_batches, mode=mode)
                opt.backward(lambda part, model=model: F.cross_entropy(model(part[0]), part[1]), batch)
                found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
            worst = max(worst, float((found[0] - found[1]).norm() / found[0].norm()))
    return {"ghost_grad_max_rel_error": worst}


class PeakMemory(TorchDispatchMode):
    """Bytes of all tensor storages made inside that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.peak = 0, 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        size = storage.nbytes()
        self.alive += size
        self.peak = max(self.peak, self.alive)

        def gone() -> None:
            self._seen.discard(key)
            self.alive -= size

        weakref.finalize(storage, gone)


def memory(quick: bool) -> dict[str, Any]:
    """Peak memory of a ghost step above that of an SGD step, over the activations of one forward pass.

    One copy of the activations is the results of all layers of one forward pass. Gradients exist before the measured
    step in both, so that the parameters' share is the same.
    """
    del quick
    model, batch = model_and_batch("large-mlp")
    total, x = 0, batch[0]
    for layer in model.children():
        x = layer(x)
        total += x.numel() * x.element_size()
    peaks = {}
    for name, (micro_batches, mode) in {"sgd": (0, "plain"), "ghost": (8, "ghost")}.items():
        step = stepper(model, batch, micro_batches, mode, 1)
        for label in (f"{name}_first", name):
            with PeakMemory() as meter:
                step()
            peaks[label] = meter.peak
        model.zero_grad()
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    return {
        "extra_memory_vs_activations": round((peaks["ghost"] - peaks["sgd"]) / total, 3),
        "extra_memory_vs_activations_detail": {"peaks": peaks, "activations": total, "parameters": parameters},
    }


def peer_sam(quick: bool) -> dict[str, Any]:
    """Our SAM (one micro-batch, sequential) against pytorch-optimizer's; the worse of both MLPs."""
    from pytorch_optimizer import SAM

    results = []
    for size, repeats in (("small", 20), ("large", 3)):

        def make(size: str = size, repeats: int = repeats) -> Programs:
            model, batch = model_and_batch(MLPS[size])
            twin = copy.deepcopy(model)
            peer = SAM(twin.parameters(), torch.optim.SGD, rho=0.05, lr=1e-4)

            def theirs() -> None:
                for _ in range(repeats):
                    F.cross_entropy(twin(batch[0]), batch[1]).backward()
                    peer.first_step(zero_grad=True)
                    F.cross_entropy(twin(batch[0]), batch[1]).backward()
                    peer.second_step(zero_grad=True)

            return stepper(model, batch, 1, "sequential", repeats), theirs

        results.append(placed(make, pairs=25 if quick else 50, warmup=1, places=5))
    worst = max(results, key=lambda found: found.ratio)
    return {"sam_vs_pytorch_optimizer": round(worst.ratio, 3), "sam_vs_pytorch_optimizer_detail": worst.spread()}


def flatness_order(quick: bool) -> dict[str, Any]:
    """Largest Hessian eigenvalue on MNIST-1D: mSAM (m = 8) over SAM, and SAM over SGD, rho 0.1, five seeds."""
    if quick:
        reason = "five seeds of three methods take minutes; run without --quick"
        return {"lambda_max_msam_vs_sam": None, "lambda_max_sam_vs_sgd": None, "lambda_max_reason": reason}
    task = mnist1d()
    found = {
        method: statistics.fmean(
            train(task, method, rho=0.1, num_micro_batches=8, seed=seed).lambda_max or 0.0 for seed in range(5)
        )
        for method in ("sgd", "sam", "msam")
    }
    return {
        "lambda_max_msam_vs_sam": round(found["msam"] / found["sam"], 3),
        "lambda_max_sam_vs_sgd": round(found["sam"] / found["sgd"], 3),
        "lambda_max_detail": {name: round(value, 3) for name, value in found.items()},
    }


if __name__ == "__main__":
    run_bars(
        "msam",
        {
            "ghost_vs_sgd_and_sam": perceptrons,
            "ghost_vs_sequential_m16": sequential,
            "ghost_vs_sgd_transformer_cnn": others,
            "chained_vs_sgd": chained,
            "auto_vs_best_engine": automatic,
            "silent_error_max": silent_error,
            "ghost_grad_max_rel_error": parity,
            "extra_memory_vs_activations": memory,
            "sam_vs_pytorch_optimizer": peer_sam,
            "lambda_max": flatness_order,
        },
    )
