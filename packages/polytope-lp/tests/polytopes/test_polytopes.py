"""Every polytope against its vertices, written out: projections, oracles, and whole LPs against HiGHS."""

import itertools

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from polytope_lp import (
    Assignment,
    OraclePolytope,
    Parity,
    Ranking,
    Slate,
    VertexList,
    box,
    box_cut,
    knapsack,
    linprog_blocks,
    simplex,
)
from polytope_lp.general.verify_blocks import hull_distance
from scipy.optimize import linprog

WEIGHTS = torch.tensor([1.0, 2.0, 0.5, 1.5], dtype=torch.float64)


def _subsets(n):
    return np.array(list(itertools.product([0.0, 1.0], repeat=n)))


def _assignments(filled):
    found = []
    for choice in itertools.product([None, 0, 1, 2], repeat=2):
        if (choice[0] is not None and choice[0] == choice[1]) or (filled and None in choice):
            continue
        vertex = np.zeros((3, 2))
        for slot, item in enumerate(choice):
            if item is not None:
                vertex[item, slot] = 1.0
        found.append(vertex.ravel())
    return np.array(found)


def _paths():
    n, found = 2, []
    for path in itertools.product(range(n), repeat=3):
        vertex = np.zeros(n + 2 * n * n)
        vertex[path[0]] = 1.0
        for place in range(2):
            vertex[n + place * n * n + path[place] * n + path[place + 1]] = 1.0
        found.append(vertex)
    return np.array(found)


def _rankings(filled):
    full = np.array(list(itertools.permutations([1.0, 0.6, 0.3, 0.0])))
    return full if filled else np.unique((full[:, None, :] * _subsets(4)[None]).reshape(-1, 4), axis=0)


def _capped(cap, upper, weight, equality):
    # Vertices of {0 <= x <= u, w'x <= d}: every entry at a bound, or all but one and the cut tight.
    found = []
    for bound in _subsets(4):
        x = bound * upper
        if (abs(weight @ x - cap) <= 1e-12) if equality else (weight @ x <= cap + 1e-12):
            found.append(x)
        for free in range(4):
            y = x.copy()
            y[free] = (cap - (weight @ x - weight[free] * x[free])) / weight[free]
            if -1e-12 <= y[free] <= upper + 1e-12:
                found.append(y)
    return np.array(found)


ONES = np.ones(4)
LISTED = np.random.default_rng(0).normal(size=(7, 4))
POLYTOPES = {
    "box": (box(0.7), 0.7 * _subsets(4)),
    "simplex": (simplex(1.5), 1.5 * np.vstack([np.zeros(4), np.eye(4)])),
    "simplex_eq": (simplex(1.5, equality=True), 1.5 * np.eye(4)),
    "box_cut": (box_cut(1.7, 0.8), _capped(1.7, 0.8, ONES, False)),
    "box_cut_eq": (box_cut(1.7, 0.8, equality=True), _capped(1.7, 0.8, ONES, True)),
    "knapsack": (knapsack(2.2, WEIGHTS, 0.8), _capped(2.2, 0.8, WEIGHTS.numpy(), False)),
    "knapsack_eq": (knapsack(2.2, WEIGHTS, 0.8, equality=True), _capped(2.2, 0.8, WEIGHTS.numpy(), True)),
    "parity": (Parity(), _subsets(4)[_subsets(4).sum(1) % 2 == 0]),
    "parity_odd": (Parity(odd=True), _subsets(4)[_subsets(4).sum(1) % 2 == 1]),
    "ranking": (Ranking([1.0, 0.6, 0.3]), _rankings(filled=False)),
    "ranking_eq": (Ranking([1.0, 0.6, 0.3], filled=True), _rankings(filled=True)),
    "assignment": (Assignment(2, filled=False), _assignments(filled=False)),
    "assignment_eq": (Assignment(2), _assignments(filled=True)),
    "slate": (Slate(2, 3), _paths()),
    "vertices": (VertexList(LISTED), LISTED),
    "oracle": (OraclePolytope(lambda d: LISTED[(LISTED @ d).argmax()]), LISTED),
}
kinds = st.sampled_from(sorted(POLYTOPES))


