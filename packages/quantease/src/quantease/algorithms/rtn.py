"""Round to nearest: every weight becomes the nearest point of its grid."""

from torch import Tensor

from quantease.problem.grid import Grid


def rtn(weight: Tensor, grid: Grid) -> Tensor:
    """Codes of the nearest grid points; for a diagonal Gram matrix this is the optimum.

    Args:
        weight: W, shape (q, p).
        grid: Scales and zero points.

    Returns:
        Codes, shape (q, p), uint8.
    """
    return grid.quantize(weight)
