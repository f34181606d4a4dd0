"""Web-scale matching LPs: dual decomposition and projection onto any polytope."""

from polytope_lp.block_lp import BlockLP
from polytope_lp.block_solution import BlockSolution, linprog_blocks
from polytope_lp.columns import Columns
from polytope_lp.generate import Marketplace, generate
from polytope_lp.options import Options
from polytope_lp.packed import open_packed, pack
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
from polytope_lp.problem import MatchingProblem
from polytope_lp.ridge import ridge_allocation
from polytope_lp.rounding import Rounded
from polytope_lp.serving import Policy
from polytope_lp.solution import Solution
from polytope_lp.solve import solve
from polytope_lp.tables import from_arrow, read_problem

__all__ = [
    "Assignment",
    "BlockLP",
    "BlockSolution",
    "CappedBox",
    "Columns",
    "Marketplace",
    "MatchingProblem",
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
    "read_problem",
    "ridge_allocation",
    "simplex",
    "solve",
]