def _repeated(kind, blocks):
    # Weights are by variable: as many copies as there are blocks.
    polytope = POLYTOPES[kind][0]
    if not kind.startswith("knapsack"):
        return polytope
    return knapsack(2.2, WEIGHTS.repeat(blocks), 0.8, equality=kind.endswith("eq"))


@settings(max_examples=160, deadline=None)
@given(kinds, st.integers(0, 10**6), st.sampled_from([0.1, 1.0, 30.0, 1e4]), st.booleans())
@example("knapsack_eq", 1734, 1e4, False)  # its cut was met to 1e-16 of the point, not of the cut
def test_projections_meet_the_kkt_conditions_over_all_vertices(kind, seed, scale, whole):
    polytope, vertices = POLYTOPES[kind]
    y = np.random.default_rng(seed).normal(size=vertices.shape[1]) * scale
    y = np.round(y) if whole else y
    x = polytope.fresh().project(torch.from_numpy(y), torch.tensor([0, y.size])).numpy()
    # ||x - x*||^2 is at most the greatest (v - x)'(y - x): no vertex may lie further along y - x than x itself.
    assert ((vertices - x) @ (y - x)).max() <= 1e-12 * max(1.0, np.abs(y).max())
    assert hull_distance(lambda d: vertices[(vertices @ d).argmax()], x) <= 1e-9


@settings(max_examples=100, deadline=None)
@given(kinds, st.integers(0, 10**6))
def test_minimizers_and_limits_are_those_of_the_vertices(kind, seed):
    polytope, vertices = POLYTOPES[kind]
    offsets = torch.tensor([0, vertices.shape[1]])
    cost = np.random.default_rng(seed).normal(size=vertices.shape[1])
    best = polytope.minimizer(torch.from_numpy(cost), offsets).numpy()
    assert best @ cost == pytest.approx((vertices @ cost).min())
    assert np.abs(vertices - best).max(1).min() <= 1e-12
    assert (np.abs(vertices).max(0) <= polytope.limits(offsets).numpy() + 1e-12).all()


@settings(max_examples=60, deadline=None)
@given(kinds, st.integers(0, 10**6), st.sampled_from([0.3, 3.0]))
def test_faces_are_the_derivatives_of_projections(kind, seed, scale):
    polytope, vertices = POLYTOPES[kind]
    polytope, n = polytope.fresh(), vertices.shape[1]
    offsets, random = torch.tensor([0, n]), np.random.default_rng(seed)
    y, d = torch.from_numpy(random.normal(size=n) * scale), torch.from_numpy(random.normal(size=n))
    x = polytope.project(y, offsets)
    face, t = polytope.face(y, x, offsets), 1e-7
    product = np.where(face.free, d.numpy(), 0.0)
    for columns, sign in ((face.cuts, -1.0), (face.spans, 1.0)):
        if columns is not None:
            product = product + sign * (columns @ (columns.T @ d.numpy()))
    forward, backward = polytope.project(y + t * d, offsets), polytope.project(y - t * d, offsets)
    kink = (forward - 2 * x + backward).abs().max() > 1e-10  # the two sides differ: there is no derivative here
    if not kink:
        assert np.allclose((forward - backward).numpy() / (2 * t), product, atol=1e-6)


RANDOM_LPS = (
    kinds,
    st.integers(0, 10**6),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["inside", "near", "anywhere"]),
)


@settings(max_examples=80, deadline=None)
@given(*RANDOM_LPS)
def test_lps_agree_with_highs_degenerate_and_infeasible_included(kind, seed, whole, equations, where):
    _compare_with_highs(kind, seed, whole, equations, where)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(*RANDOM_LPS)
def test_many_more_lps_agree_with_highs(kind, seed, whole, equations, where):
    _compare_with_highs(kind, seed, whole, equations, where)


