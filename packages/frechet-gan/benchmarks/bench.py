"""Benchmarks of frechet-gan: the distance and its gradient against scipy, torchmetrics and FD-loss, OT against POT.

Ratios are CPU time of one thread, in interleaved pairs. Where a peer can keep something between calls (FD-loss the root
of the reference's covariance, scipy and torchmetrics the covariances) that part is not counted against it.
"""

import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from core_tensor.dev.benchmarking import compare, run_bars, seconds
from core_tensor.dev.testing import run_ranks
from forms import clean_fid_image, fd_loss, principal_root, rank_gradient
from frechet_gan import (
    PRESETS,
    EMAPopulation,
    FeatureStats,
    FrechetTrainer,
    NetworkConfig,
    TransportLoss,
    estimate_frechet,
    frechet_distance,
    frechet_distance_from_moments,
)
from frechet_gan.images.files import image_batches
from PIL import Image
from torch import Tensor, nn

SIZES = ((256, 512), (1024, 2048))


def samples(n: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Two Gaussian samples of n rows whose standard deviations fall by power laws, with different means."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, d + 1, dtype=torch.float64) ** -0.5
    x = torch.randn(n, d, dtype=torch.float64, generator=generator) * spectrum
    y = torch.randn(n, d, dtype=torch.float64, generator=generator) * spectrum.flip(0) * 1.2 + 0.3
    return x.to(dtype), y.to(dtype)


def value_and_gradient(x: Tensor, y: Tensor, method: Any = "auto") -> tuple[Tensor, Tensor]:
    """Our distance and its gradient in y."""
    y = y.detach().requires_grad_()
    value = frechet_distance(x, y, method=method)
    return value.detach(), torch.autograd.grad(value, y)[0]


def against_sqrtm(n: int, d: int, quick: bool) -> dict[str, Any]:
    """Value and gradient against the value alone from scipy's root of the product of the covariances."""
    import scipy.linalg

    x, y = samples(n, d)
    product = torch.cov(x.T) @ torch.cov(y.T)
    root = functools.partial(scipy.linalg.sqrtm, product.numpy())
    # a call of scipy at (1024, 2048) takes some twenty seconds, so there is no warm-up but ours
    value_and_gradient(x, y)
    slow = n > 512
    found = compare(
        lambda: value_and_gradient(x, y), root, pairs=1 if slow else (7 if quick else 15), warmup=0 if slow else 1
    )
    key = f"fd_grad_vs_sqrtm_{n}_{d}"
    return {key: round(found.speedup, 2), f"{key}_detail": found.spread()}


def against_eigvalsh(quick: bool) -> dict[str, Any]:
    """Value and gradient against autograd through FD-loss's float64 form, whose root of the reference is kept."""
    results: dict[str, Any] = {}
    for n, d in SIZES:
        x, y = samples(n, d)
        mean, covariance = x.mean(0), torch.cov(x.T)
        root = principal_root(covariance)

        def theirs(y: Tensor = y, mean: Tensor = mean, covariance: Tensor = covariance, root: Tensor = root) -> Tensor:
            leaf = y.detach().requires_grad_()
            return torch.autograd.grad(fd_loss(leaf, mean, covariance, root), leaf)[0]

        found = compare(functools.partial(value_and_gradient, x, y), theirs, pairs=7 if quick else 15)
        results[f"fd_grad_vs_eigvalsh_autograd_{n}_{d}"] = round(found.speedup, 2)
        results[f"fd_grad_vs_eigvalsh_autograd_{n}_{d}_detail"] = found.spread()
    sizes = [results[f"fd_grad_vs_eigvalsh_autograd_{n}_{d}"] for n, d in SIZES]
    return {"fd_grad_vs_eigvalsh_autograd": min(sizes), **results}


def covariances_2048(quick: bool) -> dict[str, Any]:
    """Value from given means and covariances, d = 2048, against torchmetrics' eigenvalues of the product."""
    from torchmetrics.image.fid import _compute_fid

    d = 2048
    x, y = samples(2 * d, d)
    moments = (x.mean(0), torch.cov(x.T), y.mean(0), torch.cov(y.T))
    theirs = functools.partial(_compute_fid, *moments)
    found = compare(lambda: frechet_distance_from_moments(*moments), theirs, pairs=3 if quick else 7)
    error = abs(float(frechet_distance_from_moments(*moments) / theirs()) - 1)
    key = "fd_cov2048_vs_torchmetrics"
    return {key: round(found.speedup, 2), f"{key}_detail": {**found.spread(), "relative_difference": error}}


def _digits(x: Any, y: Any) -> Any:
    # the distance in 50 digits: eigenvalues of C C' for the cross matrix C of the centred samples
    import mpmath

    factors, means = [], []
    for rows in (x, y):
        m = mpmath.matrix(rows.tolist())
        mean = mpmath.matrix([mpmath.fsum(m[:, j]) / m.rows for j in range(m.cols)])
        for i in range(m.rows):
            for j in range(m.cols):
                m[i, j] = (m[i, j] - mean[j]) / mpmath.sqrt(m.rows - 1)
        factors.append(m)
        means.append(mean)
    cross = factors[1] * factors[0].T
    root = mpmath.fsum(mpmath.sqrt(abs(v)) for v in mpmath.eigsy(cross * cross.T, eigvals_only=True))
    squares = mpmath.fsum(v * v for m in factors for v in m)
    return mpmath.fsum(v * v for v in means[0] - means[1]) + squares - 2 * root


def digits_and_gradient(x: Tensor, y: Tensor, step: str = "1e-15") -> tuple[float, Tensor]:
    """Value and central differences in y, both in 50 digits."""
    import mpmath

    gradient = torch.empty_like(y)
    with mpmath.workdps(50):
        for i in range(y.shape[0]):
            for j in range(y.shape[1]):
                ends = []
                for sign in (1, -1):
                    moved = [list(map(mpmath.mpf, row)) for row in y.tolist()]
                    moved[i][j] += sign * mpmath.mpf(step)
                    ends.append(_digits(x, _Rows(moved)))
                gradient[i, j] = float((ends[0] - ends[1]) / (2 * mpmath.mpf(step)))
        return float(_digits(x, y)), gradient


class _Rows(list[Any]):
    """Rows that are no tensor because float64 could not hold them."""

    def tolist(self) -> list[Any]:
        """Itself."""
        return self


def errors_float64(quick: bool) -> dict[str, Any]:
    """Relative errors against 50 digits at small sizes, and against the SVD engine, in other units, at large ones."""
    cases = ((5, 3), (4, 6)) if quick else ((5, 3), (4, 6), (6, 6), (8, 5))
    value_error, gradient_error = 0.0, 0.0
    for n, d in cases:
        x, y = samples(n, d, seed=d)
        value, gradient = value_and_gradient(x, y)
        truth, truth_gradient = digits_and_gradient(x, y)
        value_error = max(value_error, abs(float(value) - truth) / truth)
        gradient_error = max(gradient_error, relative(truth_gradient, gradient))
    for n, d in ((256, 512), (1500, 100)) if quick else ((256, 512), (1500, 100), (1024, 2048)):
        x, y = samples(n, d)
        truth_value, truth_gradient = value_and_gradient(x, y, "svd")
        # the same two samples rotated and scaled, so that the SVD it may come to rounds differently
        rotation = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))[0] * 3
        value, gradient = value_and_gradient(x @ rotation, y @ rotation)
        value_error = max(value_error, abs(float(value / truth_value) / 9 - 1))
        gradient_error = max(gradient_error, relative(truth_gradient * 3, gradient @ rotation.T / 3))
    return {"fd_value_rel_error_f64": value_error, "fd_grad_rel_error_f64": gradient_error}


