"""OR-tools PDLP on a matching problem, and the repaired gap of any primal: what both sides are compared by."""

import math
import time
from dataclasses import dataclass

import numpy as np
import scipy.sparse
from numpy.typing import NDArray
from polytope_lp import MatchingProblem


@dataclass(frozen=True)
class Run:
    """One run of PDLP: its primal, CPU seconds, and the tolerance it was given."""

    x: NDArray[np.float64]
    seconds: float
    tol: float


def solve(problem: MatchingProblem, tol: float) -> Run:
    """Solve the LP in full form, budget rows and one row per source, with one thread.

    Args:
        problem: Simplex blocks with one row per variable.
        tol: Relative tolerance of all of PDLP's optimality criteria; absolute ones are zero.

    Returns:
        The run.
    """
    from ortools.pdlp import solvers_pb2
    from ortools.pdlp.python import pdlp

    d = problem.data
    n = d.variables
    a = np.ones(n) if d.coefficient is None else d.coefficient.double().numpy()
    block = np.repeat(np.arange(d.blocks), np.diff(d.offsets.numpy()))
    rows = np.stack([d.index.numpy(), block + problem.rows], 1).ravel()
    entries = np.stack([a, np.ones(n)], 1).ravel()
    shape = (problem.rows + d.blocks, n)
    program = pdlp.QuadraticProgram()
    program.objective_vector = d.cost.double().numpy()
    program.constraint_matrix = scipy.sparse.csc_matrix((entries, rows, np.arange(0, 2 * n + 1, 2)), shape=shape)
    program.constraint_lower_bounds = np.full(shape[0], -np.inf)
    program.constraint_upper_bounds = np.concatenate(
        [problem.budgets.numpy(), np.broadcast_to(d.cap.numpy(), (d.blocks,))]
    )
    program.variable_lower_bounds = np.zeros(n)
    program.variable_upper_bounds = np.full(n, np.inf)
    parameters = solvers_pb2.PrimalDualHybridGradientParams()
    criteria = parameters.termination_criteria
    criteria.simple_optimality_criteria.eps_optimal_relative = tol
    criteria.simple_optimality_criteria.eps_optimal_absolute = 0.0
    parameters.num_threads = 1
    start = time.process_time()
    result = pdlp.primal_dual_hybrid_gradient(program, parameters)
    return Run(np.asarray(result.primal_solution), time.process_time() - start, tol)


def repaired_gap(problem: MatchingProblem, x: NDArray[np.float64], lower: float) -> float:
    """Gap of a primal once sources and budgets are kept exactly, by shrinking.

    Args:
        problem: The problem.
        x: Any primal, shape (variables,).
        lower: The best lower bound known.

    Returns:
        (cost after repair - lower) / max(1, |lower|).
    """
    d = problem.data
    block = np.repeat(np.arange(d.blocks), np.diff(d.offsets.numpy()))
    x = np.maximum(x, 0.0)
    used = np.bincount(block, x, d.blocks)
    cap = np.broadcast_to(d.cap.numpy(), (d.blocks,))
    x = x * np.minimum(1.0, cap / np.maximum(used, 1e-300))[block]
    a = np.ones(x.size) if d.coefficient is None else d.coefficient.double().numpy()
    load = np.bincount(d.index.numpy(), a * x, problem.rows)
    x = x * np.minimum(1.0, problem.budgets.numpy() / np.maximum(load, 1e-300))[d.index.numpy()]
    return (float(d.cost.double().numpy() @ x) - lower) / max(1.0, abs(lower)) if x.size else math.nan
