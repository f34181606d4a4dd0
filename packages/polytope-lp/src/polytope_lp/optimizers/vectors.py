"""Inner products whose last bit depends on nothing but their arguments."""

import math

import numpy as np
from torch import Tensor


def dot(a: Tensor, b: Tensor) -> float:
    """Inner product, summed pairwise: BLAS's order depends on threads, and on where in memory the arguments lie.

    Args:
        a: Shape (n,), float64.
        b: Shape (n,), float64.

    Returns:
        The sum of products.
    """
    return float(np.add.reduce((a * b).numpy()))


def norm(a: Tensor) -> float:
    """Euclidean norm, with `dot`'s order of summation.

    Args:
        a: Shape (n,), float64.

    Returns:
        The norm.
    """
    return math.sqrt(dot(a, a))