def relative(truth: Tensor, got: Tensor) -> float:
    """Norm of the error over the norm of the truth."""
    return float((truth - got.double()).norm() / truth.norm())


def error_float32(quick: bool) -> dict[str, Any]:
    """Worst relative error of value and gradient for float32 inputs, against float64 on the same numbers."""
    del quick
    worst = 0.0
    for n, d in ((64, 128), (256, 512), (1000, 64)):
        x, y = samples(n, d, dtype=torch.float32)
        single, double = value_and_gradient(x, y), value_and_gradient(x.double(), y.double())
        worst = max(worst, *(relative(truth, got) for truth, got in zip(double, single, strict=True)))
    return {"fd_f32_rel_error": worst}


def collapsed(quick: bool) -> dict[str, Any]:
    """Whether a generator whose samples are all alike gets a finite gradient that a step along it proves useful."""
    del quick
    good = True
    steps = {}
    for n, d in ((16, 32), (64, 16), (256, 512)):
        x, _ = samples(n, d)
        y = x.mean(0).expand(n, d).clone()
        value, gradient = value_and_gradient(x, y)
        after = frechet_distance(x, y - n / 2 * gradient)
        good = good and bool(torch.isfinite(gradient).all()) and float(gradient.norm()) > 1e-6
        steps[f"{n}x{d}"] = round(float(after / value), 4)
    return {"collapsed_grad_finite_nonzero": good, "collapsed_grad_detail": {"distance_after_step": steps}}


