"""The polytopes C_i: capped boxes with closed forms, and any polytope that has a vertex oracle."""

from polytope_lp.polytopes.base import Polytope
from polytope_lp.polytopes.capped import CappedBox, box, box_cut, knapsack, simplex
from polytope_lp.polytopes.oracle import Assignment, OraclePolytope, Parity, Slate, VertexList, VertexPolytope

__all__ = [
    "Assignment",
    "CappedBox",
    "OraclePolytope",
    "Parity",
    "Polytope",
    "Slate",
    "VertexList",
    "VertexPolytope",
    "box",
    "box_cut",
    "knapsack",
    "simplex",
]
