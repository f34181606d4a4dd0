"""Evaluate a generator in feature spaces it never saw, and say when the figures are not to be trusted."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from core_tensor.checks import check_choice, check_number
from torch import Tensor

from frechet_gan.choices import ESTIMATORS, Estimator
from frechet_gan.encoders.frozen import Encoder, encode
from frechet_gan.evaluation.manifold import manifold, memorized_share
from frechet_gan.frechet.distance import frechet_distance
from frechet_gan.frechet.estimators import Estimate, estimate_frechet
from frechet_gan.frechet.stats import FeatureStats
from frechet_gan.images.arrays import check_images, check_same_range
from frechet_gan.transport.mmd import cmmd, kid, subset_rows

MANIFOLD_ROWS, MMD_ROWS = 5000, 10_000
"""Most rows of either side for figures whose cost grows with the square of their number."""

Sampler = Callable[[int, int], Tensor]  # (count, seed) to images


@dataclass(frozen=True)
class Alarms:
    """Thresholds of the alarms.

    Attributes:
        hacking: Held-out ratio over training ratio above which the training encoder was gamed.
        rank: Effective rank over the real one below which the samples have collapsed.
        coverage: Coverage below which modes are missing.
        memorized: Share of near copies of real images above which the generator repeats its data.
    """

    hacking: float = 3.0
    rank: float = 0.5
    coverage: float = 0.3
    memorized: float = 0.4


@dataclass(frozen=True)
class EncoderReport:
    """One encoder's view of a generator.

    Attributes:
        encoder: Name.
        heldout: Whether the generator never saw it.
        width: Number of features, d.
        count: Generated images per seed.
        real_count: Real images.
        distance: Frechet distance by estimator, mean over the seeds.
        spread: Standard deviation over the sampling seeds, by estimator; 0 with one seed.
        low: Lower end of the confidence interval of `rtd`, of the first seed; None without it.
        high: Upper end of it.
        ratio: FD(generated, real) / FD(other real, real) at equal counts: 1 is as good as real data.
        kid: Kernel distance, mean over subsets.
        kid_spread: Its standard deviation over subsets.
        cmmd: CMMD of this encoder's features.
        precision: Share of generated images inside the real manifold.
        recall: Share of real images inside the generated manifold.
        density: Mean number of real balls around a generated image, over k.
        coverage: Share of real balls that hold a generated image.
        rank: Effective rank of the generated features over the real ones'.
        memorized: Share of generated images that are near copies of real ones; see `manifold.memorized_share`.
        rows: Generated and real images that a figure is taken from, by figure: estimators, `ratio`, `kid`, `cmmd`,
            `manifold`, `memorized`; a random choice where it is not all of them.
        seconds: Wall-clock time by figure.
    """

    encoder: str
    heldout: bool
    width: int
    count: int
    real_count: int
    distance: dict[str, float]
    spread: dict[str, float]
    low: float | None
    high: float | None
    ratio: float
    kid: float
    kid_spread: float
    cmmd: float
    precision: float
    recall: float
    density: float
    coverage: float
    rank: float
    memorized: float
    rows: dict[str, tuple[int, int]]
    seconds: dict[str, float] = field(compare=False)


@dataclass(frozen=True)
class Report:
    """An evaluation.

    Attributes:
        encoders: One report per encoder.
        fdr: Mean ratio over the held-out encoders (FDr^k), or over all if none is held out.
        alarms: What is wrong with the generator or the figures; empty if nothing is.
    """

    encoders: list[EncoderReport]
    fdr: float
    alarms: list[str]

    def as_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON; without times, so that the same seed gives the same report.

        Returns:
            Nested dictionaries and lists.
        """
        found = asdict(self)
        for view in found["encoders"]:
            del view["seconds"]
        return found