def assignment(n: int, quick: bool) -> dict[str, Any]:
    """Exact optimal transport of n points, d = 128: value and gradient against POT's network simplex."""
    import ot

    x, y = samples(n, 128)
    loss = TransportLoss("assignment")
    mass = torch.full((n,), 1 / n, dtype=torch.float64)

    def ours() -> Tensor:
        leaf = y.detach().requires_grad_()
        return torch.autograd.grad(loss(leaf, x), leaf)[0]

    def theirs() -> Tensor:
        leaf = y.detach().requires_grad_()
        return torch.autograd.grad(ot.emd2(mass, mass, ot.dist(leaf, x)), leaf)[0]

    error = relative(theirs(), ours())
    found = compare(ours, theirs, pairs={64: 101, 256: 31}.get(n, 5 if quick else 11), warmup=1)
    key = f"assignment_vs_pot_{n}"
    return {key: round(found.speedup, 2), f"{key}_detail": {**found.spread(), "relative_difference": error}}


def ddp(quick: bool) -> dict[str, Any]:
    """Gradients of two gloo ranks with equal and unequal local batches against one process, over plans."""
    real, fake = samples(48, 16)
    cases: list[dict[str, Any]] = [{}, {"plan": "assignment", "normalize": "sg"}]
    if not quick:
        cases += [{"plan": "sliced"}, {"normalize": "whiten"}, {"population": EMAPopulation(0.9)}]
    worst = 0.0
    for options in cases:
        for rows in (24, 7):
            leaf = fake.clone().requires_grad_()
            TransportLoss(**options)(leaf, real).backward()
            assert leaf.grad is not None
            pieces = run_ranks(rank_gradient, 2, fake, real, rows, options)
            worst = max(worst, relative(leaf.grad, torch.cat(pieces)))
    return {"ddp_grad_rel_error": worst}


