"""How a minibatch is drawn, and the two numbers through which the scheme enters every formula of this package.

With G = (1/B) sum_{i in S} H_i the minibatch Hessian and H its mean, every scheme gives

    E[G M G] = a H M H + s (1/n) sum_i H_i M H_i      for symmetric M,

    scheme                a            s
    bernoulli             1            1/B - 1/n      each sample independently with probability B/n (the paper's)
    with_replacement      1 - 1/B      1/B            B independent draws
    without_replacement   1 - p        p              B distinct draws, p = (n - B) / (B (n - 1))

The usual coefficient of sum_i H_i M H_i is c = s/n; written with the mean, a and s hold unchanged when the H_i are
known on a subsample only, with n the size of the whole data set.
"""

from dataclasses import dataclass

import torch
from core_tensor.checks import check_choice, check_number
from torch import Tensor

from sgd_stability.theory.schemes import SCHEMES, Scheme

__all__ = ["SCHEMES", "Sampling", "Scheme", "powers_of_two"]


def powers_of_two(n: int) -> list[int]:
    """Batch sizes worth a look: 1, 2, 4, ... up to n, and n itself.

    Args:
        n: Largest value.

    Returns:
        The values.
    """
    values = [2**i for i in range(n.bit_length()) if 2**i <= n]
    return values if values[-1] == n else [*values, n]


@dataclass(frozen=True)
class Sampling:
    """A minibatch scheme at a data-set size and batch size.

    Attributes:
        n: Number of training samples.
        batch_size: B, from 1 to n.
        scheme: `"bernoulli"`, `"with_replacement"` or `"without_replacement"`.
    """

    n: int
    batch_size: int
    scheme: Scheme = "without_replacement"

    def __post_init__(self) -> None:
        check_number("n", self.n, low=1, integer=True)
        check_choice("sampling", self.scheme, SCHEMES)
        check_number("batch_size", self.batch_size, low=1, high=self.n, integer=True)

    @property
    def a(self) -> float:
        """Coefficient of H M H in E[G M G]."""
        return 1.0 if self.scheme == "bernoulli" else 1.0 - self.s

    @property
    def s(self) -> float:
        """Coefficient of the mean of H_i M H_i in E[G M G]; zero exactly when the step has no noise."""
        n, B = self.n, self.batch_size
        if self.scheme == "with_replacement":
            return 1.0 / B
        return (n - B) / (B * n) if self.scheme == "bernoulli" else (n - B) / (B * max(n - 1, 1))

    @property
    def r(self) -> float:
        """The paper's n/B - 1."""
        return self.n / self.batch_size - 1.0

    def draw(self, paths: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw one minibatch per path.

        Args:
            paths: Number of independent minibatches.
            generator: CPU generator.

        Returns:
            Weights w with G = sum_i w_i H_i (each draw of a sample weighs 1/B), float64, shape (paths, n).
        """
        n, B = self.n, self.batch_size
        if self.scheme == "bernoulli":
            return (torch.rand(paths, n, generator=generator, dtype=torch.float64) < B / n).double() / B
        if self.scheme == "with_replacement":
            drawn = torch.randint(n, (paths, B), generator=generator)
        else:
            drawn = torch.rand(paths, n, generator=generator).argsort(1)[:, :B]
        weights = torch.zeros(paths, n, dtype=torch.float64)
        return weights.scatter_add_(1, drawn, torch.full((paths, B), 1.0 / B, dtype=torch.float64))
