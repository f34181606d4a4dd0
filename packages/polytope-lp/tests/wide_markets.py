"""Random small markets with everything that real data has at its edges, and an exact judge of what a solution claims.

Used by the tests with a few fixed seeds and by the benchmark's campaign with thousands.
"""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import torch
from polytope_lp import CappedBox, MatchingProblem

ROUNDING = Fraction(1, 10**12)
"""What float64 sums of a few terms may be off by."""


def wide_market(seed, *, equations=False):
    """A small market with zeros, ties, huge caps and bounds, big-M values, tiny values and budgets of zero."""
    random = np.random.default_rng(seed)
    sources, rows = int(random.integers(1, 9)), int(random.integers(1, 6))
    lengths = random.integers(1, rows + 1, sources)
    index = np.concatenate([np.sort(random.permutation(rows)[:n]) for n in lengths])
    n, dtype = index.size, np.dtype(random.choice(["float32", "float64"]))
    value = _numbers(random, n)
    if random.random() < 0.3:
        value[random.random(n) < 0.2] *= -1.0
    if random.random() < 0.2:
        value[random.random(n) < 0.2] = -(10.0 ** float(random.integers(6, 16)))
    cost = _numbers(random, n)
    load = np.bincount(index, cost, rows)
    cost = cost.astype(dtype)
    budgets = load * random.choice([0.05, 0.3, 1.5], rows)
    budgets[random.random(rows) < 0.1] = 0.0
    budgets[random.random(rows) < 0.1] = 10.0 ** float(random.integers(3, 13))
    equal = np.zeros(rows, dtype=bool)
    if random.random() < 0.25:  # a second row per edge
        index = np.stack([index, index + rows], 1)
        cost = np.stack([cost, np.where(random.random(n) < 0.2, 0.0, 1.0)], 1)
        budgets = np.concatenate([budgets, random.integers(0, 4, rows).astype(float)])
        equal = np.zeros(2 * rows, dtype=bool)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    shape = _polytope(random, sources, n, dtype)
    if equations:
        inner = shape.project(torch.from_numpy(random.normal(size=n)), torch.from_numpy(offsets)).numpy()
        rows_of = index.reshape(n, -1)
        a = cost.reshape(n, -1)
        equal = random.random(budgets.size) < 0.4
        exact = np.bincount(rows_of.ravel(), (a * inner[:, None]).ravel().astype(float), budgets.size)
        budgets = np.where(equal, exact, np.maximum(budgets, exact))
    return MatchingProblem.from_arrays(
        offsets, index, value.astype(dtype), cost, budgets, shape, equality=equal, allow_unused=True
    )


def _numbers(random, n):
    kind = random.choice(["whole", "uniform", "wide", "tiny", "ones"])
    if kind == "whole":
        return random.integers(0, 3, n).astype(float)
    if kind == "uniform":
        return random.random(n)
    if kind == "wide":
        return 10.0 ** random.uniform(-8, 8, n)
    if kind == "tiny":
        return 1e-9 * random.random(n)
    return np.ones(n)


def _polytope(random, sources, n, dtype):
    kind = random.choice(["simplex", "box", "box_cut", "knapsack"])
    high = float(10.0 ** random.choice([0, 0, 0, 3, 6, 12, 18]))
    cap = torch.from_numpy(high * (0.2 + random.random(sources)))
    if kind == "simplex":
        return CappedBox(cap)
    if kind == "box":
        return CappedBox(float("inf"), high)
    if kind == "box_cut":
        return CappedBox(cap, torch.from_numpy(high * random.random(n)))
    return CappedBox(cap, high, torch.from_numpy((0.1 + random.random(n)).astype(dtype)))


def _fractions(values):
    return [Fraction(v) for v in values.tolist()]


def _least(problem, lam):
    """The lower bound at given prices, in exact arithmetic, with what the rows imply for single edges."""
    d, b = problem.data, _fractions(problem.budgets)
    rows, a, c, w, upper, caps = _exact(problem)
    total = -sum(p * q for p, q in zip(lam, b, strict=True))
    for i, (low, high) in enumerate(pairwise(d.offsets.tolist())):
        items = []
        for e in range(low, high):
            bounds = [upper[e], None if caps[i] is None else caps[i] / w[e]]
            bounds += [b[j] / v for j, v in zip(rows[e], a[e], strict=True) if v > 0]
            r = c[e] + sum(v * lam[j] for j, v in zip(rows[e], a[e], strict=True))
            items.append((r / w[e], w[e] * min(bound for bound in bounds if bound is not None)))
        left = caps[i]
        for ratio, room in sorted(items):
            take = room if left is None else min(room, left)
            total += min(ratio, 0) * take
            left = left if left is None or ratio >= 0 else left - take
    return total


def _exact(problem):
    """Rows, coefficients, costs, weights, upper bounds and caps as fractions; None for no bound."""
    d, n = problem.data, problem.data.variables
    a = torch.ones(d.index.shape) if d.coefficient is None else d.coefficient
    a = [[Fraction(v) for v in entry] for entry in a.reshape(n, -1).tolist()]
    w = [Fraction(1)] * n if d.weight is None else _fractions(d.weight)
    upper = [None] * n if d.upper is None else [_finite(v) for v in d.upper.expand(n).tolist()]
    caps = [_finite(v) for v in d.cap.expand(d.blocks).tolist()]
    return d.index.reshape(n, -1).tolist(), a, _fractions(d.cost), w, upper, caps


def _finite(value):
    return None if np.isinf(value) else Fraction(value)


def false_claims(problem, solution):
    """What a solution claims and exact rational arithmetic denies: one line each."""
    d, b, lines = problem.data, _fractions(problem.budgets), []
    x, lam = _fractions(solution.x()), _fractions(solution.lam)
    rows, a, c, w, _, caps = _exact(problem)
    load = [Fraction(0)] * len(b)
    for e in range(d.variables):
        for j, v in zip(rows[e], a[e], strict=True):
            load[j] += v * x[e]
    for i, (low, high) in enumerate(pairwise(d.offsets.tolist())):
        used = sum(w[e] * x[e] for e in range(low, high))
        if caps[i] is not None and used > caps[i] * (1 + ROUNDING):
            lines.append(f"block {i} uses {float(used)} of {float(caps[i])}")
    value, lower = sum(p * q for p, q in zip(c, x, strict=True)), _least(problem, lam)
    if any(p < 0 for p, q in zip(lam, problem.equality.tolist(), strict=True) if not q):
        lines.append("a price is negative")
    if Fraction(solution.lower_bound) > lower:
        lines.append(f"lower bound {solution.lower_bound!r} is above {float(lower)!r}")
    if np.isfinite(solution.upper_bound):
        lines += [f"row {j} is exceeded" for j, (p, q) in enumerate(zip(load, b, strict=True)) if p > q]
        if abs(Fraction(solution.upper_bound) - value) > ROUNDING * abs(value):
            lines.append(f"upper bound {solution.upper_bound!r} is not {float(value)!r}")
    if solution.status == "optimal" and value - lower > Fraction(solution.tol) * abs(lower) * (1 + ROUNDING):
        lines.append("the gap is above tol")
    return lines