class SavedBytes:
    """Bytes that autograd keeps for backward passes and that are alive, without parameters, and their peak."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self.alive, self.peak = 0, 0
        self._own = {p.untyped_storage().data_ptr() for p in parameters}

    def pack(self, tensor: Tensor) -> "Kept":
        """Count a tensor that is saved."""
        return Kept(tensor, self, tensor.untyped_storage().data_ptr() not in self._own)

    @staticmethod
    def unpack(kept: "Kept") -> Tensor:
        """Give it back."""
        return kept.tensor


class Kept:
    """One saved tensor; uncounted when the graph lets go of it."""

    def __init__(self, tensor: Tensor, meter: SavedBytes, counted: bool) -> None:
        self.tensor, self._meter = tensor.detach(), meter
        self._bytes = tensor.numel() * tensor.element_size() if counted else 0
        meter.alive += self._bytes
        meter.peak = max(meter.peak, meter.alive)

    def __del__(self) -> None:
        self._meter.alive -= self._bytes


def virtual_batch(quick: bool) -> dict[str, Any]:
    """Two-pass virtual batch of 8 micro-batches against the full batch: gradients, and bytes of saved tensors.

    The features that the virtual batch holds between its passes are counted as saved.
    """
    del quick
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 64)).double()
    z, real = torch.randn(512, 32, dtype=torch.float64), torch.randn(512, 64, dtype=torch.float64)
    parameters = list(net.parameters())

    def gradients() -> Tensor:
        found = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        net.zero_grad()
        return found

    full = SavedBytes(parameters)  # type: ignore[arg-type]
    with torch.autograd.graph.saved_tensors_hooks(full.pack, full.unpack):
        TransportLoss()(net(z), real).backward()
    truth = gradients()
    parts = SavedBytes(parameters)  # type: ignore[arg-type]
    with TransportLoss().virtual_batch() as batch:
        for part, target in zip(z.split(64), real.split(64), strict=True):
            with torch.no_grad():
                batch.observe(net(part), target)
        for part in z.split(64):
            with torch.autograd.graph.saved_tensors_hooks(parts.pack, parts.unpack):
                batch.loss(net(part)).backward()
    error = relative(truth, gradients())
    held = 512 * 64 * 8  # the generated features in float64
    return {
        "virtual_batch_grad_rel_error": error,
        "virtual_batch_memory": round((parts.peak + held) / full.peak, 4),
        "virtual_batch_memory_detail": {"full": full.peak, "micro": parts.peak, "features_held": held},
    }


def debiased(quick: bool) -> dict[str, Any]:
    """Mean absolute error of `rtd` at 10,000 rows over that of the plug-in at 50,000; d = 512, five seeds."""
    key = "rtd10k_vs_plugin50k_error"
    if quick:
        return {key: None, f"{key}_reason": "100,000 rows of 512 features for five seeds; run without --quick"}
    d = 512
    index = torch.arange(1, d + 1, dtype=torch.float64)
    spectra, shift = (index**-0.5, index**-0.6), 0.02
    truth = float((spectra[0] - spectra[1]).square().sum()) + d * shift**2
    errors: dict[str, list[float]] = {"rtd": [], "vale2": [], "fid_inf": [], "plugin10k": [], "plugin50k": []}
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        x, y = (torch.randn(50_000, d, dtype=torch.float64, generator=generator) * s for s in spectra)
        y += shift
        for name, rows, estimator in (
            ("rtd", 10_000, "rtd"),
            ("vale2", 10_000, "vale2"),
            ("fid_inf", 10_000, "fid_inf"),
            ("plugin10k", 10_000, "plugin"),
            ("plugin50k", 50_000, "plugin"),
        ):
            found = estimate_frechet(x[:rows], y[:rows], estimator, seed=seed).value  # type: ignore[arg-type]
            errors[name].append(abs(found - truth))
    means = {name: statistics.fmean(values) for name, values in errors.items()}
    detail = {name: [round(v, 6) for v in values] for name, values in errors.items()}
    return {key: round(means["rtd"] / means["plugin50k"], 4), f"{key}_detail": {"distance": truth, **detail}}


def step(quick: bool) -> dict[str, Any]:
    """CPU time of a generator step of the default loss, over every layer, in units of a non-saturating one."""
    images = torch.rand(2000, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    network = NetworkConfig("mlp", 16, latent=64, width=128, features=32)
    ours, theirs = (FrechetTrainer(network, images, PRESETS[m]) for m in ("frechet", "ns"))
    found = compare(
        lambda: [ours.step() for _ in range(10)], lambda: [theirs.step() for _ in range(10)], pairs=9 if quick else 31
    )
    return {"step_vs_ns": round(1 / found.speedup, 3), "step_vs_ns_detail": found.spread()}


def stats_update(quick: bool) -> dict[str, Any]:
    """Statistics of 4000 rows of 2048 features in batches of 64, in units of batches of 1000."""
    rows = torch.randn(4000, 2048, generator=torch.Generator().manual_seed(0))

    def absorb(batch: int) -> Tensor:
        stats = FeatureStats(2048)
        for part in rows.split(batch):
            stats.update(part)
        return stats.scatter

    found = compare(lambda: absorb(64), lambda: absorb(1000), pairs=3 if quick else 9)
    key = "stats_update_batch64_vs_batch1000"
    return {key: round(1 / found.speedup, 3), f"{key}_detail": found.spread()}


def interval_coverage(quick: bool) -> dict[str, Any]:
    """Share of 95 % intervals of `rtd` that hold the truth: least and most over laws and distances, d = 16, n = 600."""
    draws = 100 if quick else 400
    shares = {}
    for law in ("gaussian", "relu"):
        for scale in (1.0, 1.05, 1.5):
            hits = 0
            for seed in range(draws):
                sides = []
                for side in range(2):
                    generator = torch.Generator().manual_seed(2 * seed + side)
                    z = torch.randn(600, 16, dtype=torch.float64, generator=generator)
                    sides.append(z if law == "gaussian" else (z.clamp_min(0) - 0.3989422804) / 0.5838119895)
                found = estimate_frechet(sides[0], sides[1] * scale, "rtd", seed=seed)
                assert found.low is not None
                assert found.high is not None
                hits += found.low <= 16 * (scale - 1) ** 2 <= found.high
            shares[f"{law} {scale:g}"] = hits / draws
    detail = {"most": max(shares.values()), "draws": draws, **shares}
    return {"interval_coverage": min(shares.values()), "interval_coverage_detail": detail}


def load_images(quick: bool) -> dict[str, Any]:
    """CPU time of reading 200 JPEG files of 256 pixels and resizing them to 299, per worker, against clean-fid's."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        generator = np.random.default_rng(0)
        paths = []
        for i in range(40 if quick else 200):
            small = Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8))
            paths.append(f"{folder}/{i:03}.jpg")
            small.resize((256, 256), Image.Resampling.BICUBIC).save(paths[-1], quality=90)

        def theirs() -> list[Tensor]:  # batches, as its DataLoader makes them
            parts = [paths[i : i + 50] for i in range(0, len(paths), 50)]
            return [torch.stack([clean_fid_image(path, 299) for path in part]) for part in parts]

        for mode in ("native", "clean"):

            def ours(mode: Any = mode) -> list[Tensor]:
                return list(image_batches(folder, 50, 299, resize=mode, channels=3))

            timed = compare(ours, theirs, pairs=3 if quick else 7)
            found[mode] = {"ratio": round(1 / timed.speedup, 3), **timed.spread()}
        error = float(((torch.cat(ours("clean")) + 1) * 127.5 - torch.cat(theirs())).abs().max())
        if not quick:  # wall-clock time over that of one process, which other work on the machine changes

            def shared(workers: int) -> float:
                often = list(range(len(paths))) * 4  # starting the workers must not count
                options: Any = {"resize": "clean", "channels": 3, "chosen": often, "workers": workers}
                return seconds(lambda: sum(1 for _ in image_batches(folder, 50, 299, **options)), time.perf_counter)

            alone = shared(0)
            found |= {f"clean, {workers} workers": round(alone / shared(workers), 2) for workers in (1, 2)}
    key = "load_images_vs_clean_fid"
    return {key: found["native"]["ratio"], f"{key}_detail": {**found, "largest_difference_of_clean": error}}


