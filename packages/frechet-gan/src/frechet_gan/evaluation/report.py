"""Evaluate a generator in feature spaces it never saw, and say when the figures are not to be trusted."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from core_tensor.checks import check_choice, check_number
from torch import Tensor

from frechet_gan.encoders.frozen import Encoder, encode
from frechet_gan.evaluation.manifold import manifold
from frechet_gan.frechet.distance import frechet_distance
from frechet_gan.frechet.estimators import ESTIMATORS, Estimator, estimate_frechet
from frechet_gan.frechet.stats import FeatureStats
from frechet_gan.images.files import check_images
from frechet_gan.transport.mmd import kid

Sampler = Callable[[int, int], Tensor]  # (count, seed) to images


@dataclass(frozen=True)
class Alarms:
    """Thresholds of the alarms.

    Attributes:
        hacking: Held-out ratio over training ratio above which the training encoder was gamed.
        rank: Effective rank over the real one below which the samples have collapsed.
        coverage: Coverage below which modes are missing.
    """

    hacking: float = 3.0
    rank: float = 0.5
    coverage: float = 0.3


@dataclass(frozen=True)
class EncoderReport:
    """One encoder's view of a generator.

    Attributes:
        encoder: Name.
        heldout: Whether the generator never saw it.
        width: Number of features, d.
        count: Generated images per seed.
        distance: Frechet distance by estimator, mean over the seeds.
        spread: Standard deviation over the sampling seeds, by estimator; 0 with one seed.
        ratio: FD(generated, real) / FD(other real, real) at equal counts: 1 is as good as real data.
        kid: Kernel distance, mean over subsets.
        precision: Share of generated images inside the real manifold.
        recall: Share of real images inside the generated manifold.
        density: Mean number of real balls around a generated image, over k.
        coverage: Share of real balls that hold a generated image.
        rank: Effective rank of the generated features over the real ones'.
    """

    encoder: str
    heldout: bool
    width: int
    count: int
    distance: dict[str, float]
    spread: dict[str, float]
    ratio: float
    kid: float
    precision: float
    recall: float
    density: float
    coverage: float
    rank: float


@dataclass(frozen=True)
class Report:
    """An evaluation.

    Attributes:
        encoders: One report per encoder.
        fdr: Mean ratio over the held-out encoders (FDr^k), or over all if none is held out.
        alarms: What is wrong with the generator or the figures, in words; empty if nothing is.
    """

    encoders: list[EncoderReport]
    fdr: float
    alarms: list[str]

    def as_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON.

        Returns:
            Nested dictionaries and lists.
        """
        return asdict(self)


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
        ValueError: If there is no encoder, a name is used twice, or there are too few real images.

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
    reports = [_view(name, e, held, samples, real, estimators) for name, e, held in views]
    judged = [r for r in reports if r.heldout] or reports
    fdr = sum(r.ratio for r in judged) / len(judged)
    return Report(reports, fdr, raise_alarms(reports, alarms or Alarms()))


def _view(
    name: str, encoder: Encoder, heldout: bool, samples: list[Tensor], real: Tensor, estimators: Sequence[Estimator]
) -> EncoderReport:
    target = encode(encoder, real)
    reference, other = target[::2], target[1::2]
    generated = [encode(encoder, images) for images in samples]
    values = {e: [estimate_frechet(f, target, e, seed=i).value for i, f in enumerate(generated)] for e in estimators}
    first = generated[0]
    equal = min(first.shape[0], other.shape[0])  # the plug-in's bias is the same on both sides of the ratio
    best = float(frechet_distance(other[:equal].double(), reference.double()))
    ratios = [float(frechet_distance(f[:equal].double(), reference.double())) / max(best, 1e-300) for f in generated]
    few = min(2000, first.shape[0], reference.shape[0])
    shape = manifold(first[:few], reference[:few])
    ranks = [effective_rank(FeatureStats.from_features(f).covariance()) for f in (first, target)]
    return EncoderReport(
        encoder=name,
        heldout=heldout,
        width=first.shape[1],
        count=first.shape[0],
        distance={e: sum(v) / len(v) for e, v in values.items()},
        spread={e: _deviation(v) for e, v in values.items()},
        ratio=sum(ratios) / len(ratios),
        kid=kid(first, target, subsets=20)[0],
        precision=shape.precision,
        recall=shape.recall,
        density=shape.density,
        coverage=shape.coverage,
        rank=ranks[0] / max(ranks[1], 1e-300),
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
        if report.count < 4 * report.width:
            found.append(
                f"bias: {report.count} images for {report.width} features in {report.encoder}; "
                "the plug-in is dominated by its bias, take at least 4 per feature or rtd"
            )
    return found
