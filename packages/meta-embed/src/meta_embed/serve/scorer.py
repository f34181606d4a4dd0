"""Scores over HTTP: the store's vectors and the global block, on the house's shared service.

`POST /score` takes rows with the entity and the row's features, and gives `score`, `known` and `stale`; features of the
member, where they are sent, are its cold start. The option `explore` scores with one posterior draw per member
(Thompson sampling; the store needs precisions), `seed` makes it repeatable. `POST /vectors` takes entities and gives
vectors.
"""

import logging
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from core_tensor.app import serving
from core_tensor.app.serving.bodies import RefusalError

from meta_embed.adapt.map_head import thompson
from meta_embed.generate.vectors import unpack_precisions
from meta_embed.model.build import load_model
from meta_embed.serve.lookup import Found, Lookup, score
from meta_embed.store.address import open_store
from meta_embed.tasks import encode
from meta_embed.tasks.encode import Array, Vocabulary
from meta_embed.tasks.schema import Feature

if TYPE_CHECKING:
    from fastapi import FastAPI

_LOGGER = logging.getLogger(__name__)
_RETRY = 1.0
"""Seconds until a store that was refused is tried again."""


class Scorer:
    """A run's global block and a store's vectors.

    Args:
        run: Run folder.
        store: Address of the store.
        ttl: Age beyond which a vector is reported as stale, seconds.
        allow_stale: Whether vectors of another model version are scored.

    Raises:
        ValueError: If the store's vectors are of another version.
    """

    def __init__(self, run: str, store: str, ttl: float = float("inf"), allow_stale: bool = False) -> None:
        self.model, self.config, self.vocabulary, self.version = load_model(run)
        self.address, self.ttl, self.allow_stale = store, ttl, allow_stale
        self.lock, self.retry_at = threading.Lock(), 0.0
        self.lookup = self._open()
        self.refused: str | None = None
        columns = self.config.columns
        key = pa.int64() if self.lookup.store.info.key == "int" else pa.string()
        member = [(f.name, _arrow_type(f, self.vocabulary)) for f in columns.member]
        row = [(f.name, _arrow_type(f, self.vocabulary)) for f in columns.row]
        given = [(f.name, _arrow_type(f, self.vocabulary)) for f in columns.dense_row if f not in columns.row]
        self.schema = pa.schema([(columns.entity, key), *given, *row, *member])
        self.key_schema = pa.schema([(columns.entity, key), *member])

    def _open(self) -> Lookup:
        store = open_store(self.address)
        try:
            if store.info.width != self.model.width:
                raise ValueError(f"{store.where}: holds vectors of width {store.info.width}, not {self.model.width}")
            return Lookup(store, self.version, allow_stale=self.allow_stale, ttl=self.ttl)
        except ValueError:
            store.close()
            raise

    def current(self) -> Lookup:
        """The lookup; a store that was generated anew meanwhile is opened, if its version fits."""
        with self.lock:
            if time.monotonic() >= self.retry_at:
                try:
                    if self.lookup.store.replaced():
                        self.lookup = self._open()
                    self.refused = None
                except (OSError, ValueError) as error:  # the old vectors still serve; do not try at every request
                    self.refused, self.retry_at = str(error), time.monotonic() + _RETRY
                    _LOGGER.warning("%s", error)
            return self.lookup

    def _find(self, rows: pa.Table) -> Found:
        columns = self.config.columns
        names = rows[columns.entity]
        if names.null_count:
            raise ValueError(f"rows: column {columns.entity}: expected a key in every row")
        prior = self._prior(rows) if columns.member else None
        lookup, keys = self.current(), names.to_pylist()
        lookup.store.keys_of(keys)  # a key that cannot be one is the client's fault
        try:
            return lookup(keys, prior)
        except (OSError, ValueError) as error:
            raise RefusalError(503, f"store: {error}") from error

    def _prior(self, rows: pa.Table) -> Array:
        """Cold starts from the members' features; a number that was not sent counts as the mean."""
        columns = self.config.columns
        filled = fill_absent(rows, columns.member)
        ids, dense = (
            encode.encode_ids(filled, columns.member, self.vocabulary),
            encode.encode_dense(filled, columns.member),
        )
        with torch.no_grad():
            found: Array = self.model.prior(torch.from_numpy(ids), torch.from_numpy(dense)).numpy()
        return found

    def score(self, rows: pa.Table, options: dict[str, Any]) -> dict[str, Any]:
        """Scores of rows.

        Args:
            rows: Columns of `schema`.
            options: `explore` and `seed`.

        Returns:
            `score`, `known`, `stale`, one entry per row.

        Raises:
            ValueError: If an option is unknown, a feature is missing, or precisions are asked of a store without.
        """
        unknown = set(options) - {"explore", "seed"}
        if unknown:
            raise ValueError(f"options: expected explore and seed, got {', '.join(sorted(unknown))}")
        columns = self.config.columns
        ids = encode.encode_ids(rows, columns.row, self.vocabulary)
        dense = encode.encode_dense(rows, columns.dense_row)
        found = self._find(rows)
        vectors = found.vectors
        if options.get("explore"):
            vectors = self._explore(rows, found, options.get("seed"))
        return {"score": score(self.model, ids, dense, vectors), "known": found.known, "stale": found.stale}

    def _explore(self, rows: pa.Table, found: Found, seed: Any) -> Array:
        """One draw per member of the request from its posterior; of an unknown one, from the prior."""
        if found.precisions.shape[1] == 0:
            raise ValueError("options: explore needs a store generated with --precision diagonal or full")
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
            raise ValueError(f"options: seed: expected an integer, got {seed!r}")
        keys = rows[self.config.columns.entity].to_pylist()
        first = {key: i for i, key in reversed(list(enumerate(keys)))}
        own = np.asarray([first[key] for key in keys])
        H = unpack_precisions(found.precisions, found.vectors.shape[1])
        head = getattr(self.model, "head", None)
        if head is not None:
            H[~torch.from_numpy(found.known)] = head.precision.detach()
        generator = torch.Generator()
        generator.seed() if seed is None else generator.manual_seed(seed)
        drawn: Array = thompson(torch.from_numpy(found.vectors), H, generator).numpy()[own]
        return drawn

    def vectors(self, rows: pa.Table, options: dict[str, Any]) -> dict[str, Any]:
        """Vectors of members.

        Args:
            rows: Columns of `key_schema`.
            options: None are known.

        Returns:
            `vector`, `known`, `stale`, `events`, one entry per row.

        Raises:
            ValueError: If an option is given.
        """
        if options:
            raise ValueError(f"options: expected none, got {', '.join(sorted(options))}")
        found = self._find(rows)
        return {
            "vector": found.vectors.tolist(), "known": found.known, "stale": found.stale, "events": found.counts,
        }  # fmt: skip

    def information(self) -> dict[str, Any]:
        """What `/health` says of the model and the store."""
        info = self.lookup.store.info
        return {
            "version": self.version, "store_version": info.version, "as_of": info.as_of, "refused_store": self.refused,
        }  # fmt: skip


