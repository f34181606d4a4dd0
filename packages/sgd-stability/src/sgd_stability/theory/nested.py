"""Large families, solved on nested subspaces that double until the answer no longer moves.

An application of the second-moment operator costs r^3; the top of its spectrum lives on few directions. So the family
is compressed to the top eigenvectors of H and of the most curved H_i, 64 directions, then 128, and so on up to all of
them. Every compression errs to one side (thresholds from above), and ever less.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from sgd_stability.theory.bounds import rayleigh_vectors
from sgd_stability.theory.family import CurvatureFamily
from sgd_stability.theory.second_moment import Extreme

_FIRST = 64


class Nested:
    """A family and its compressions, made when they are first needed.

    Args:
        family: The per-sample Hessians; indefinite ones are never compressed.
        tolerance: Relative change between two levels at which the finer one is taken.
    """

    def __init__(self, family: CurvatureFamily, tolerance: float = 1e-4) -> None:
        self.family, self.tolerance = family, tolerance
        self._levels: dict[int, CurvatureFamily] = {}
        self.finest = self._level(_FIRST)
        """The largest level that an answer has needed so far."""

    def solve(self, problem: Callable[[CurvatureFamily], Extreme]) -> Extreme:
        """Solve a problem on ever larger subspaces.

        Args:
            problem: From a family to a number, monotone in the subspace.

        Returns:
            The number of the first level that confirms the one before, or of the whole family.
        """
        size, found = _FIRST, None
        while self.family.signs is None and size < len(self.family.h):
            finer = problem(self._level(size))
            if found is not None and abs(finer.value - found.value) <= self.tolerance * abs(finer.value):
                self._used(self._level(size))
                return finer
            found, size = finer, 2 * size
        self._used(self.family)
        return problem(self.family)

    def _used(self, level: CurvatureFamily) -> None:
        if len(level.h) > len(self.finest.h):
            self.finest = level

    def _level(self, size: int) -> CurvatureFamily:
        if size not in self._levels:
            self._levels[size] = compress(self.family, size)
        return self._levels[size]


def compress(family: CurvatureFamily, size: int) -> CurvatureFamily:
    """Keep the top eigenvectors of H and of the most curved H_i, half of the directions each.

    Args:
        family: The per-sample Hessians.
        size: Most directions.

    Returns:
        The compressed family, whose thresholds are certified upper bounds; the family itself if it is no larger, or if
        it is indefinite: a direction left out might be the one that pushes outwards.
    """
    if size >= len(family.h) or family.signs is not None:
        return family
    V, _ = torch.linalg.qr(rayleigh_vectors(family, size // 2))
    compressed = CurvatureFamily.from_factors(family.factors @ V)
    return replace(compressed, sample_curvature=family.sample_curvature, truncated=True)
