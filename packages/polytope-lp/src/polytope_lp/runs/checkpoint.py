"""Checkpoints: the whole state of a run as one npz file, so that a killed run continues to the same bits."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from core_tensor.app.files import atomic_path, read_npz, reading
from torch import Tensor

from polytope_lp.matching.continuation import Stage, State
from polytope_lp.matching.evaluation import Evaluation
from polytope_lp.matching.options import Options
from polytope_lp.matching.problem import MatchingProblem
from polytope_lp.matching.search import HISTORY, Incumbent, Search
from polytope_lp.optimizers import accelerated, lbfgs, second_order

_VECTORS = ("point", "gradient", "extrapolated")
_NUMBERS = ("value", "decrement", "momentum", "lipschitz", "damping")


class Saver:
    """Writes a checkpoint every few iterations; callable as the `save` of `continuation.run`.

    Args:
        options: Where and how often.
        search: The run.
        problem: The problem, whose fingerprint guards against resuming another one.
    """

    def __init__(self, options: Options, search: Search, problem: MatchingProblem) -> None:
        self.options, self.search, self.count = options, search, 0
        self.mark = fingerprint(problem) if options.checkpoint else ""

    def __call__(self, stage: Stage) -> None:
        """Count an iteration, and write if it is time.

        Args:
            stage: State of the outer loop.
        """
        self.count += 1
        if self.options.checkpoint and self.count % self.options.checkpoint_every == 0:
            save(rank_path(self.options.checkpoint, self.search), self.search, stage, self.mark)


def fingerprint(problem: MatchingProblem) -> str:
    """A digest of all data of a problem, so that a checkpoint of another one is refused.

    Args:
        problem: The problem or shard.

    Returns:
        Sizes, and a 128-bit digest of every array.
    """
    d, digest = problem.data, hashlib.blake2b(digest_size=16)
    parts = (d.offsets, d.index, d.cost, d.coefficient, d.cap, d.upper, d.weight, problem.budgets, problem.equality)
    for part in parts:
        digest.update(b"-" if part is None else f"{tuple(part.shape)}{part.dtype}".encode())
        if part is not None:
            digest.update(part.contiguous().numpy().reshape(-1).view(np.uint8).data)
    return f"{d.blocks}/{d.variables}/{problem.rows}/{problem.first_block}/{d.equality}/{digest.hexdigest()}"


def rank_path(path: Path, search: Search) -> Path:
    """The file of this rank.

    Args:
        path: What the user gave.
        search: The run.

    Returns:
        The path itself in a run of one process, else with the rank in its name.
    """
    group = getattr(search.dual, "group", None)
    if group is None:
        return Path(path)
    return Path(path).with_suffix(f".{torch.distributed.get_rank(group)}{Path(path).suffix}")


def save(path: Path, search: Search, stage: Stage, mark: str) -> None:
    """Write the state of a run.

    Args:
        path: File to write, npz.
        search: The run.
        stage: State of the outer loop.
        mark: Fingerprint of the problem.
    """
    state = stage.state
    arrays: dict[str, Tensor] = {name: getattr(state, name) for name in _VECTORS if hasattr(state, name)}
    if isinstance(state, lbfgs.LbfgsState) and state.steps:
        arrays["steps"], arrays["changes"] = torch.stack(state.steps), torch.stack(state.changes)
    if search.anchor is not None:
        arrays["anchor"] = search.anchor
    for name in ("price", "margin"):
        if getattr(search, name) is not None:
            arrays[name] = getattr(search, name)
    meta: dict[str, Any] = {
        "mark": mark,
        "kind": type(state).__name__,
        "numbers": {name: repr(getattr(state, name)) for name in _NUMBERS if hasattr(state, name)},
        "stalled": state.stalled,
        "gamma": repr(search.gamma),
        "lower": repr(search.lower),
        "history": search.history,
        "proximal": stage.proximal,
        "iterations": stage.iterations,
        "previous": repr(stage.previous),
        "share": repr(stage.share),
        "reached": repr(stage.reached),
        "at": stage.at,
        "aimed": stage.aimed,
    }
    if search.last is not None:
        _put("last", search.last, arrays, meta)
    for name, point in (("best", search.incumbent), ("residual", search.residual)):
        if point is not None:
            _put(name, point.evaluation, arrays, meta)
            if point.anchor is not None and point.anchor is not search.anchor:
                arrays[f"{name}_anchor"] = point.anchor
        meta[f"{name}_anchored"] = point is not None and point.anchor is not None
    plain: dict[str, Any] = {name: array.numpy() for name, array in arrays.items()}
    plain["meta"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    if getattr(search.dual, "group", None) is not None and path.exists():
        path.replace(_previous(path))  # another rank may die before it has written this generation
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **plain)


def _previous(path: Path) -> Path:
    return path.with_suffix(f".before{path.suffix}")


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    arrays = read_npz(path, "meta")
    with reading(path, "a checkpoint"):
        meta = json.loads(bytes(arrays.pop("meta")))
        if not isinstance(meta["history"], list) or not isinstance(meta["mark"], str):
            raise ValueError("history or mark of another type")
        return meta, {name: torch.from_numpy(array) for name, array in arrays.items()}


def _latest(path: Path, search: Search) -> tuple[Path, dict[str, Any], dict[str, Tensor]] | None:
    # The newest state that every rank has.
    mine = rank_path(path, search)
    group = getattr(search.dual, "group", None)
    files = [file for file in ([mine] if group is None else [mine, _previous(mine)]) if file.exists()]
    found = {len(meta["history"]): (file, meta, arrays) for file in files for meta, arrays in [_read(file)]}
    common = set(found)
    if group is not None:
        every: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(every, list(found), group=group)
        common = set.intersection(*map(set, every))
    return found[max(common)] if common else None


def load(path: Path | None, search: Search, problem: MatchingProblem) -> Stage | None:
    """Take up a run where its checkpoint left it.

    Args:
        path: What the user gave; None or a file that does not exist means a new run.
        search: The new run, which is brought to the old one's state.
        problem: The problem.

    Returns:
        State of the outer loop, or None for a new run.

    Raises:
        ValueError: If the file is no checkpoint, or one of another problem.
    """
    latest = None if path is None else _latest(Path(path), search)
    if latest is None:
        return None
    mine, meta, arrays = latest
    if meta["mark"] != fingerprint(problem):
        raise ValueError(f"checkpoint: {mine} belongs to another problem")
    with reading(mine, "a checkpoint of this problem"):
        _check(arrays, meta, search)
        return _restored(search, meta, arrays)


def _check(arrays: dict[str, Tensor], meta: dict[str, Any], search: Search) -> None:
    rows = search.dual.budgets.shape[0]
    for name, array in arrays.items():
        anchor, pairs = name.endswith("anchor"), name in {"steps", "changes"}
        shape = (arrays["steps"].shape[0], rows) if pairs else (search.dual.own_variables if anchor else rows,)
        if tuple(array.shape) != shape or not array.is_floating_point() or not bool(torch.isfinite(array).all()):
            raise ValueError(f"{name}: expected finite numbers of shape {shape}, got {tuple(array.shape)}")
    entries = [entry for entry in meta["history"] if set(entry) == set(HISTORY)]
    if len(entries) != len(meta["history"]) or not isinstance(meta["stalled"], bool):
        raise ValueError("history or state of another form")
    float(entries[-1]["seconds"] + entries[-1]["fractional"] + meta["iterations"] + meta["at"] + meta["aimed"])


def _restored(search: Search, meta: dict[str, Any], arrays: dict[str, Tensor]) -> Stage:
    numbers = {name: float(text) for name, text in meta["numbers"].items()}
    vectors = {name: arrays[name] for name in _VECTORS if name in arrays}
    state: State
    if meta["kind"] == "LbfgsState":
        steps = tuple(arrays["steps"]) if "steps" in arrays else ()
        changes = tuple(arrays["changes"]) if "changes" in arrays else ()
        state = lbfgs.LbfgsState(**vectors, **numbers, steps=steps, changes=changes, stalled=meta["stalled"])  # type: ignore[arg-type]
    elif meta["kind"] == "NewtonState":
        state = second_order.NewtonState(**vectors, **numbers, stalled=meta["stalled"])  # type: ignore[arg-type]
    else:
        state = accelerated.AcceleratedState(**vectors, **numbers, stalled=meta["stalled"])  # type: ignore[arg-type]
    search.gamma, search.lower = float(meta["gamma"]), float(meta["lower"])
    search.anchor, search.price, search.margin = (arrays.get(name) for name in ("anchor", "price", "margin"))
    search.history = meta["history"]
    search.before = search.history[-1]["seconds"] if search.history else 0.0
    search.last = _get("last", arrays, meta)
    search.incumbent, search.residual = (_point(name, search, arrays, meta) for name in ("best", "residual"))
    return Stage(
        state,
        meta["proximal"],
        meta["iterations"],
        float(meta["previous"]),
        float(meta["share"]),
        float(meta["reached"]),
        meta["at"],
        meta["aimed"],
    )


def _point(name: str, search: Search, arrays: dict[str, Tensor], meta: dict[str, Any]) -> Incumbent | None:
    found = _get(name, arrays, meta)
    if found is None:
        return None
    return Incumbent(found, arrays.get(f"{name}_anchor", search.anchor) if meta[f"{name}_anchored"] else None)


def _put(name: str, found: Evaluation, arrays: dict[str, Tensor], meta: dict[str, Any]) -> None:
    meta[name] = {
        key: repr(getattr(found, key)) for key in ("gamma", "value", "lower", "upper", "cost", "violation", "rounding")
    } | {"fractional": found.fractional, "nonzero": found.nonzero}
    arrays[f"{name}_lam"], arrays[f"{name}_gradient"] = found.lam, found.gradient
    if found.shrink is not None:
        arrays[f"{name}_shrink"] = found.shrink


def _get(name: str, arrays: dict[str, Tensor], meta: dict[str, Any]) -> Evaluation | None:
    if name not in meta:
        return None
    numbers: dict[str, Any] = {
        key: int(value) if key in {"fractional", "nonzero"} else float(value) for key, value in meta[name].items()
    }
    return Evaluation(
        lam=arrays[f"{name}_lam"],
        gradient=arrays[f"{name}_gradient"],
        shrink=arrays.get(f"{name}_shrink"),
        **numbers,
    )