def _compare_with_highs(kind, seed, whole, equations, where):
    vertices, random = POLYTOPES[kind][1], np.random.default_rng(seed)
    blocks, m, k = int(random.integers(1, 5)), int(random.integers(1, 4)), vertices.shape[1]
    draw = (
        (lambda *size: random.integers(-2, 3, size).astype(float))
        if whole
        else (lambda *size: random.normal(size=size))
    )
    A, c = draw(m, blocks * k), draw(blocks * k)
    inner = np.concatenate([vertices.T @ random.dirichlet(np.ones(len(vertices))) for _ in range(blocks)])
    b = {"inside": A @ inner, "near": A @ inner + 0.5 * random.normal(size=m), "anywhere": 2 * draw(m)}[where]
    hull = scipy.sparse.block_diag([vertices.T] * blocks).tocsr()  # x = hull @ weights, weights summing to one
    one = scipy.sparse.block_diag([np.ones((1, len(vertices)))] * blocks).tocsr()
    if equations:
        rows = {"A_eq": scipy.sparse.vstack([A @ hull, one]), "b_eq": np.append(b, np.ones(blocks))}
    else:
        rows = {"A_ub": A @ hull, "b_ub": b, "A_eq": one, "b_eq": np.ones(blocks)}
    truth = linprog(hull.T @ c, **rows, method="highs")
    side = {"A_eq": A, "b_eq": b} if equations else {"A_ub": A, "b_ub": b}
    ours = linprog_blocks(c, **side, blocks=[(_repeated(kind, blocks), [k] * blocks)])
    if truth.status == 0:
        assert ours.success, ours.message
        assert ours.fun == pytest.approx(truth.fun, rel=1e-6, abs=1e-6)
        assert ours.lower_bound <= truth.fun + 1e-7 * max(1.0, abs(truth.fun))
        assert ours.upper_bound >= truth.fun - 1e-7 * max(1.0, abs(truth.fun))
    else:
        assert ours.status == 2, ours.message
        assert ours.ray is not None


@pytest.mark.parametrize("kind", ["simplex", "simplex_eq", "box_cut", "parity", "ranking", "assignment"])
def test_an_oracle_alone_equals_the_polytopes_own_projection(kind):
    own, vertices = POLYTOPES[kind]
    oracle = OraclePolytope(lambda d: vertices[(vertices @ d).argmax()])
    offsets, random = torch.tensor([0, 1, 2]) * vertices.shape[1], np.random.default_rng(0)
    for scale in (0.1, 1.0, 10.0, 1e3):
        y = torch.from_numpy(random.normal(size=2 * vertices.shape[1]) * scale)
        assert torch.allclose(oracle.project(y, offsets), own.project(y, offsets), atol=1e-9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ranking([0.5, 1.0]), "discounts: expected falling"),
        (lambda: Ranking([1.0, -0.1]), "discounts: "),
        (lambda: Ranking([1.0, 0.5], filled=True).check(torch.tensor([0, 1])), "block 0 has fewer items than the 2"),
        (lambda: Parity(odd=True).check(torch.tensor([0, 0])), "block 0 is empty"),
        (lambda: Assignment(2).check(torch.tensor([0, 2])), "at least 2 items"),
        (lambda: Slate(2, 3).check(torch.tensor([0, 3])), "blocks: expected length 10, got 3"),
        (lambda: VertexList([1.0, 2.0]), "vertices: "),
        (lambda: VertexList([[0, 0], [1, 0]]).check(torch.tensor([0, 3])), "blocks: expected length 2, got 3"),
        (lambda: OraclePolytope(lambda _: np.zeros(3)).check(torch.tensor([0, 2])), r"returned \(3,\)"),
        (lambda: simplex(float("inf")).check(torch.tensor([0, 2])), "compact"),
        (lambda: knapsack(1.0, torch.tensor([1.0, -1.0])).check(torch.tensor([0, 2])), "weight: "),
        (lambda: box_cut(3.0, 1.0, equality=True).check(torch.tensor([0, 2])), "must sum to 3.0"),
    ],
)
def test_bad_polytopes_name_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()
