"""How long lookups take: the time from keys to decoded vectors, batch by batch."""

import time
from collections.abc import Sequence

import numpy as np

from meta_embed.serve.lookup import Lookup
from meta_embed.store.base import Store
from meta_embed.store.codec import Key


def lookup_latency(store: Store, keys: Sequence[Key], batch: int, rounds: int = 500, seed: int = 0) -> dict[str, float]:
    """Milliseconds of a lookup of random members.

    Args:
        store: The store.
        keys: Keys to draw from.
        batch: Keys per lookup.
        rounds: Lookups.
        seed: Seed.

    Returns:
        `p50_ms`, `p99_ms`.
    """
    rng, lookup = np.random.default_rng(seed), Lookup(store)
    asked = [[keys[i] for i in rng.integers(0, len(keys), batch)] for _ in range(rounds + 20)]
    times = []
    for part in asked:
        start = time.perf_counter()
        lookup(part)
        times.append(1000 * (time.perf_counter() - start))
    p50, p99 = np.percentile(times[20:], [50, 99])
    return {"p50_ms": float(p50), "p99_ms": float(p99)}
