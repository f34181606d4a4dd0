"""What a user may ask of the solver."""

from dataclasses import dataclass
from pathlib import Path

from core_tensor.checks import check_choice, check_number

from polytope_lp.matching.choices import METHODS

SMALLEST_TOL = 1e-11
"""Sums of millions of float64 terms carry errors of about this relative size; no certificate can claim less."""


@dataclass(frozen=True)
class Options:
    """Options of `solve`.

    Attributes:
        tol: Relative gap between the certified bounds at which the solver stops.
        time_limit: Seconds after which the best point so far is returned; None for no limit.
        evaluations: Evaluations of the dual after which the best point so far is returned.
        method: Optimizer of each smoothed problem: `lbfgs`, `accelerated`, `newton` (proximal, dense in the rows), or
            `auto`: `newton` for small problems and where `lbfgs` makes no progress, else `lbfgs`.
        gamma: Fixed weight of the ridge; None adapts it to `tol`.
        proximal: Whether the proximal outer loop is used; None lets the policy decide.
        memory: Pairs that L-BFGS keeps.
        checkpoint: File to which the state is written; an existing one of the same problem is resumed.
        checkpoint_every: Iterations between checkpoints.
    """

    tol: float = 1e-4
    time_limit: float | None = None
    evaluations: int = 10_000
    method: str = "auto"
    gamma: float | None = None
    proximal: bool | None = None
    memory: int = 20
    checkpoint: Path | None = None
    checkpoint_every: int = 20

    def __post_init__(self) -> None:
        check_number("tol", self.tol, low=0.0, high=1.0, open_low=True, open_high=True)
        if self.tol < SMALLEST_TOL:
            raise ValueError(f"tol: float64 sums cannot certify a relative gap below {SMALLEST_TOL}, got {self.tol}")
        if self.time_limit is not None:
            check_number("time_limit", self.time_limit, low=0.0, open_low=True)
        check_number("evaluations", self.evaluations, low=1, integer=True)
        check_choice("method", self.method, METHODS)
        if self.gamma is not None:
            check_number("gamma", self.gamma, low=0.0, open_low=True)
        check_number("memory", self.memory, low=1, high=1000, integer=True)
        check_number("checkpoint_every", self.checkpoint_every, low=1, integer=True)
