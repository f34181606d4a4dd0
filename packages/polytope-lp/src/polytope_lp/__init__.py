"""Web-scale matching LPs: dual decomposition and projection onto any polytope."""

from polytope_lp.generate import Marketplace, generate
from polytope_lp.options import Options
from polytope_lp.polytopes import CappedBox, Polytope, box, box_cut, knapsack, simplex
from polytope_lp.problem import MatchingProblem
from polytope_lp.serving import Policy
from polytope_lp.solution import Solution
from polytope_lp.solve import solve
from polytope_lp.tables import Columns, from_arrow, read_problem

__all__ = [
    "CappedBox",
    "Columns",
    "Marketplace",
    "MatchingProblem",
    "Options",
    "Policy",
    "Polytope",
    "Solution",
    "box",
    "box_cut",
    "from_arrow",
    "generate",
    "knapsack",
    "read_problem",
    "simplex",
    "solve",
]
