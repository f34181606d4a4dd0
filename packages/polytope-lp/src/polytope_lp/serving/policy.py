r"""`Policy`: the allocation rule that prices give, for sources that were not in the problem.

Scoring needs numpy only: this file imports nothing else when it is loaded, so that it can be copied beside an exported
policy into a service that has neither torch nor this package (`polytope-lp export-policy --scorer` does so).
"""

import json
import math
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from polytope_lp.matching.solution import Solution

Array = NDArray[np.float64]
_BROKEN = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, EOFError, RecursionError),
    *(MemoryError, NotImplementedError, SyntaxError, struct.error, zipfile.BadZipFile, zlib.error),
)
"""What parsing a broken or foreign file can raise."""


@dataclass(frozen=True, eq=False)
class Policy:
    r"""Scores one source at request time: $x = \mathrm{Proj}_C((v - \sum_k a_k \lambda_k) / \gamma)$.

    Attributes:
        lam: Prices by row, shape (rows,), float64: those of the first budget of all destinations, then of the second.
        gamma: Weight of the ridge; smaller gives sharper choices.
        cap: Right-hand side d of the source's polytope; infinite for none.
        upper: Upper bound of every amount, or None.
        equality: Whether the amounts must sum to the cap.
        keys: What the user calls the destinations, shape (destinations,), or None for 0, 1, 2, ...
        resources: Number of budgets of every destination.
        needs: Arguments ("cap", "upper", "weights") that `score` must be given, because they differ by source or edge.
    """

    lam: Array
    gamma: float
    cap: float = 1.0
    upper: float | None = None
    equality: bool = False
    keys: NDArray[Any] | None = None
    resources: int = 1
    needs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what no allocation can be made from."""
        lam, names = self.lam, ("cap", "upper", "weights")
        if lam.ndim != 1 or lam.dtype != np.float64 or not np.isfinite(lam).all():
            raise ValueError(f"lam: expected finite float64 prices in one row, got {lam.dtype} of shape {lam.shape}")
        if not 0.0 < self.gamma < math.inf:
            raise ValueError(f"gamma: expected a finite number above 0, got {self.gamma}")
        if not self.cap >= 0.0 or not (self.upper is None or self.upper >= 0.0):
            raise ValueError(f"cap, upper: expected numbers of at least 0, got {self.cap} and {self.upper}")
        if self.cap == math.inf and self.upper in {None, math.inf} and not {"cap", "upper"} & set(self.needs):
            raise ValueError("cap: expected a finite number where there is no upper bound")
        if self.resources < 1 or lam.size % self.resources:
            raise ValueError(f"resources: expected a divisor of the {lam.size} prices, got {self.resources}")
        if not set(self.needs) <= set(names):
            raise ValueError(f"needs: expected some of {', '.join(names)}, got {self.needs}")
        if self.keys is not None:
            if self.keys.shape != (lam.size // self.resources,) or self.keys.dtype.kind not in "iuU":
                raise ValueError(f"keys: expected {lam.size // self.resources} integers or texts")
            if np.unique(self.keys).size != self.keys.size:
                raise ValueError("keys: expected each destination once")

    @classmethod
    def from_solution(cls, solution: "Solution", gamma: float | None = None) -> "Policy":
        """The policy of a solution.

        Args:
            solution: The solution.
            gamma: Weight of the ridge. If None the solution's own; after the proximal loop, whose center unseen sources
                do not have, the one of a few smaller ones with the best repaired value on the problem itself.

        Returns:
            The policy.
        """
        data = solution.problem.data
        if gamma is None:
            gamma = solution.policy_ridge()
        fixed = data.upper is None or data.upper.numel() == 1
        several = {
            "cap": data.cap.numel() > 1 and bool((data.cap != data.cap[0]).any()),
            "upper": not fixed,
            "weights": data.weight is not None,
        }
        return cls(
            (solution.problem.row_sign * solution.policy_lam).numpy(),
            gamma,
            float(data.cap[0]) if data.cap.numel() else math.inf,
            float(data.upper[0]) if fixed and data.upper is not None else None,
            data.equality,
            solution.destination_keys(),
            max(1, len(solution.problem.resources)),
            tuple(name for name, needed in several.items() if needed),
        )

    def score(
        self,
        values: ArrayLike,
        costs: ArrayLike | None,
        destinations: ArrayLike,
        cap: float | None = None,
        upper: ArrayLike | None = None,
        weights: ArrayLike | None = None,
    ) -> Array:
        """Allocate one source over its candidates.

        Args:
            values: Value of each candidate, shape (candidates,).
            costs: What each takes from its destination's budget, shape (candidates,), or (candidates, k) for k budgets
                of a destination or k destinations of an edge; None for one.
            destinations: Number of each candidate's destination (see `rows` for keys), shape (candidates,) or
                (candidates, k), integer.
            cap: The source's own cap; the policy's if None.
            upper: Upper bounds of the amounts, shape (candidates,); the policy's if None.
            weights: Weights of the amounts in the cap, shape (candidates,); ones if None.

        Returns:
            Amounts, shape (candidates,), float64.

        Raises:
            ValueError: If an argument is missing that differs by source or edge, a destination is unknown, or a value
                or a cost is no finite number.
        """
        for name in self.needs:
            if {"cap": cap, "upper": upper, "weights": weights}[name] is None:
                raise ValueError(f"{name}: differs by source or edge in this problem, so expected it here")
        row, known = np.asarray(destinations), self.lam.size // self.resources
        # the ends by their places: numpy finds a place in a fifth of the time that it takes to reduce to a value
        if row.size and not 0 <= row.item(row.argmin()) <= row.item(row.argmax()) < known:
            raise ValueError(f"destinations: expected numbers below {known}")
        if self.resources > 1:
            row = row[:, None] + np.arange(self.resources) * known
        price = self.lam[row] if costs is None else self.lam[row] * np.asarray(costs)
        reduced = (price if price.ndim == 1 else price.sum(1)) - np.asarray(values)
        limit, bound = self.cap if cap is None else cap, self.upper if upper is None else upper
        return project(reduced, self.gamma, limit, bound, self.equality, weights)

    def score_sources(
        self,
        offsets: ArrayLike,
        values: ArrayLike,
        costs: ArrayLike | None,
        destinations: ArrayLike,
        caps: ArrayLike | None = None,
    ) -> Array:
        """Allocate many sources, one after the other.

        Args:
            offsets: Bounds of the sources' candidates, shape (sources + 1,).
            values: Values, shape (candidates,).
            costs: As in `score`, for all candidates.
            destinations: As in `score`, for all candidates.
            caps: Caps of the sources, shape (sources,); the policy's if None.

        Returns:
            Amounts, shape (candidates,), float64.
        """
        at, v, row = np.asarray(offsets), np.asarray(values), np.asarray(destinations)
        a = None if costs is None else np.asarray(costs)
        x = np.zeros(v.shape[0])
        for i in range(at.size - 1):
            mine = slice(at[i], at[i + 1])
            cap = None if caps is None else float(np.asarray(caps)[i])
            x[mine] = self.score(v[mine], None if a is None else a[mine], row[mine], cap)
        return x

    def rows(self, keys: ArrayLike) -> NDArray[np.int64]:
        """Numbers of destination keys.

        Args:
            keys: Destination keys, shape (candidates,).

        Returns:
            Numbers, shape (candidates,), int64.

        Raises:
            ValueError: If a key is unknown.
        """
        asked = np.asarray(keys)
        if self.keys is None:
            return asked.astype(np.int64)
        order = np.argsort(self.keys)
        at = order[np.minimum(np.searchsorted(self.keys, asked, sorter=order), order.size - 1)]
        if not (self.keys[at] == asked).all():
            raise ValueError(f"keys: {asked[self.keys[at] != asked].tolist()[0]!r} is no destination of this policy")
        return at

    def save(self, path: str | Path) -> None:
        """Write the policy as npz, or as JSON if the path ends in `.json`.

        Args:
            path: File to write.

        Raises:
            ValueError: If the suffix is neither.
        """
        from core_tensor.app.files import atomic_path, write_json

        cap = self.cap if math.isfinite(self.cap) else None
        rest: dict[str, Any] = {"gamma": self.gamma, "cap": cap, "upper": self.upper, "equality": self.equality}
        rest |= {"resources": self.resources, "needs": list(self.needs)}
        if Path(path).suffix == ".json":
            keys = None if self.keys is None else self.keys.tolist()
            write_json(path, {"lam": self.lam.tolist(), "keys": keys, **rest})
            return
        if Path(path).suffix != ".npz":
            raise ValueError(f"path: expected .npz or .json, got {path}")
        meta = np.frombuffer(json.dumps(rest).encode(), np.uint8)
        arrays = {"lam": self.lam, "meta": meta}
        if self.keys is not None:
            arrays["keys"] = self.keys if self.keys.dtype != object else self.keys.astype(str)
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | Path) -> "Policy":
        """Read a policy.

        Args:
            path: File that `save` wrote.

        Returns:
            The policy.

        Raises:
            ValueError: If the file is not a policy.
            FileNotFoundError: If it does not exist.
        """
        try:
            if Path(path).suffix == ".json":
                rest = json.loads(Path(path).read_text(encoding="utf-8"))
                lam, keys = np.array(rest["lam"], dtype=np.float64), rest["keys"]
            else:
                with Path(path).open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                    lam, rest = file["lam"], json.loads(bytes(file["meta"]))
                    keys = file["keys"] if "keys" in file.files else None
            if not isinstance(rest["equality"], bool) or not isinstance(rest["resources"], int):
                raise ValueError("equality or resources of another type")
            return cls(
                lam,
                float(rest["gamma"]),
                math.inf if rest["cap"] is None else float(rest["cap"]),
                None if rest["upper"] is None else float(rest["upper"]),
                rest["equality"],
                None if keys is None else np.asarray(keys),
                rest["resources"],
                tuple(rest["needs"]),
            )
        except FileNotFoundError:
            raise
        except _BROKEN as error:
            raise ValueError(f"{path}: not a policy file ({type(error).__name__}: {error})") from error


def project(
    reduced: Array,
    gamma: float,
    cap: float,
    upper: ArrayLike | None = None,
    equality: bool = False,
    weights: ArrayLike | None = None,
) -> Array:
    r"""$\arg\min_{x \in C} r'x + \gamma/2 \lVert x \rVert^2$ of one block, $C = \{0 \le x \le u, w'x \le d\}$.

    $x = \mathrm{clip}((-r - \theta w) / \gamma, 0, u)$; the multiplier $\theta$ of the cut is found among the sorted
    breakpoints at which an entry leaves 0 or reaches u, by a halving search and one exact step.

    Args:
        reduced: Reduced costs r, shape (n,), float64.
        gamma: Weight of the ridge.
        cap: Right-hand side d of the cut; infinite for none.
        upper: Upper bounds, one or shape (n,), or None.
        equality: Whether w'x must be d.
        weights: Positive weights w, shape (n,); ones if None.

    Returns:
        The minimizer, shape (n,), float64.

    Raises:
        ValueError: If the cap is negative or NaN, or the least reduced cost is no finite number.
    """
    if not cap >= 0.0:
        raise ValueError(f"cap: expected a number of at least 0, got {cap}")
    if not reduced.size:
        return np.zeros(0)
    least = reduced.item(reduced.argmin())  # NaN if there is one
    if not math.isfinite(least):
        raise ValueError(f"values, costs: expected finite numbers, got a reduced cost of {least}")
    # Amounts that sum to the cap are below it, so bounds that are not are no bounds.
    if weights is None and cap < math.inf and (upper is None or np.min(upper) >= cap):
        return _project_simplex(reduced, least, gamma, cap, equality)
    w = np.ones(reduced.size) if weights is None else np.asarray(weights, dtype=np.float64)
    u = np.minimum(np.inf if upper is None else np.asarray(upper, dtype=np.float64), cap / w)
    return _project(-reduced, gamma, cap, u, equality, w)


def _project_simplex(reduced: Array, least: float, gamma: float, cap: float, equality: bool) -> Array:
    # Without bounds and weights x = max(y - theta, 0) with y = (least - r) / gamma <= 0. The best entry, y = 0, is at
    # most the cap, so theta >= -cap and only entries above that can be positive: mostly one or two of many, for which
    # Michelot's method (drop what falls below the theta of those that are left) on Python floats takes less time than
    # one numpy call. Differences from the best keep their digits whatever the size of r / gamma.
    x = np.zeros(reduced.size)
    if least >= 0.0 and not equality:
        return x
    at = (reduced <= least + gamma * cap).nonzero()[0]
    if at.size == 1:
        x[at] = cap if equality else min(cap, -least / gamma)
        return x
    y = [(least - r) / gamma for r in reduced[at].tolist()]
    above, count = y, 0
    while len(above) != count:
        count = len(above)
        theta = (sum(above) - cap) / count
        above = [e for e in above if e >= theta]
    if not equality:
        theta = max(theta, least / gamma)  # where the multiplier of the cut is zero
    x[at] = [max(e - theta, 0.0) for e in y]
    return x


def _project(v: Array, gamma: float, cap: float, u: Array, equality: bool, w: Array) -> Array:
    x = np.clip(v / gamma, 0.0, u)
    if not math.isfinite(cap) or v.size == 0 or (not equality and w @ x <= cap):
        return np.asarray(x)
    breaks = np.unique(np.concatenate([v / w, (v - gamma * u) / w]))
    low, high = 0, breaks.size - 1
    while high - low > 1:  # the sum falls from one breakpoint to the next
        middle = (low + high) // 2
        if w @ np.clip((v - breaks[middle] * w) / gamma, 0.0, u) > cap:
            low = middle
        else:
            high = middle
    theta = 0.5 * (breaks[low] + breaks[high])
    at_upper, free = v - theta * w >= gamma * u, (v > theta * w) & (v - theta * w < gamma * u)
    if free.any():
        left = cap - w[at_upper] @ u[at_upper]
        theta = (w[free] @ v[free] - gamma * left) / (w[free] @ w[free])
    return np.asarray(np.clip((v - theta * w) / gamma, 0.0, u))