def effective_rank(covariance: Tensor) -> float:
    """Exponential of the entropy of the normalised eigenvalues: how many directions carry variance.

    Args:
        covariance: Covariance, shape (d, d).

    Returns:
        A number in [1, d]; 0 for a zero matrix.
    """
    values = torch.linalg.eigvalsh(covariance.double()).clamp_min(0)
    if float(values.sum()) <= 0:
        return 0.0
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())


def evaluate(
    sampler: Sampler | Tensor,
    real: Tensor,
    encoders: Mapping[str, Encoder] | None = None,
    heldout: Mapping[str, Encoder] | None = None,
    *,
    estimators: Sequence[Estimator] = ("plugin",),
    count: int | None = None,
    seeds: int = 1,
    alarms: Alarms | None = None,
) -> Report:
    """Compare generated with real images.

    Args:
        sampler: Maps (count, seed) to generated images, or the images themselves.
        real: Real images, shape (n, c, h, w); one half is the reference, the other what a perfect generator scores.
        encoders: Encoders the generator was trained with, by name.
        heldout: Encoders it never saw, by name. Only these can show that an encoder was gamed.
        estimators: Estimators of the distance to all real images.
        count: Generated images per seed; half the number of real ones if None.
        seeds: Number of sampling seeds the spread is taken over; 1 with images.
        alarms: Thresholds.

    Returns:
        The report.

    Raises:
        ValueError: If there is no encoder, a name is used twice, there are too few real images, or one side is in
            another range of values.

    Source:
        arXiv 2604.28190 (FDr^k and the hacking of a single encoder).
    """
    check_images("real", real)
    check_number("seeds", seeds, low=1, integer=True)
    for name in estimators:
        check_choice("estimators", name, ESTIMATORS)
    if real.shape[0] < 16:
        raise ValueError(f"real: expected at least 16 images, got {real.shape[0]}")
    views = [(name, e, False) for name, e in (encoders or {}).items()]
    views += [(name, e, True) for name, e in (heldout or {}).items()]
    if not views or len({name for name, _, _ in views}) < len(views):
        raise ValueError("encoders, heldout: expected at least one encoder and every name once")
    if isinstance(sampler, Tensor):
        samples = [sampler]
    else:
        samples = [sampler(count or real.shape[0] // 2, seed) for seed in range(seeds)]
    for images in samples:
        check_images("sampler", images)
    check_same_range(samples[0], real)
    reports = [
        judge(name, [encode(e, images) for images in samples], encode(e, real), estimators, heldout=held)
        for name, e, held in views
    ]
    judged = [r for r in reports if r.heldout] or reports
    fdr = sum(r.ratio for r in judged) / len(judged)
    return Report(reports, fdr, raise_alarms(reports, alarms or Alarms()))


def judge(
    name: str,
    generated: Sequence[Tensor],
    target: Tensor,
    estimators: Sequence[Estimator] = ("plugin",),
    *,
    heldout: bool = True,
    confidence: float = 0.95,
) -> EncoderReport:
    """One encoder's view, from its features.

    Args:
        name: The encoder's name.
        generated: Features of generated images, shape (n, d), one tensor per sampling seed.
        target: Features of the real images, shape (m, d).
        estimators: Estimators of the distance.
        heldout: Whether the generator never saw the encoder.
        confidence: Coverage of the interval.

    Returns:
        The view.
    """
    seconds: dict[str, float] = {}
    rows: dict[str, tuple[int, int]] = {}
    first, start = generated[0], time.perf_counter()
    # folders are often in the order of their classes: parts are drawn, not cut off
    generator = torch.Generator().manual_seed(0)
    drawn_fake, drawn_real = (torch.randperm(len(side), generator=generator) for side in (first, target))

    def lap(what: str, fakes: int, reals: int) -> None:
        nonlocal start
        now = time.perf_counter()
        seconds[what], rows[what] = now - start, (fakes, reals)
        start = now

    # 1. distances to all real images, and what real images score among themselves
    found: dict[str, list[Estimate]] = {}
    for e in estimators:
        found[e] = [estimate_frechet(f, target, e, confidence=confidence, seed=i) for i, f in enumerate(generated)]
        lap(e, len(first), len(target))
    reference, other = target[drawn_real[::2]], target[drawn_real[1::2]]
    equal = min(len(first), len(other))  # the plug-in's bias is the same on both sides of the ratio
    best = float(frechet_distance(other[:equal].double(), reference.double()))
    ratios = [
        float(frechet_distance(f[drawn_fake[:equal]].double(), reference.double())) / max(best, 1e-300)
        for f in generated
    ]
    lap("ratio", equal, len(reference))
    # 2. kernels
    kernel, kernel_spread = kid(first, target, subsets=20)
    size = subset_rows(first, target)
    lap("kid", size, size)
    some, few_real = first[drawn_fake[:MMD_ROWS]], target[drawn_real[:MMD_ROWS]]
    clip_like = cmmd(some, few_real)
    lap("cmmd", len(some), len(few_real))
    # 3. neighbors, and the spread over directions
    few = min(MANIFOLD_ROWS, len(first), len(reference))
    shape = manifold(first[drawn_fake[:few]], reference[:few])
    lap("manifold", few, few)
    some = first[drawn_fake[:MANIFOLD_ROWS]]
    copies = memorized_share(some, target)
    lap("memorized", len(some), len(target))
    ranks = [effective_rank(FeatureStats.from_features(f).covariance()) for f in (first, target)]
    lap("rank", len(first), len(target))
    interval = next(((e[0].low, e[0].high) for e in found.values() if e[0].low is not None), (None, None))
    return EncoderReport(
        encoder=name,
        heldout=heldout,
        width=first.shape[1],
        count=first.shape[0],
        real_count=target.shape[0],
        distance={e: sum(v.value for v in runs) / len(runs) for e, runs in found.items()},
        spread={e: _deviation([v.value for v in runs]) for e, runs in found.items()},
        low=interval[0],
        high=interval[1],
        ratio=sum(ratios) / len(ratios),
        kid=kernel,
        kid_spread=kernel_spread,
        cmmd=clip_like,
        precision=shape.precision,
        recall=shape.recall,
        density=shape.density,
        coverage=shape.coverage,
        rank=ranks[0] / max(ranks[1], 1e-300),
        memorized=copies,
        rows=rows,
        seconds=seconds,
    )


def _deviation(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


def raise_alarms(reports: Sequence[EncoderReport], alarms: Alarms) -> list[str]:
    """What the figures say is wrong.

    Args:
        reports: One report per encoder.
        alarms: Thresholds.

    Returns:
        One sentence per alarm.
    """
    found = []
    train = [r.ratio for r in reports if not r.heldout]
    held = [r.ratio for r in reports if r.heldout]
    if train and not held:
        found.append("hacking: no held-out encoder was given, so a gamed training encoder cannot be seen")
    elif train:
        gap = (sum(held) / len(held)) / (sum(train) / len(train))
        if gap > alarms.hacking:
            found.append(
                f"hacking: {gap:.1f} times worse on held-out encoders than on those trained with "
                f"(limit {alarms.hacking:g})"
            )
    for report in reports:
        if report.rank < alarms.rank:
            found.append(f"collapse: effective rank {report.rank:.2f} of the real one in {report.encoder}")
        if report.heldout and report.coverage < alarms.coverage:
            found.append(f"collapse: coverage {report.coverage:.2f} in {report.encoder}: modes are missing")
        if report.memorized > alarms.memorized:
            found.append(
                f"memorization: {100 * report.memorized:.0f} % of the images are near copies of real ones in "
                f"{report.encoder}"
            )
        if report.count < 4 * report.width:
            found.append(
                f"bias: {report.count} images for {report.width} features in {report.encoder}; "
                "the plug-in is dominated by its bias, take at least 4 per feature or rtd"
            )
    return found
