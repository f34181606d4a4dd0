"""Two sets of images, on disk or in memory, compared by name of encoder: what `fid` and the command `eval` are."""

import itertools
import os
import random
import time
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from core_tensor.app.cli import progress
from core_tensor.app.devices import check_device
from core_tensor.app.files import atomic_path, digest, read_npz, reading
from core_tensor.checks import check_number
from torch import Tensor

from frechet_gan.choices import RESIZES, Estimator, Resize
from frechet_gan.encoders.frozen import Encoder, FrozenEncoder, encode, encoded_batches
from frechet_gan.encoders.inception import InceptionFID
from frechet_gan.encoders.registry import identity, load_encoder
from frechet_gan.evaluation.report import Alarms, judge, raise_alarms
from frechet_gan.frechet.distance import frechet_distance
from frechet_gan.frechet.stats import FeatureStats
from frechet_gan.images.files import image_batches
from frechet_gan.images.memory import memory_batches
from frechet_gan.images.sources import Source, open_images


class Reader:
    """An encoder with the way images reach it.

    Args:
        name: Name for `load_encoder`, or an encoder of your own.
        resize: How images are brought to the encoder's size.
        size: Height and width images are resized to before, in pixels; the encoder's own if None.
        device: Where it runs.
        batch: Images per call.
        workers: Processes that read and resize.
        cache: Folder in which features are kept by the content they are of; None for none.
    """

    def __init__(
        self,
        name: str | Encoder,
        *,
        resize: Resize = "native",
        size: int | None = None,
        device: str = "cpu",
        batch: int = 64,
        workers: int = 0,
        cache: str | os.PathLike[str] | None = None,
    ) -> None:
        if resize not in RESIZES:
            raise ValueError(f"resize: expected one of {', '.join(RESIZES)}, got {resize!r}")
        check_number("batch", batch, low=1, integer=True)
        check_number("workers", workers, low=0, integer=True)
        self.device, self.batch, self.workers, self.resize = check_device("device", device), batch, workers, resize
        self.encoder = load_encoder(name, device=device) if isinstance(name, str) else name
        self.size: int | None = size or getattr(self.encoder, "size", None)
        self.colored = isinstance(self.encoder, FrozenEncoder)  # which repeats grey images anyway
        network = getattr(self.encoder, "network", None)
        if isinstance(network, InceptionFID):
            network.like_pytorch_fid = resize == "legacy-pytorch"
        self.identity = f"{identity(name, self.encoder)} {resize}" if isinstance(name, str) else None
        if self.identity is not None and size is not None:
            self.identity += f" {size}px first"
        self.cache = None if cache is None else Path(cache)

    def batches(self, images: Source, channels: int | None, chosen: Sequence[int] | None = None) -> Iterator[Tensor]:
        """Images as the encoder takes them, with a progress bar."""
        total = -(-(len(images) if chosen is None else len(chosen)) // self.batch)
        found = image_batches(
            images,
            self.batch,
            self.size,
            resize=self.resize,
            workers=self.workers,
            channels=3 if self.colored else channels,
            chosen=chosen,
        )
        yield from progress(found, f"encode {images.path.name}", total, "batch")

    def stats(self, images: Source, channels: int | None = None, chosen: Sequence[int] | None = None) -> FeatureStats:
        """Statistics of the features, which are not kept; the cache keeps the statistics."""
        path = self._cached("stats", images, channels, chosen)
        if path is not None and path.exists():
            return FeatureStats.load(path)
        batches = self.batches(images, channels, chosen)
        found = self._absorbed(encoded_batches(self.encoder, batches, device=self.device))
        if path is not None and found.count > 1:
            found.save(path)
            return FeatureStats.load(path)  # so that the first call gives the digits of all later ones
        return found

    def features(
        self, images: Source, channels: int | None = None, chosen: Sequence[int] | None = None
    ) -> tuple[Tensor, bool]:
        """All features, shape (n, d), and whether they came from the cache."""
        path = self._cached("features", images, channels, chosen)
        if path is not None and path.exists():
            return torch.from_numpy(cached_features(path, len(images) if chosen is None else len(chosen))), True
        found = encode(self.encoder, self.batches(images, channels, chosen), device=self.device)
        if path is not None:
            with atomic_path(path) as temporary, temporary.open("wb") as file:
                np.savez(file, features=found.cpu().numpy(), encoder=np.array(self.identity))
        return found, False

    def _cached(self, what: str, images: Source, channels: int | None, chosen: Sequence[int] | None) -> Path | None:
        """The file of the cache for the content of images, as this encoder sees it; None without a cache."""
        if self.cache is None or self.identity is None:
            return None
        rows = None if chosen is None else digest(str(list(chosen)))
        key = digest(images.digest(), self.identity, channels, rows, version("frechet-gan"))
        return self.cache / f"{what}-{key}.npz"

    def stats_of_memory(
        self, images: Any, name: str, value_range: tuple[float, float] | None, chosen: Sequence[int] | None
    ) -> FeatureStats:
        """Statistics of the features of images in memory, which are resized on the way."""
        batches = memory_batches(
            images, name, self.batch, self.size, resize=self.resize, value_range=value_range, chosen=chosen
        )
        first = next(batches, None)
        if first is None:
            raise ValueError(f"{name}: expected images, got none")
        return self._absorbed(encoded_batches(self.encoder, itertools.chain([first], batches), device=self.device))

    def _absorbed(self, batches: Iterable[Tensor]) -> FeatureStats:
        found: FeatureStats | None = None
        for features in batches:
            found = found or FeatureStats(features.shape[1], features.device)
            found.update(features)
        assert found is not None  # encoded_batches refuses an empty source
        found.encoder = self.identity
        return found


def cached_features(path: Path, count: int) -> Any:
    """Features of the cache, of a number of images."""
    found = read_npz(path, "features")["features"]
    if found.ndim != 2 or found.shape[0] != count or found.dtype.kind != "f" or not np.isfinite(found).all():
        raise ValueError(f"{path}: expected {count} rows of features, got {found.dtype} {found.shape}; remove it")
    return found


def choose(images: Any, number: int | None, seed: int, name: str) -> list[int] | None:
    """Indices of a random choice of images, in order; None for all.

    Args:
        images: The images; anything with a length.
        number: How many; None for all.
        seed: Seed of the choice.
        name: What they are called, for messages.

    Returns:
        Indices, or None.

    Raises:
        ValueError: If there are fewer.
    """
    if number is None:
        return None
    check_number("num", number, low=2, integer=True)
    if not hasattr(images, "__len__"):
        raise ValueError(f"num: expected None, because {name} does not say how many images it has")
    if number > len(images):
        raise ValueError(f"{name}: expected at least {number} images (--num), found {len(images)}")
    return sorted(random.Random(seed).sample(range(len(images)), number))


def is_stats(path: str | os.PathLike[str]) -> bool:
    """Whether a file holds statistics and no images: an npz with `mu` and without `arr_0`."""
    if Path(path).suffix.lower() != ".npz" or Path(path).is_dir():
        return False
    names = _names(Path(path))
    return "arr_0" not in names


def _names(path: Path) -> list[str]:
    with reading(path, "an npz file"), zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


Images = Any  # a path, FeatureStats, or what `images.arrays.to_images` recognizes


def fid(
    a: Images,
    b: Images,
    encoder: str | Encoder = "inception",
    *,
    resize: Resize = "clean",
    num: int | None = None,
    device: str = "cpu",
    batch: int = 64,
    workers: int = 0,
    seed: int = 0,
    cache: str | os.PathLike[str] | None = None,
    value_range: tuple[float, float] | None = None,
) -> float:
    """Frechet distance of two sets of images, the plug-in that papers report.

    Args:
        a: Images: a folder, a zip file, an npz file (images `arr_0`, or statistics `mu` and `sigma`), a tensor
            (n, c, h, w), an array (n, h, w, c), a list or data set of images (PIL, arrays, pairs, dictionaries), a
            DataLoader, or `FeatureStats`.
        b: Images to compare with.
        encoder: Name for `load_encoder`, or a callable from images in [-1, 1] to features. `inception` takes the file
            that pytorch-fid, torchmetrics or torch-fidelity have downloaded.
        resize: `clean` as clean-fid, `legacy-pytorch` as pytorch-fid, `legacy-tf` as torch-fidelity, or `native`.
        num: Random choice of this many images of either side; all if None.
        device: Where the encoder runs.
        batch: Images per call of the encoder.
        workers: Processes that read and resize files.
        seed: Seed of the choice.
        cache: Folder in which statistics are kept by the content of folders and files; None for none.
        value_range: Smallest and largest value of floats in memory; [-1, 1] if None.

    Returns:
        The distance. It is biased upwards by about d²/n; `estimate_frechet(..., "rtd")` is not.

    Raises:
        ValueError: If images or weights cannot be read, or statistics are those of another encoder.
    """
    reader = Reader(encoder, resize=resize, device=device, batch=batch, workers=workers, cache=cache)
    sources = [open_images(s) if isinstance(s, (str, os.PathLike)) and not is_stats(s) else s for s in (a, b)]
    channels = shared_channels([s for s in sources if isinstance(s, Source)])
    sides = []
    for name, side in zip("ab", sources, strict=True):
        if isinstance(side, Source):
            sides.append(reader.stats(side, channels, choose(side, num, seed, str(side.path))))
        elif isinstance(side, (str, os.PathLike)):
            sides.append(FeatureStats.load(side))
        elif isinstance(side, FeatureStats):
            sides.append(side)
        else:
            sides.append(reader.stats_of_memory(side, name, value_range, choose(side, num, seed, name)))
    check_encoders(*sides)
    return float(frechet_distance(*sides))


def shared_channels(sources: Sequence[Source]) -> int:
    """1 if all images of all sources are grey, else 3."""
    return 1 if sources and all(source.grey() for source in sources) else 3


def check_encoders(a: FeatureStats, b: FeatureStats) -> None:
    """Refuse statistics of different encoders.

    Args:
        a: Statistics.
        b: Statistics.

    Raises:
        ValueError: If both say what made them, and it differs.
    """
    if a.encoder is not None and b.encoder is not None and a.encoder != b.encoder:
        raise ValueError(f"expected statistics of one encoder, got those of `{a.encoder}` and `{b.encoder}`")


def _labels(encoders: Sequence[str]) -> dict[str, str]:
    """A short name of each encoder: its kind, unless two are of one kind."""
    kinds = [name.partition(":")[0] for name in encoders]
    return {name: kind if kinds.count(kind) == 1 else name for name, kind in zip(encoders, kinds, strict=True)}


def compare(
    generated: str | os.PathLike[str],
    real: str | os.PathLike[str],
    encoders: Sequence[str],
    *,
    num: int | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Everything the command `eval` prints.

    Args:
        generated: Folder, zip file or npz file of images.
        real: Folder, zip file or npz file of images.
        encoders: Names of encoders.
        num: Random choice of this many images of either side; all if None.
        confidence: Coverage of the interval.
        seed: Seed of choices and splits.
        options: Those of `Reader`.

    Returns:
        Plain values: `encoders` (one report each), `fdr`, `alarms`, `notes`.

    Raises:
        ValueError: If images or weights cannot be read, or there are too few images.
    """
    if not encoders or len(set(encoders)) < len(encoders):
        raise ValueError(f"encoders: expected at least one name, and each once, got {', '.join(encoders)}")
    labels = _labels(encoders)
    sources = [open_images(generated), open_images(real)]
    channels = shared_channels(sources)
    chosen = [choose(s, num, seed, str(s.path)) for s in sources]
    notes = [note for source in sources if (note := source.note()) is not None]
    shares = [source.jpeg_share() for source in sources]
    if abs(shares[0] - shares[1]) > 0.5:
        notes.append(
            f"{100 * shares[0]:.0f} % of the generated and {100 * shares[1]:.0f} % of the real images are JPEG files: "
            "compression by itself moves distances"
        )
    reports, rows = [], []
    for name in encoders:
        reader, start = Reader(name, **options), time.perf_counter()
        (fake, _), (target, cached) = (
            reader.features(source, channels, c) for source, c in zip(sources, chosen, strict=True)
        )
        seconds = time.perf_counter() - start
        if min(len(fake), len(target)) < 16:
            raise ValueError(f"expected at least 16 images on either side, got {len(fake)} and {len(target)}")
        # the debiased estimator that the sample allows: rtd needs pilots of full rank
        fewest = min(len(fake), len(target))
        debiased: Estimator = "rtd" if fewest >= 4 * (fake.shape[1] + 1) / 3 + 1 else "vale2"
        view = judge(labels[name], [fake], target, ["plugin", debiased], confidence=confidence)
        view.seconds["encode"] = seconds
        reports.append(view)
        published = getattr(reader.encoder, "published", None)
        if published is False:
            notes.append(f"{name}: the weights are not the published file of FID: figures compare with none elsewhere")
        rows.append({**asdict(view), "identity": reader.identity, "published": published, "from_cache": cached})
    alarms = [a for a in raise_alarms(reports, Alarms()) if not a.startswith("hacking")]
    return {
        "encoders": rows,
        "fdr": sum(r.ratio for r in reports) / len(reports),
        "alarms": alarms,
        "notes": notes,
        "confidence": confidence,
        "resize": options.get("resize", "native"),
        "num": num,
        "seed": seed,
    }
