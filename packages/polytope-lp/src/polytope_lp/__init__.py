"""Web-scale matching LPs: dual decomposition and projection onto any polytope."""

from typing import TYPE_CHECKING

from core_tensor.app.exports import lazy

if TYPE_CHECKING:
    from polytope_lp.general.block_lp import BlockLP
    from polytope_lp.general.block_solution import BlockSolution, linprog_blocks
    from polytope_lp.general.mps import MpsModel, read_mps
    from polytope_lp.general.ridge import ridge_allocation
    from polytope_lp.many import solve_many
    from polytope_lp.matching.generate import Marketplace, generate
    from polytope_lp.matching.options import Options
    from polytope_lp.matching.problem import MatchingProblem
    from polytope_lp.matching.solution import Solution
    from polytope_lp.polytopes import (
        Assignment,
        CappedBox,
        OraclePolytope,
        Parity,
        Polytope,
        Ranking,
        Slate,
        VertexList,
        box,
        box_cut,
        knapsack,
        simplex,
    )
    from polytope_lp.serving.policy import Policy
    from polytope_lp.serving.rounding import Rounded
    from polytope_lp.solve import solve
    from polytope_lp.tables.columns import Columns
    from polytope_lp.tables.pack import pack
    from polytope_lp.tables.packed import open_packed
    from polytope_lp.tables.tables import from_arrow, read_problem

__all__ = [
    "Assignment",
    "BlockLP",
    "BlockSolution",
    "CappedBox",
    "Columns",
    "Marketplace",
    "MatchingProblem",
    "MpsModel",
    "Options",
    "OraclePolytope",
    "Parity",
    "Policy",
    "Polytope",
    "Ranking",
    "Rounded",
    "Slate",
    "Solution",
    "VertexList",
    "box",
    "box_cut",
    "from_arrow",
    "generate",
    "knapsack",
    "linprog_blocks",
    "open_packed",
    "pack",
    "read_mps",
    "read_problem",
    "ridge_allocation",
    "simplex",
    "solve",
    "solve_many",
]

__getattr__, __dir__, _ = lazy(__name__)
