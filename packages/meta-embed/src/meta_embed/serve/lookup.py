"""Vectors for requests: the store's, or the cold start for members whom it does not know."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from meta_embed.model.personalizer import Personalizer
from meta_embed.store.base import Store
from meta_embed.store.codec import Key
from meta_embed.store.version import check_version
from meta_embed.tasks.encode import Array


@dataclass(frozen=True)
class Found:
    """Vectors of a request.

    Attributes:
        vectors: Shape (B, d), float32.
        known: Whether the store has the member, shape (B,).
        stale: Whether its vector is older than the limit, shape (B,).
        counts: Events that each vector is made of, 0 for a cold start, shape (B,).
        precisions: As stored, shape (B, floats); zeros for a cold start.
    """

    vectors: Array
    known: Array
    stale: Array
    counts: Array
    precisions: Array


class Lookup:
    """Vectors by key.

    Args:
        store: The store.
        version: Version of the global block that will score; None to read vectors only.
        allow_stale: Whether vectors of another version are accepted.
        ttl: Age, against the store's newest event, beyond which a vector counts as stale; seconds.

    Raises:
        ValueError: If versions differ.
    """

    def __init__(
        self, store: Store, version: str | None = None, *, allow_stale: bool = False, ttl: float = float("inf")
    ) -> None:
        if version is not None:
            check_version(store.info, version, store.where, allow_stale=allow_stale)
        self.store, self.ttl = store, ttl
        self.cold = np.asarray(store.info.cold or [0.0] * store.info.width, np.float32)

    def __call__(self, keys: Sequence[Key], prior: Array | None = None) -> Found:
        """Vectors of B members.

        Args:
            keys: Entity keys.
            prior: Vector of each member without events, from its features, shape (B, d); None for the store's one cold
                vector.

        Returns:
            One row per key.

        Raises:
            TypeError: If a key is of another kind than the store's.
        """
        hits, records = self.store.get(keys)
        known = np.asarray(hits, bool)
        info = self.store.info
        vectors = np.tile(self.cold, (len(keys), 1)) if prior is None else np.asarray(prior, np.float32).copy()
        vectors[known] = records.vectors
        counts, stale = np.zeros(len(keys), np.int64), np.zeros(len(keys), bool)
        counts[known] = records.counts
        stale[known] = info.as_of - records.times > self.ttl
        precisions = np.zeros((len(keys), info.precision_floats), np.float32)
        precisions[known] = records.precisions
        return Found(vectors, known, stale, counts, precisions)


def score(model: Personalizer, ids: Array, dense: Array, vectors: Array) -> Array:
    """Probabilities of rows.

    Args:
        model: Its global block scores.
        ids: Categories, shape (R, k).
        dense: Numbers, shape (R, p).
        vectors: Vector of each row's member, shape (R, d).

    Returns:
        Shape (R,), float32.
    """
    with torch.no_grad():
        logits = model.logits(torch.from_numpy(ids), torch.from_numpy(dense), torch.from_numpy(vectors))
    out: Any = logits.sigmoid().numpy()
    return np.asarray(out)
