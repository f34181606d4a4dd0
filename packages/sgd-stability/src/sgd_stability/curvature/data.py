"""Samples from what people train with: a loader, a dataset, or tensors; and an honest subsample of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from core_tensor.app.ranks import ALONE, Ranks, current
from core_tensor.checks import check_number
from torch import Tensor
from torch import distributed as dist
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

Data = DataLoader[Any] | Dataset[Any] | tuple[Inputs, Tensor] | Mapping[str, Tensor] | Iterable[Any]


_LABELS = ("labels", "label", "label_ids")
"""What the targets are called in a mapping."""


_UNSUPPORTED = (torch.uint16, torch.uint32, torch.uint64)
"""Dtypes that torch can hold but hardly compute with."""


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
    like: Tensor | None = None,
    ranks: Ranks = ALONE,
) -> Samples:
    """Take all samples, or a uniform subsample without replacement.

    Args:
        data: A `DataLoader` (its dataset is indexed directly, so shuffling does not matter), a `Dataset`, a pair
            (inputs, targets) of tensors, or an iterable of such batches. Inputs may be a mapping of tensors, and a
            mapping may hold the targets too, as `labels`, `label` or `label_ids`.
        max_samples: Most samples to take; None takes all.
        seed: Seed of the subsample.
        like: A parameter of the model: samples go to its device, and floating ones take its dtype.
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
    if (isinstance(source, tuple) and len(source) == 2) or isinstance(source, Mapping):
        inputs, targets = _checked(source)
        n = len(targets)
        ids = _choose(n, max_samples, generator)
        inputs, targets = take(inputs, ids), targets[ids]
    elif hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        _check_samples(source)
        n = len(source)
        ids = _choose(n, max_samples, generator)
        samples = [source[int(i)] for i in ids]
        try:
            batch = collate(samples)
        except (ValueError, TypeError, RuntimeError, KeyError) as error:
            why = " ".join(str(error).split())
            raise ValueError(
                f"data: its samples cannot be put into one batch ({type(error).__name__}: {why})"
            ) from error
        inputs, targets = _checked(batch)
    elif isinstance(source, Iterable):
        inputs, targets, ids, n = _stream(source, max_samples, generator)
    else:
        raise TypeError(f"data: expected a loader, a dataset or (inputs, targets), got {type(data).__name__}")
    if like is not None:
        inputs = {k: _as(v, like) for k, v in inputs.items()} if isinstance(inputs, Mapping) else _as(inputs, like)
        targets = _as(targets, like)
    ranks.agree("data", torch.cat([targets.double().reshape(len(targets), -1).sum(1).cpu(), torch.tensor([float(n)])]))
    return Samples(inputs, targets, ids, n)


def _check_samples(source: Any) -> None:
    """Refuse a list that looks like `list(loader)`: as a dataset, every batch of it would pass for one sample."""
    first = source[0] if isinstance(source, list) and source else None
    if not isinstance(first, list | tuple | Mapping):
        return
    inputs, targets = _split(first)
    values = list(inputs.values()) if isinstance(inputs, Mapping) else [inputs]
    if any(not isinstance(value, Tensor) or value.ndim == 0 for value in [*values, targets]):
        return
    if max(value.ndim for value in values) > 1 and all(len(value) == len(targets) for value in values):
        raise ValueError(
            "data: expected a loader, a dataset, an iterator over batches or (inputs, targets), got a list that may "
            "hold samples or batches; pass iter(list) for batches, a Dataset for samples"
        )


def _as(value: Tensor, like: Tensor) -> Tensor:
    """On the model's device, and in its precision if it has any."""
    return value.to(like.device, like.dtype if value.is_floating_point() else None)


def _sampled(loader: DataLoader[Any]) -> Any:
    """The dataset as the loader draws from it: epochs, shuffling and shards of ranks do not matter here; weights do."""
    # a loader with a batch_sampler has its own sampler, which draws nothing
    sampler = loader.sampler if loader.batch_size is not None else getattr(loader.batch_sampler, "sampler", None)
    if isinstance(sampler, WeightedRandomSampler):
        raise ValueError("data: expected a loader that draws all samples alike, got one with a WeightedRandomSampler")
    if isinstance(sampler, SubsetRandomSampler):
        return Subset(loader.dataset, list(sampler.indices))
    return loader.dataset


def batch_size_of(data: Data) -> int | None:
    """The batch size of a loader.

    Args:
        data: Any data.

    Returns:
        Its batch size, or its batch sampler's; None if it has none.
    """
    if not isinstance(data, DataLoader):
        return None
    size = data.batch_size if data.batch_size is not None else getattr(data.batch_sampler, "batch_size", None)
    return size if isinstance(size, int) else None


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
    """Inputs and targets of a batch, all of one length."""
    inputs, targets = _split(batch)
    values = list(inputs.values()) if isinstance(inputs, Mapping) else [inputs]
    for value in [*values, targets]:
        if not isinstance(value, Tensor):
            raise TypeError(f"data: expected tensors, or mappings of them as inputs, got {type(value).__name__}")
        if value.is_complex() or value.dtype in _UNSUPPORTED:
            raise TypeError(f"data: expected real numbers or signed integers, got {value.dtype}")
    for value in [*values, targets]:
        if value.ndim == 0 or targets.ndim == 0 or len(value) != len(targets):
            raise ValueError(
                f"data: expected inputs and targets of one length, got shapes {tuple(value.shape)} and "
                f"{tuple(targets.shape)}"
            )
    return inputs, targets


def _split(batch: Any) -> tuple[Any, Any]:
    """Inputs and targets of a pair, or of a mapping with its labels inside, as transformers have it."""
    if isinstance(batch, Mapping):
        found = [name for name in _LABELS if name in batch]
        if len(found) != 1 or len(batch) < 2:
            raise TypeError(
                f"data: expected a mapping of inputs with one of {', '.join(_LABELS)} among them, got the keys "
                f"{', '.join(map(str, batch))}"
            )
        return {name: value for name, value in batch.items() if name != found[0]}, batch[found[0]]
    if not isinstance(batch, Sequence) or len(batch) != 2:
        raise TypeError(
            f"data: expected batches (inputs, targets), or mappings with their labels, got {type(batch).__name__}"
            + (f" of {len(batch)}" if isinstance(batch, Sequence) else "")
        )
    return batch[0], batch[1]


def sharing(distributed: bool) -> Ranks:
    """The ranks that share the work.

    Args:
        distributed: Whether any are to.

    Returns:
        Those of the default process group, or this process alone.

    Raises:
        ValueError: If there is no process group.
    """
    if not distributed:
        return ALONE
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("distributed: expected an initialised process group (torchrun, init_process_group), got none")
    return current()
