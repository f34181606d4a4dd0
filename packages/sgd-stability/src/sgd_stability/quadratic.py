"""Synthetic families of per-sample Hessians; the code is `sgd_stability.theory.quadratic`."""

from sgd_stability.theory import quadratic
from sgd_stability.theory.quadratic import (
    Growth,
    grouped_hessians,
    make_hessians,
    minibatch_product,
    random_hessians,
    second_moment_matrix,
    simulate,
)

__all__ = [
    "Growth",
    "grouped_hessians",
    "make_hessians",
    "minibatch_product",
    "quadratic",
    "random_hessians",
    "second_moment_matrix",
    "simulate",
]