def statistics_50k(quick: bool, peer: str) -> dict[str, Any]:
    """Statistics of two samples of 50,000 rows of 2048 features, and the distance, in units of a peer's time."""
    key = f"fid_50k_2048_vs_{peer}"
    if quick:
        return {key: None, f"{key}_reason": "minutes per pair; run without --quick"}
    theirs = {"torchmetrics": with_torchmetrics, "pytorch_fid": with_pytorch_fid}[peer]()
    rows = torch.randn(50_000, 2048, generator=torch.Generator().manual_seed(0))
    batches = rows.split(250)
    values: dict[str, float] = {}

    def ours() -> None:
        sides = [FeatureStats(2048), FeatureStats(2048)]
        for part in batches:
            sides[0].update(part)
            sides[1].update(part * 1.1)
        values["ours"] = float(frechet_distance(*sides))

    def others() -> None:
        values["peer"] = theirs(batches)

    found = compare(ours, others, pairs=1, warmup=0)
    return {key: round(1 / found.speedup, 3), f"{key}_detail": {**found.spread(), **values}}


def with_torchmetrics() -> Callable[[tuple[Tensor, ...]], float]:
    """Torchmetrics' metric of features as they are, which sums squares batch by batch."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Identity(nn.Module):
        num_features = 2048

        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1)

    def run(batches: tuple[Tensor, ...]) -> float:
        metric = FrechetInceptionDistance(Identity(), normalize=True, input_img_size=(1, 1, 2048))
        for part in batches:
            metric.update(part.view(-1, 1, 1, 2048), real=True)
            metric.update((part * 1.1).view(-1, 1, 1, 2048), real=False)
        return float(metric.compute())

    return run


def with_pytorch_fid() -> Callable[[tuple[Tensor, ...]], float]:
    """pytorch-fid's steps: one float64 array of all features, numpy's covariance, its own distance."""
    from pytorch_fid.fid_score import calculate_frechet_distance

    def run(batches: tuple[Tensor, ...]) -> float:
        moments = []
        for scale in (1.0, 1.1):
            found = np.empty((sum(len(part) for part in batches), 2048))
            start = 0
            for part in batches:
                found[start : start + len(part)] = (part * scale).numpy()
                start += len(part)
            moments += [found.mean(0), np.cov(found, rowvar=False)]
        return float(calculate_frechet_distance(*moments))

    return run


def trained(quick: bool) -> dict[str, Any]:
    """Distances of the default loss over the baselines' at equal CPU time, as `reproduce/layers.py` measured them."""
    del quick
    file = Path(__file__).parents[1] / "reproduce" / "results" / "layers.json"
    results: dict[str, Any] = {}
    for task, found in json.loads(file.read_text(encoding="utf-8")).items():
        for method, name in (("ns", "ns"), ("wgan-gp", "wgan")):
            kinds = {r["generator"]: r for r in found["rows"] if r["method"] == method}
            key = f"train_vs_{name}_{task}"
            results[key] = round(kinds["averaged"]["ratio"], 3)
            results[f"{key}_detail"] = {
                f"{kind} {what}": row[what] for kind, row in kinds.items() for what in ("ratio", "ratio_range", "seeds")
            }
    return results


