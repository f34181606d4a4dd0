"""Streaming, mergeable first and second moments of features, and their npz file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from core_tensor import centred_moments
from core_tensor.app.files import atomic_path, read_npz
from core_tensor.checks import check_choice, check_number, check_tensor
from torch import Tensor

from frechet_gan.frechet.factors import Factor, triangular_root

_LARGEST = 1e150  # squares of larger entries overflow
_TOGETHER = 1000  # rows that are absorbed at once, so that small batches cost little more per row than large ones


class FeatureStats:
    """Count, mean and centred second moments of a stream of features, in float64.

    Batches are merged by Chan's update, so neither the order nor the sizes of the batches matter beyond round-off
    and a large mean costs no digits (sums of raw squares would).

    Args:
        dim: Width of the features, d.
        device: Where the moments live.

    Attributes:
        encoder: What made the features, as `encoders.registry.identity` says it; None where a file did not say.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        check_number("dim", dim, low=1, integer=True)
        self.encoder: str | None = None
        self._count = 0
        self._mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)
        self._waiting: list[Tensor] = []  # rows of small batches, absorbed together: each time costs d^2
        self._rows_waiting = 0
        self._root: tuple[Tensor, Tensor] | None = None  # a scatter and its root, kept until there is another scatter
        self._fixed: Tensor | None = None  # the covariance of a file that does not say how many rows it is of

    @property
    def dim(self) -> int:
        """Width of the features, d."""
        return self._mean.shape[0]

    @property
    def count(self) -> int:
        """Number of rows seen, n; 0 where a file did not say."""
        return self._count + self._rows_waiting

    @property
    def mean(self) -> Tensor:
        """Mean, shape (d,), float64."""
        self._flush()
        return self._mean

    @property
    def scatter(self) -> Tensor:
        """Sum of (x - mean)(x - mean)ᵀ, shape (d, d), float64."""
        self._flush()
        return self._scatter

    def _set(self, count: int, mean: Tensor, scatter: Tensor) -> FeatureStats:
        """Replace all moments."""
        self._waiting, self._rows_waiting = [], 0
        self._count, self._mean, self._scatter = count, mean, scatter
        return self

    def covariance(self, ddof: int = 1) -> Tensor:
        """Covariance with divisor n - ddof.

        Args:
            ddof: 1 for the unbiased estimate (FID's convention), 0 for the population's.

        Returns:
            Covariance, shape (d, d), float64.

        Raises:
            ValueError: If fewer than two rows were seen.
        """
        self._check_count(ddof)
        return self._fixed if self._fixed is not None else self.scatter / (self.count - ddof)

    def factor(self, ddof: int = 1) -> Factor:
        """The Gaussian by the root of its covariance, which is computed once for as long as no rows are added.

        Args:
            ddof: The covariance's divisor is n - ddof.

        Returns:
            Mean, upper triangular factor and scale.

        Raises:
            ValueError: If fewer than two rows were seen.
        """
        self._check_count(ddof)
        if self._root is None or self._root[0] is not self.scatter:
            self._root = self.scatter, triangular_root(self.scatter)
        return Factor(self.mean, self._root[1], 1.0 if self._fixed is not None else (self.count - ddof) ** 0.5)

    def _check_count(self, ddof: int) -> None:
        check_choice("ddof", ddof, (0, 1))
        if self._fixed is None and self.count < 2:
            raise ValueError(f"FeatureStats: expected at least two samples, got {self.count}")

    def update(self, features: Tensor) -> FeatureStats:
        """Add a batch.

        Args:
            features: Batch, shape (n, d), any floating dtype; finite. No gradient passes.

        Returns:
            Itself.

        Raises:
            ValueError: If the width differs, or a feature is NaN, infinite or too large to be squared.
        """
        check_tensor("features", features, shape=(None, self.dim), finite=True)
        if not features.shape[0]:
            return self
        self._refuse()
        if features.dtype == torch.float64 and float(features.detach().abs().max()) > _LARGEST:
            raise ValueError(f"features: expected entries below 1e150, got {float(features.detach().abs().max()):.3g}")
        # the caller may change its batch afterwards; a large one is absorbed at once and needs no copy
        large = features.shape[0] >= _TOGETHER
        self._waiting.append(features.detach() if large else features.detach().clone())
        self._rows_waiting += features.shape[0]
        if self._rows_waiting >= _TOGETHER:
            self._flush()
        return self

    def _flush(self) -> None:
        """Absorb the rows that wait."""
        if self._waiting:
            rows = self._waiting[0] if len(self._waiting) == 1 else torch.cat(self._waiting)
            self._waiting, self._rows_waiting = [], 0
            mean, scatter = centred_moments(rows)
            self._absorb(rows.shape[0], mean.to(self._mean), scatter.to(self._scatter))

    def merge(self, other: FeatureStats) -> FeatureStats:
        """Add the rows another object has seen.

        Args:
            other: Statistics of the same width; left as they are.

        Returns:
            Itself.

        Raises:
            ValueError: If the widths differ.
        """
        if other.dim != self.dim:
            raise ValueError(f"other: expected statistics of width {self.dim}, got {other.dim}")
        if other._fixed is not None:
            other._refuse()
        if other.count:
            self._absorb(other.count, other.mean.to(self.mean), other.scatter.to(self.scatter))
        return self

    def _absorb(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        self._refuse()
        self._flush()
        total = self._count + count
        delta = mean - self._mean
        apart = delta * (self._count * count / total) ** 0.5
        scatter = (self._scatter + scatter).addr_(apart, apart)  # symmetric to the last bit, and in two passes
        self._count, self._mean, self._scatter = total, self._mean + delta * (count / total), scatter

    def _refuse(self) -> None:
        if self._fixed is not None:
            raise ValueError("FeatureStats: the file does not say how many samples it is of; load(path, count=...)")

    def all_reduce(self, group: torch.distributed.ProcessGroup | None = None) -> FeatureStats:
        """Merge the statistics of every rank of a process group, identically on each.

        Args:
            group: Process group; the default one if None. Without an initialised group nothing happens.

        Returns:
            Itself.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self
        self._refuse()
        count = torch.tensor([float(self.count)], dtype=torch.float64, device=self.mean.device)
        total = count.clone()
        torch.distributed.all_reduce(total, group=group)
        mean = self.mean * count
        torch.distributed.all_reduce(mean, group=group)
        mean /= total.clamp_min(1)
        delta = self.mean - mean
        scatter = self.scatter + count * torch.outer(delta, delta)  # about the common mean
        torch.distributed.all_reduce(scatter, group=group)
        return self._set(int(total), mean, scatter)

    @classmethod
    def from_features(cls, features: Tensor) -> FeatureStats:
        """Statistics of one batch.

        Args:
            features: Batch, shape (n, d).

        Returns:
            New statistics.
        """
        check_tensor("features", features, ndim=2)
        return cls(features.shape[1], features.device).update(features)

    @classmethod
    @torch.no_grad()
    def from_loader(cls, encoder: Callable[[Tensor], Tensor], batches: Iterable[Tensor]) -> FeatureStats:
        """Statistics of an encoder's features over batches of images.

        Args:
            encoder: Maps images (n, c, h, w) to features (n, d).
            batches: Batches of images.

        Returns:
            New statistics.

        Raises:
            ValueError: If there is no batch, or the encoder's output is not (n, d).
        """
        stats: FeatureStats | None = None
        for images in batches:
            features = encoder(images)
            check_tensor("encoder(images)", features, shape=(images.shape[0], None))
            stats = stats or cls(features.shape[1], features.device)
            stats.update(features)
        if stats is None:
            raise ValueError("batches: expected at least one batch of images, got none")
        return stats

    @classmethod
    def from_moments(cls, mean: Tensor, covariance: Tensor, count: int, ddof: int = 1) -> FeatureStats:
        """Statistics from a mean, a covariance and the number of rows behind them.

        Args:
            mean: Mean, shape (d,).
            covariance: Covariance, shape (d, d).
            count: Number of rows.
            ddof: The covariance's divisor is count - ddof.

        Returns:
            New statistics.

        Raises:
            ValueError: If shapes differ, a value is not finite, or the covariance is not symmetric.
        """
        check_number("count", count, low=2, integer=True)
        check_tensor("mean", mean, ndim=1, finite=True)
        check_tensor("covariance", covariance, shape=(mean.shape[0], mean.shape[0]), finite=True)
        covariance = covariance.double()
        for name, value in (("mean", mean), ("covariance", covariance)):
            if value.numel() and float(value.abs().max()) > _LARGEST:
                raise ValueError(f"{name}: expected entries below {_LARGEST:g}, got {float(value.abs().max()):.3g}")
        if bool((covariance.diagonal() < 0).any()):
            raise ValueError("covariance: expected variances of at least zero on its diagonal")
        if not torch.allclose(covariance, covariance.mT, rtol=1e-5, atol=1e-8 * float(covariance.abs().max() + 1e-300)):
            raise ValueError("covariance: expected a symmetric matrix")
        stats = cls(mean.shape[0], mean.device)
        return stats._set(count, mean.double(), (covariance + covariance.mT) / 2 * (count - ddof))

    @classmethod
    def from_sums(cls, total: Tensor, outer: Tensor, count: int | Tensor) -> FeatureStats:
        """Statistics from raw sums, the state torchmetrics' FrechetInceptionDistance keeps.

        Args:
            total: Σ x, shape (d,) (`real_features_sum`).
            outer: Σ x xᵀ, shape (d, d) (`real_features_cov_sum`).
            count: Number of rows (`real_features_num_samples`, a tensor there).

        Returns:
            New statistics.
        """
        count = int(count)
        mean = total.double() / count
        return cls.from_moments(mean, (outer.double() - count * torch.outer(mean, mean)) / count, count, ddof=0)

    def to_sums(self) -> tuple[Tensor, Tensor, int]:
        """The raw sums torchmetrics keeps.

        Returns:
            Σ x (d,), Σ x xᵀ (d, d) and the number of rows.
        """
        self._refuse()
        return self.mean * self.count, self.scatter + self.count * torch.outer(self.mean, self.mean), self.count

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an npz, atomically: `mu`, `sigma` (divisor n - 1, the layout of pytorch-fid), `count` and `encoder`.

        Args:
            path: File name; must end in `.npz`.

        Raises:
            ValueError: If the name does not end in `.npz` or fewer than two rows were seen.
        """
        if Path(path).suffix != ".npz":
            raise ValueError(f"path: expected a name ending in .npz, got {os.fspath(path)!r}")
        arrays = {"mu": self.mean.cpu().numpy(), "sigma": self.covariance().cpu().numpy()}
        if self._fixed is None:
            arrays["count"] = np.array(self.count)
        if self.encoder is not None:
            arrays["encoder"] = np.array(self.encoder)
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | os.PathLike[str], count: int | None = None) -> FeatureStats:
        """Read an npz written by `save` or by pytorch-fid.

        Args:
            path: File name.
            count: Number of rows behind a file that does not say (pytorch-fid's do not).

        Returns:
            The statistics. Without a count they can be compared with, but not merged or updated.

        Raises:
            ValueError: If the file is no npz, or lacks `mu` or `sigma` of fitting shapes.
            FileNotFoundError: If there is no such file.
        """
        arrays = read_npz(path, "mu", "sigma")
        mean, covariance = arrays["mu"], arrays["sigma"]
        if mean.dtype.kind != "f" or covariance.dtype.kind != "f" or covariance.shape != mean.shape * 2:
            raise ValueError(
                f"{path}: expected floating mu (d,) and sigma (d, d), got {mean.dtype} {mean.shape} "
                f"and {covariance.dtype} {covariance.shape}"
            )
        rows = count
        if "count" in arrays:
            if arrays["count"].shape != () or arrays["count"].dtype.kind not in "iu":
                raise ValueError(f"{path}: expected one integer as count, got {arrays['count'].dtype}")
            rows = int(arrays["count"])
        try:
            stats = cls.from_moments(torch.from_numpy(mean), torch.from_numpy(covariance), 2 if rows is None else rows)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error
        if rows is None:
            stats._count, stats._fixed = 0, stats.scatter
        if "encoder" in arrays and arrays["encoder"].shape == () and arrays["encoder"].dtype.kind == "U":
            stats.encoder = str(arrays["encoder"])
        return stats
