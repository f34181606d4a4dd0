"""Names of the ways to draw a minibatch; loads no torch, for the command line."""

from typing import Literal, get_args

Scheme = Literal["bernoulli", "with_replacement", "without_replacement"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