def at(bar: Callable[..., dict[str, Any]], *sizes: int, **names: str) -> Callable[[bool], dict[str, Any]]:
    """A bar at fixed sizes, or of a named peer."""
    return lambda quick: bar(*sizes, quick=quick, **names)


if __name__ == "__main__":
    run_bars(
        "frechet-gan",
        {
            "fd_grad_vs_sqrtm_256_512": at(against_sqrtm, 256, 512),
            "fd_grad_vs_sqrtm_1024_2048": at(against_sqrtm, 1024, 2048),
            "fd_grad_vs_eigvalsh_autograd": against_eigvalsh,
            "fd_cov2048_vs_torchmetrics": covariances_2048,
            "fd_value_rel_error_f64": errors_float64,
            "fd_f32_rel_error": error_float32,
            "collapsed_grad_finite_nonzero": collapsed,
            **{f"assignment_vs_pot_{n}": at(assignment, n) for n in (64, 256, 1024)},
            "ddp_grad_rel_error": ddp,
            "virtual_batch": virtual_batch,
            "rtd10k_vs_plugin50k_error": debiased,
            "step_vs_ns": step,
            "stats_update_batch64_vs_batch1000": stats_update,
            "interval_coverage": interval_coverage,
            "load_images_vs_clean_fid": load_images,
            **{f"fid_50k_2048_vs_{p}": at(statistics_50k, peer=p) for p in ("torchmetrics", "pytorch_fid")},
            "train_vs_baselines": trained,
        },
    )
