"""Samples from what people train with: a loader, a dataset, or tensors; and an honest subsample of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from core_tensor.checks import check_number
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
)

from sgd_stability.curvature.network import Inputs, take
from sgd_stability.distributed import ALONE, Ranks

Data = DataLoader[Any] | Dataset[Any] | tuple[Inputs, Tensor] | Iterable[tuple[Inputs, Tensor]]


@dataclass(frozen=True)
class Samples:
    """Samples to analyse.

    Attributes:
        inputs: Inputs, n' along the first dimension.
        targets: Targets, n' along the first dimension.
        ids: Position of every sample in the data set, shape (n',).
        n: Size of the whole data set.
    """

    inputs: Inputs
    targets: Tensor
    ids: Tensor
    n: int

    @property
    def complete(self) -> bool:
        """Whether every sample of the data set is here."""
        return len(self.ids) == self.n


def collect(
    data: Data,
    *,
    max_samples: int | None = 512,
    seed: int = 0,
    device: torch.device | None = None,
    ranks: Ranks = ALONE,
) -> Samples:
    """Take all samples, or a uniform subsample without replacement.

    Args:
        data: A `DataLoader` (its data set is indexed directly, so shuffling does not matter), a `Dataset`, a pair
            (inputs, targets) of tensors, or an iterable of such batches. Inputs may be a mapping of tensors.
        max_samples: Most samples to take; None takes all.
        seed: Seed of the subsample.
        device: Where to put them.
        ranks: Who shares the work; all of them must be given the same data.

    Returns:
        The samples.

    Raises:
        ValueError: If there are no samples, inputs and targets differ in number, ranks have different data, or a
            loader draws samples with weights.
        TypeError: If the data are none of the above.
    """
    if max_samples is not None:
        check_number("max_samples", max_samples, low=1, integer=True)
    generator = torch.Generator().manual_seed(seed)
    source: Any = data
    collate: Any = default_collate
    if isinstance(source, DataLoader) and not isinstance(source.dataset, IterableDataset):
        source, collate = _sampled(source), source.collate_fn
    if isinstance(source, tuple) and len(source) == 2:
        inputs, targets = _checked(source)
        n = len(targets)
        ids = _choose(n, max_samples, generator)
        inputs, targets = take(inputs, ids), targets[ids]
    elif hasattr(source, "__getitem__") and hasattr(source, "__len__") and not isinstance(source, Mapping):
        n = len(source)
        ids = _choose(n, max_samples, generator)
        inputs, targets = _checked(collate([source[int(i)] for i in ids]))
    elif isinstance(source, Iterable):
        inputs, targets, ids, n = _stream(source, max_samples, generator)
    else:
        raise TypeError(f"data: expected a loader, a dataset or (inputs, targets), got {type(data).__name__}")
    if device is not None:
        inputs = {k: v.to(device) for k, v in inputs.items()} if isinstance(inputs, Mapping) else inputs.to(device)
        targets = targets.to(device)
    ranks.agree("data", torch.cat([targets.double().reshape(len(targets), -1).sum(1).cpu(), torch.tensor([float(n)])]))
    return Samples(inputs, targets, ids, n)


def _sampled(loader: DataLoader[Any]) -> Any:
    # The data set as the loader draws from it. Epochs, shuffling and shards of ranks do not matter here; weights do.
    if isinstance(loader.sampler, WeightedRandomSampler):
        raise ValueError("data: expected a loader that draws all samples alike, got one with a WeightedRandomSampler")
    if isinstance(loader.sampler, SubsetRandomSampler):
        return Subset(loader.dataset, list(loader.sampler.indices))
    return loader.dataset


def _choose(n: int, most: int | None, generator: torch.Generator) -> Tensor:
    if n == 0:
        raise ValueError("data: expected at least one sample, got none")
    if most is None or most >= n:
        return torch.arange(n)
    return torch.randperm(n, generator=generator)[:most].sort().values


def _stream(batches: Iterable[Any], most: int | None, generator: torch.Generator) -> tuple[Inputs, Tensor, Tensor, int]:
    # Uniform subsample of a stream: keep the samples with the smallest random keys.
    kept: list[tuple[float, int, Inputs, Tensor]] = []
    n = 0
    for batch in batches:
        inputs, targets = _checked(batch)
        keys = torch.rand(len(targets), generator=generator, dtype=torch.float64).tolist()
        for i, key in enumerate(keys):
            kept.append((key, n + i, take(inputs, slice(i, i + 1)), targets[i : i + 1]))
        n += len(targets)
        if most is not None:
            kept = sorted(kept, key=lambda entry: entry[0])[:most]
    if n == 0:
        raise ValueError("data: expected at least one sample, got none")
    kept.sort(key=lambda entry: entry[1])
    first = kept[0][2]
    if isinstance(first, Mapping):
        rows = [cast("Mapping[str, Tensor]", entry[2]) for entry in kept]
        inputs = {name: torch.cat([row[name] for row in rows]) for name in first}
    else:
        inputs = torch.cat([cast("Tensor", entry[2]) for entry in kept])
    return inputs, torch.cat([entry[3] for entry in kept]), torch.tensor([entry[1] for entry in kept]), n


def _checked(batch: Any) -> tuple[Inputs, Tensor]:
    if not isinstance(batch, Sequence) or len(batch) != 2:
        raise TypeError(f"data: expected batches (inputs, targets), got {type(batch).__name__}")
    inputs, targets = batch
    values = list(inputs.values()) if isinstance(inputs, Mapping) else [inputs]
    for value in [*values, targets]:
        if not isinstance(value, Tensor):
            raise TypeError(f"data: expected tensors, or mappings of them as inputs, got {type(value).__name__}")
        if value.ndim == 0 or len(value) != len(targets):
            raise ValueError(f"data: expected {len(targets)} inputs, one per target, got shape {tuple(value.shape)}")
    return inputs, targets
