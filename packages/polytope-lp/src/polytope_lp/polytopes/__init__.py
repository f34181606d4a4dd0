"""The polytopes C_i: closed forms for capped boxes, parity and rankings, and any polytope that has a vertex oracle."""

from polytope_lp.polytopes.base import Face, Polytope
from polytope_lp.polytopes.capped import CappedBox, box, box_cut, knapsack, simplex
from polytope_lp.polytopes.oracle import OraclePolytope, VertexList, VertexPolytope
from polytope_lp.polytopes.parity import Parity
from polytope_lp.polytopes.ranking import Ranking
from polytope_lp.polytopes.slots import Assignment, Slate

__all__ = [
    "Assignment",
    "CappedBox",
    "Face",
    "OraclePolytope",
    "Parity",
    "Polytope",
    "Ranking",
    "Slate",
    "VertexList",
    "VertexPolytope",
    "box",
    "box_cut",
    "knapsack",
    "simplex",
]
