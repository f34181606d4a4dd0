"""`Policy`: the allocation rule that prices give, for sources that were not in the problem. Needs numpy only."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from core_tensor.files import atomic_path, read_json, write_json
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from polytope_lp.solution import Solution

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Policy:
    r"""Scores one source at request time: $x = \mathrm{Proj}_C((v - a \lambda) / \gamma)$.

    Attributes:
        lam: Prices by destination, shape (rows,), float64.
        gamma: Weight of the ridge; smaller gives sharper choices.
        cap: Right-hand side d of the source's polytope; infinite for none.
        upper: Upper bound of every amount, or None.
        equality: Whether the amounts must sum to the cap.
        keys: What the user calls the destinations, shape (rows,), or None for 0, 1, 2, ...
    """

    lam: Array
    gamma: float
    cap: float = 1.0
    upper: float | None = None
    equality: bool = False
    keys: NDArray[Any] | None = None

    @classmethod
    def from_solution(cls, solution: "Solution") -> "Policy":
        """The policy of a solution; per-source caps are given at scoring time instead.

        Args:
            solution: The solution.

        Returns:
            The policy.
        """
        data, keys = solution.problem.data, solution.problem.destination_keys
        upper = None
        if data.upper is not None:
            upper = float(data.upper[0]) if data.upper.numel() == 1 else float(data.upper.max())
        return cls(
            solution.primal_lam.numpy(),
            solution.gamma,
            float(data.cap[0]) if data.cap.numel() == 1 else float(data.cap.max()),
            upper,
            data.equality,
            None if keys is None else np.asarray(keys.to_numpy(zero_copy_only=False)),
        )

    def score(
        self, values: ArrayLike, costs: ArrayLike | None, destinations: ArrayLike, cap: float | None = None
    ) -> Array:
        """Allocate one source over its candidates.

        Args:
            values: Value of each candidate, shape (candidates,).
            costs: What each takes from its destination's budget, shape (candidates,); None for one.
            destinations: Row of each candidate (see `rows` for keys), shape (candidates,), integer.
            cap: The source's own cap; the policy's if None.

        Returns:
            Amounts, shape (candidates,), float64.
        """
        price = self.lam[np.asarray(destinations)]
        reduced = (price if costs is None else price * np.asarray(costs)) - np.asarray(values)
        limit = self.cap if cap is None else cap
        return project(reduced, self.gamma, limit, self.upper, self.equality)

    def rows(self, keys: ArrayLike) -> NDArray[np.int64]:
        """Rows of destination keys.

        Args:
            keys: Destination keys, shape (candidates,).

        Returns:
            Rows, shape (candidates,), int64.

        Raises:
            ValueError: If a key is unknown.
        """
        asked = np.asarray(keys)
        if self.keys is None:
            return asked.astype(np.int64)
        order = np.argsort(self.keys)
        at = order[np.minimum(np.searchsorted(self.keys, asked, sorter=order), order.size - 1)]
        if not (self.keys[at] == asked).all():
            raise ValueError(f"keys: {asked[self.keys[at] != asked][0]!r} is no destination of this policy")
        return at

    def save(self, path: str | Path) -> None:
        """Write the policy as npz, or as JSON if the path ends in `.json`.

        Args:
            path: File to write.

        Raises:
            ValueError: If the suffix is neither.
        """
        rest = {"gamma": self.gamma, "cap": self.cap if np.isfinite(self.cap) else None}
        rest |= {"upper": self.upper, "equality": self.equality}
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
            ValueError: If the file is none.
        """
        try:
            if Path(path).suffix == ".json":
                content = read_json(path)
                lam, keys, rest = np.array(content["lam"]), content["keys"], content
            else:
                with np.load(path, allow_pickle=False) as file:
                    lam, rest = file["lam"], json.loads(bytes(file["meta"]))
                    keys = file["keys"] if "keys" in file.files else None
            cap = np.inf if rest["cap"] is None else rest["cap"]
            return cls(
                lam, rest["gamma"], cap, rest["upper"], rest["equality"], None if keys is None else np.asarray(keys)
            )
        except (KeyError, OSError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a policy file ({error})") from error


def project(reduced: Array, gamma: float, cap: float, upper: float | None, equality: bool) -> Array:
    r"""$\arg\min_{x \in C} r'x + \gamma/2 \lVert x \rVert^2$ of one block, by sorting the breakpoints of its cut.

    Args:
        reduced: Reduced costs r, shape (n,), float64.
        gamma: Weight of the ridge.
        cap: Right-hand side d of the cut; infinite for none.
        upper: Upper bound of every entry, or None.
        equality: Whether the entries must sum to d.

    Returns:
        The minimiser, shape (n,), float64.
    """
    v = -reduced
    u = cap if upper is None else min(upper, cap)
    x = np.clip(v / gamma, 0.0, u)
    if not np.isfinite(cap) or v.size == 0 or (not equality and x.sum() <= cap):
        return np.asarray(x)
    breaks = np.unique(np.concatenate([v, v - gamma * u]))  # theta at which an entry leaves 0 or reaches u
    low, high = 0, breaks.size - 1
    while high - low > 1:  # the sum falls from one breakpoint to the next: bisect to the piece that holds d
        middle = (low + high) // 2
        if np.clip((v - breaks[middle]) / gamma, 0.0, u).sum() > cap:
            low = middle
        else:
            high = middle
    theta = 0.5 * (breaks[low] + breaks[high])
    at_upper, free = v - theta >= gamma * u, (v > theta) & (v - theta < gamma * u)
    if free.any():
        theta = v[free].mean() - gamma * (cap - u * at_upper.sum()) / free.sum()
    return np.asarray(np.clip((v - theta) / gamma, 0.0, u))
