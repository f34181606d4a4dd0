"""Shared by the tests: random problems and HiGHS as the oracle."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch
from polytope_lp import MatchingProblem
from scipy.optimize import linprog


def _random_problem(seed, polytope, sources=8, rows=5, rows_per_edge=1, slack=0.5):
    random = np.random.default_rng(seed)
    lengths = random.integers(1, rows + 1, sources)
    index = np.concatenate([np.sort(random.permutation(rows)[:n]) for n in lengths])
    used = np.unique(index)
    index = np.searchsorted(used, index)
    n, m = index.size, used.size
    value, cost = random.random(n), random.random(n) + 0.05
    budgets = slack * random.random(m) * np.bincount(index, cost, m) + 0.01
    if rows_per_edge == 2:
        index, cost = np.stack([index, index + m], 1), np.stack([cost, np.ones(n)], 1)
        budgets = np.concatenate([budgets, 0.2 + random.random(m)])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return MatchingProblem.from_arrays(offsets, index, value, cost, budgets, polytope(random, lengths))


def _oracle(problem):
    """Optimum by HiGHS: budget rows, then one row per block with a finite cap."""
    d = problem.data
    n, k = d.variables, d.index.reshape(d.variables, -1).shape[1]
    columns = np.repeat(np.arange(n), k)
    a = np.ones((n, k)) if d.coefficient is None else d.coefficient.double().numpy().reshape(n, k)
    A = scipy.sparse.csr_array((a.ravel(), (d.index.numpy().ravel(), columns)), shape=(problem.rows, n))
    block = np.repeat(np.arange(d.blocks), np.diff(d.offsets.numpy()))
    w = np.ones(n) if d.weight is None else d.weight.double().numpy()
    B = scipy.sparse.csr_array((w, (block, np.arange(n))), shape=(d.blocks, n))
    cap = np.broadcast_to(d.cap.numpy(), (d.blocks,))
    upper = np.inf if d.upper is None else d.upper.double().numpy()
    bounds = np.stack([np.zeros(n), np.broadcast_to(upper, (n,))], 1)
    equal = problem.equality.numpy()
    b = problem.budgets.numpy()
    ub, eq, b_ub, b_eq = [A[~equal]], [A[equal]], [b[~equal]], [b[equal]]
    if np.isfinite(cap).all():
        (eq if d.equality else ub).append(B)
        (b_eq if d.equality else b_ub).append(cap)
    return linprog(
        d.cost.double().numpy(),
        scipy.sparse.vstack(ub),
        np.concatenate(b_ub),
        scipy.sparse.vstack(eq) if sum(e.shape[0] for e in eq) else None,
        np.concatenate(b_eq) if sum(e.shape[0] for e in eq) else None,
        bounds,
        method="highs",
    )


@pytest.fixture(scope="session")
def random_problem():
    return _random_problem


@pytest.fixture(scope="session")
def oracle():
    return _oracle


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _module(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def wide_markets():
    """The module of random markets, which the benchmark's campaign uses, too."""
    return _module("wide_markets")


@pytest.fixture(scope="session")
def read_netlib():
    """The reader of shared Netlib LPs, which the campaign and `reproduce/real_data.py` use, too."""
    return _module("netlib_files").read_netlib