def _arrow_type(feature: Feature, vocabulary: Vocabulary) -> pa.DataType:
    """What a client sends for a feature: the vocabulary's kind for categories, numbers or lists of them."""
    if feature.kind == "dense":
        return pa.float32() if feature.width == 1 else pa.list_(pa.float32())
    values = vocabulary.get(feature.name) or [""]
    return pa.int64() if all(isinstance(v, int) for v in values) else pa.string()


def fill_absent(rows: pa.Table, features: tuple[Feature, ...]) -> pa.Table:
    """Means where a dense feature was not sent.

    Args:
        rows: Rows of a request.
        features: Features.

    Returns:
        The columns of the features.
    """
    columns = {}
    for feature in features:
        column = rows[feature.name]
        if feature.kind == "dense" and column.null_count:
            mean = list(feature.mean or [0.0] * feature.width)
            usual = mean[0] if feature.width == 1 else mean
            column = pa.array([usual if v is None else v for v in column.to_pylist()], column.type)
        columns[feature.name] = column
    return pa.table(columns)


def build(run: str, store: str, ttl: float, allow_stale: bool, limits: serving.Limits) -> "FastAPI":
    """The service of one worker, for `serving.serve`.

    Args:
        run: Run folder.
        store: Address of the store.
        ttl: See `Scorer`.
        allow_stale: See `Scorer`.
        limits: What is accepted.

    Returns:
        The application.
    """
    torch.set_num_threads(1)
    scorer = Scorer(run, store, ttl, allow_stale)
    endpoints = [
        serving.Endpoint("/score", scorer.score, scorer.schema, "Probabilities of rows for their members"),
        serving.Endpoint("/vectors", scorer.vectors, scorer.key_schema, "Vectors of members"),
    ]
    return serving.application("meta-embed", endpoints, limits=limits, information=scorer.information)
