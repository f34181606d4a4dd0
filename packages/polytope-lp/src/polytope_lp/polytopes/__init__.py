"""The polytopes C_i: capped boxes with closed forms, and any polytope that has a vertex oracle."""

from polytope_lp.polytopes.base import Polytope
from polytope_lp.polytopes.capped import CappedBox, box, box_cut, knapsack, simplex

__all__ = ["CappedBox", "Polytope", "box", "box_cut", "knapsack", "simplex"]
