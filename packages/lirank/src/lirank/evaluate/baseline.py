"""What a team would try first: logistic regression and LightGBM on the same rows, ids and causal features."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from core_tensor.app.extras import require

from lirank.data.batch import Batch, Encoder
from lirank.data.parquet import ParquetLog
from lirank.schema.layout import Layout

EXTRA = "lirank[baseline]"
TREES = (
    {"num_leaves": 31, "learning_rate": 0.05, "min_data_in_leaf": 20},
    {"num_leaves": 63, "learning_rate": 0.05, "min_data_in_leaf": 50},
    {"num_leaves": 15, "learning_rate": 0.05, "min_data_in_leaf": 50, "cat_smooth": 50, "cat_l2": 20},
    {"num_leaves": 31, "learning_rate": 0.03, "min_data_in_leaf": 100, "cat_smooth": 100, "feature_fraction": 0.7},
)
"""Settings of LightGBM; validation logloss chooses one, and the number of trees of each."""


@dataclass(frozen=True)
class Rows:
    """Rows of a log in memory.

    Attributes:
        batch: The rows.
        label: The label, shape (n,).
        weight: Row weights, shape (n,), or None.
    """

    batch: Batch
    label: np.ndarray
    weight: np.ndarray | None


def load_rows(encoder: Encoder, log: ParquetLog, label: int = 0, most: int = 5_000_000) -> Rows:
    """Read rows into memory, those with the label.

    Args:
        encoder: What turns the log into batches.
        log: Rows with causal columns.
        label: Number of the label.
        most: Rows kept, the first ones.

    Returns:
        The rows.
    """
    table = next(log.read(rows=most))
    batch = encoder.encode(table)
    assert batch.labels is not None
    known = ~batch.labels[:, label].isnan()
    batch = batch.take(known.nonzero()[:, 0])
    assert batch.labels is not None
    weight = None if batch.weight is None else batch.weight.numpy()
    return Rows(batch, batch.labels[:, label].numpy().astype(np.float64), weight)


def logistic_regression(layout: Layout, train: Rows, valid: Rows | None, test: Rows, seed: int = 0) -> np.ndarray:
    """One-hot ids and standardized numbers; the penalty is chosen by validation logloss.

    Args:
        layout: Positions that follow from the schema.
        train: Training rows.
        valid: Rows that choose the penalty; None takes C = 0.1.
        test: Rows to score.
        seed: Seed of the solver.

    Returns:
        Probabilities of the test rows, shape (n,).

    Raises:
        MissingExtraError: If scikit-learn is not installed.
    """
    linear = require("sklearn.linear_model", EXTRA)
    mean, deviation = _moments(train.batch.dense.numpy())
    x = {name: _one_hot(layout, r.batch, mean, deviation) for name, r in (("train", train), ("test", test))}
    penalties = (0.03, 0.1, 0.3, 1.0) if valid is not None else (0.1,)
    fits = []
    for c in penalties:
        model = linear.LogisticRegression(C=c, max_iter=1000, tol=1e-3, solver="lbfgs", random_state=seed)
        model.fit(x["train"], train.label, sample_weight=train.weight)
        loss = 0.0
        if valid is not None:
            loss = _logloss(model.predict_proba(_one_hot(layout, valid.batch, mean, deviation))[:, 1], valid.label)
        fits.append((loss, model))
    best = min(fits, key=lambda fit: fit[0])[1]
    found: np.ndarray = best.predict_proba(x["test"])[:, 1]
    return found


def lightgbm(
    layout: Layout, train: Rows, valid: Rows | None, test: Rows, seed: int = 0, settings: Any = TREES
) -> tuple[np.ndarray, dict[str, Any]]:
    """Gradient-boosted trees with ids as categories, tuned on the validation rows.

    Args:
        layout: Positions that follow from the schema.
        train: Training rows.
        valid: Rows that choose the setting and the number of trees; None takes the first setting with 200 trees.
        test: Rows to score.
        seed: Seed of the trees.
        settings: What is tried.

    Returns:
        Probabilities of the test rows, shape (n,), and the setting that was chosen.

    Raises:
        MissingExtraError: If LightGBM is not installed.
    """
    trees = require("lightgbm", EXTRA)
    x, y = _columns(layout, train.batch), train.label
    categories = list(range(train.batch.ids.shape[1]))
    common = {"objective": "binary", "verbosity": -1, "seed": seed, "deterministic": True, "num_threads": 1}
    best: tuple[float, Any, dict[str, Any]] | None = None
    data = trees.Dataset(x, y, weight=train.weight, categorical_feature=categories, free_raw_data=False)
    for setting in settings if valid is not None else settings[:1]:
        data = trees.Dataset(x, y, weight=train.weight, categorical_feature=categories, free_raw_data=False)
        if valid is None:
            model, loss = trees.train(common | setting, data, 200), 0.0
        else:
            held = trees.Dataset(_columns(layout, valid.batch), valid.label, reference=data)
            stop = trees.early_stopping(50, verbose=False)
            model = trees.train(common | setting, data, 2000, valid_sets=[held], callbacks=[stop])
            loss = float(model.best_score["valid_0"]["binary_logloss"])
        if best is None or loss < best[0]:
            best = (loss, model, setting)
    assert best is not None
    model = best[1]
    return model.predict(_columns(layout, test.batch)), best[2] | {"trees": model.best_iteration or 200}


def _columns(layout: Layout, batch: Batch) -> np.ndarray:
    """Ids as small integers, then numbers, then lengths of lists, shape (n, columns)."""
    first = np.array([start for start, _ in layout.ranges], dtype=np.int64)
    ids = (batch.ids.numpy() - first).astype(np.float64)
    lists = [entry.offsets.diff().numpy().astype(np.float64) for entry in batch.lists.values()]
    return np.column_stack([ids, batch.dense.numpy().astype(np.float64), *lists])


def _moments(dense: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    with np.errstate(invalid="ignore"):
        mean, deviation = np.nanmean(dense, 0) if dense.size else dense.sum(0), np.nanstd(dense, 0)
    return np.nan_to_num(mean), np.where(deviation > 0, deviation, 1.0)


def _one_hot(layout: Layout, batch: Batch, mean: np.ndarray, deviation: np.ndarray) -> Any:
    sparse = require("scipy.sparse", EXTRA)
    n, columns = batch.ids.shape
    ids = sparse.csr_matrix(
        (np.ones(n * columns), batch.ids.numpy().reshape(-1), np.arange(0, n * columns + 1, max(columns, 1))[: n + 1]),
        shape=(n, max(layout.rows, 1)),
    )
    bags = [
        sparse.csr_matrix(
            (np.ones(len(entry.values)), entry.values.numpy(), entry.offsets.numpy()), shape=(n, layout.rows)
        )
        for entry in (batch.lists[f.name] for f in layout.bags)
    ]
    dense = np.nan_to_num((batch.dense.numpy().astype(np.float64) - mean) / deviation)
    return sparse.hstack([ids, *bags, sparse.csr_matrix(dense)], format="csr")


def _logloss(p: np.ndarray, y: np.ndarray) -> float:
    q = np.clip(p, 1e-7, 1 - 1e-7)
    return float(-np.mean(y * np.log(q) + (1 - y) * np.log1p(-q)))
