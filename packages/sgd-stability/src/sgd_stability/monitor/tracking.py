"""The curvature of a probe, followed through training at the price of 64 samples' Gauss-Newton product per visit."""

import functools
import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from core_tensor.linalg.spectrum import lanczos
from torch import Tensor

from sgd_stability.curvature.gauss_newton import gauss_newton_operator, gauss_newton_product
from sgd_stability.curvature.network import Network
from sgd_stability.curvature.sample_curvature import QUICK, sample_curvature, sample_directions
from sgd_stability.curvature.truncated import projected_family
from sgd_stability.theory.family import CurvatureFamily

_FEW_OUTPUTS = 32
"""Outputs per sample up to which all suspects are looked at, and half of them above."""
_PART = 64
"""Samples of the probe that one product measures."""
_JUMP = 0.1
"""Rise of a part's loss, as a share of the first loss, after which the other parts' figures are of no use."""
_NUMBERS = 2**28
"""Most numbers of the directions held at once."""


class NotFiniteError(ArithmeticError):
    """The probe's loss or curvature is NaN or infinite."""


@dataclass(frozen=True)
class Visit:
    """What a visit measured.

    Attributes:
        lambda1: v'Hv as known now.
        residual: Relative residual of the part measured last.
        loss: Mean loss of the probe; that of a part not measured now is some visits old.
        spread: Standard deviation of the outputs along one direction, over the samples of a part.
    """

    lambda1: float
    residual: float
    loss: float
    spread: float


class Tracker:
    """The top eigenvector v of a probe's Hessian, and v'H_i v of its samples.

    Every visit measures one part of the probe, in turn, and moves v by a power step; the other parts' share is as old
    as their last turn. The first visit finds v by Lanczos and measures all of them; so does one whose part's loss has
    jumped since its last turn.

    Args:
        network: The probe.
        seed: Seed of the start vector.

    Attributes:
        forms: v'H_i v as last measured, shape (n,); None before the first visit.
    """

    def __init__(self, network: Network, seed: int) -> None:
        self.network = network
        few = max(2, _NUMBERS // network.size)  # a product is kept for every part
        count = min(network.n, few, max(2, round(network.n / _PART)))
        ends = [network.n * i // count for i in range(count + 1)]
        self._parts = [(a, replace(network.part(a, b), ranks=network.ranks)) for a, b in itertools.pairwise(ends)]
        generator = torch.Generator().manual_seed(seed)
        self._v = torch.randn(network.size, generator=generator).to(network.device, network.dtype)
        self._products: list[Tensor] = []  # of every part with v, as of its last turn
        self._rows = torch.zeros(3, network.n, dtype=torch.float64)  # output curvature, losses, projections
        self._turn = 0  # which part is next
        self._first_loss = math.inf
        self.forms: Tensor | None = None

    def visit(self, products: int, scale: Tensor | None, *, rough: bool = False) -> Visit:
        """Measure some parts and move the eigenvector.

        Args:
            products: How many parts.
            scale: P^(-1/2) of a diagonal preconditioner, shape (d,).
            rough: Whether a few products with one part are enough to start from.

        Returns:
            What was found.

        Raises:
            NotFiniteError: If loss or curvature are not finite.
        """
        count = len(self._parts)
        residual = math.nan
        if self.forms is None:
            self._start(scale, rough)
            self.forms = torch.zeros(self.network.n, dtype=torch.float64)
            try:
                residual = [self._measure(which, scale) for which in range(count)][-1]
            except NotFiniteError:
                self.forms = None  # the next visit starts anew
                raise
            self._move()
            self._first_loss = float(self._rows[1].mean())
        else:
            for _ in range(products):
                part = self._parts[self._turn]
                before = self._mean_loss(*part)
                residual = self._measure(self._turn, scale)
                if self._mean_loss(*part) - before > _JUMP * self._first_loss:
                    for other in range(1, count):
                        self._measure((self._turn + other) % count, scale)
                self._move()
                self._turn = (self._turn + 1) % count
        losses, projections = self._rows[1], self._rows[2]
        # within each part: between two visits constant outputs move too
        spread = max(float(projections[a : a + part.n].std(correction=0)) for a, part in self._parts)
        return Visit(float(self.forms.mean()), residual, float(losses.mean()), spread)

    def suspects(self, count: int, scale: Tensor | None) -> tuple[float, list[int]]:
        """Curvature of the samples that are likely to have most of it; exact for few outputs.

        Args:
            count: How many samples: half of them by v'H_i v, half by the loss's curvature in the outputs; fewer where
                a sample has many outputs, since each then costs several products.
            scale: P^(-1/2) of a diagonal preconditioner, shape (d,).

        Returns:
            The largest curvature, and the samples' places in the probe, most curved first.

        Raises:
            RuntimeError: If there was no visit yet.
            NotFiniteError: If a curvature is not finite.
        """
        if self.forms is None:
            raise RuntimeError("tracker: visit the probe first")
        if self.network.rank > _FEW_OUTPUTS:
            count = (count + 1) // 2
        half = max(count // 2, 1)
        n = self.network.n
        by_form = self.forms.topk(min(half, n)).indices
        by_trace = self._rows[0].topk(min(count - half, n)).indices
        which = torch.cat([by_form, by_trace]).unique()
        some = self.network.select(which.to(self.network.targets.device))
        values = sample_curvature(some, scale=scale, effort=QUICK, start=self._v)
        if not bool(values.isfinite().all()):
            raise NotFiniteError
        return float(values.max()), which[values.argsort(descending=True).cpu()].tolist()

    def family(self, places: list[int], directions: int, scale: Tensor | None) -> CurvatureFamily:
        """The probe's family compressed to the tracked eigenvector and the suspects' own directions.

        Args:
            places: Suspects, most curved first.
            directions: Most directions; fewer for very large models.
            scale: P^(-1/2) of a diagonal preconditioner, shape (d,).

        Returns:
            The family.
        """
        assert self.forms is not None
        directions = directions if self.network.rank <= _FEW_OUTPUTS else (directions + 1) // 2
        most = max(1, min(directions, _NUMBERS // self.network.size) - 1)
        rank = torch.zeros(self.network.n, dtype=torch.float64)
        rank[places[:most]] = torch.arange(len(places[:most]), 0, -1, dtype=torch.float64)
        count = len(places[:most])
        own = sample_directions(self.network, rank, count, scale=scale, effort=QUICK, start=self._v)
        V, _ = torch.linalg.qr(torch.cat([self._v[:, None], own], 1))
        return projected_family(self.network, V, scale=scale, curvature=self.forms)

    def quadratic_form(self, scale: Tensor | None) -> float:
        """v'P^-1 v of the unit eigenvector.

        Args:
            scale: P^(-1/2), shape (d,).

        Returns:
            The form; 1 without a preconditioner.
        """
        return 1.0 if scale is None else float((self._v * scale).square().sum() / self._v.square().sum())

    def state_dict(self) -> dict[str, Any]:
        """What the next visit needs.

        Returns:
            Tensors and numbers.
        """
        return {
            "v": self._v.clone(),
            "forms": None if self.forms is None else self.forms.clone(),
            "products": list(self._products),
            "rows": self._rows.clone(),
            "turn": self._turn,
            "first_loss": self._first_loss,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state.

        Args:
            state: From `state_dict`.

        Raises:
            ValueError: If it belongs to a model or probe of another size.
        """
        if state["v"].shape != self._v.shape or state["rows"].shape != self._rows.shape:
            raise ValueError(
                f"state: expected {self._v.numel()} parameters and a probe of {self.network.n}, got "
                f"{state['v'].numel()} and {state['rows'].shape[-1]}"
            )
        self._v, self._rows = state["v"].to(self._v), state["rows"].clone()
        self._products = [product.to(self._v) for product in state["products"]]
        self._turn, self._first_loss = int(state["turn"]), float(state["first_loss"])
        self.forms = None if state["forms"] is None else state["forms"].clone()

    def _start(self, scale: Tensor | None, rough: bool) -> None:
        """The eigenvector by a short Lanczos."""
        operator = gauss_newton_operator(self._parts[0][1] if rough else self.network, scale=scale)
        tolerance, most = (0.1, 4) if rough else (0.05, 12)
        steps = max(2, min(most, _NUMBERS // self.network.size))
        try:
            found = lanczos(operator, tolerance=tolerance, max_steps=steps, start=self._v)
        except ValueError as error:  # a product that is not finite
            raise NotFiniteError from error
        self._v = found.vectors[:, 0]
        self._products = [torch.zeros_like(self._v)] * len(self._parts)

    def _measure(self, which: int, scale: Tensor | None) -> float:
        """One part along v; nothing is kept of it if it is not finite."""
        offset, part = self._parts[which]
        v = self._v / self._v.norm()
        found = gauss_newton_product(part, v, scale=scale)
        value = float(torch.dot(v, found.product))
        rows = torch.stack([found.output_curvature, found.losses, found.projections]).double().cpu()
        if not (math.isfinite(value) and bool(rows.isfinite().all())):
            raise NotFiniteError
        self._products[which] = found.product
        where = slice(offset, offset + part.n)
        if self.forms is not None:
            self.forms[where] = found.forms.double().cpu()
        self._rows[:, where] = rows
        return float((found.product - value * v).norm()) / max(abs(value), 1e-300)

    def _mean_loss(self, offset: int, part: Network) -> float:
        return float(self._rows[1, offset : offset + part.n].mean())

    def _move(self) -> None:
        moved = functools.reduce(torch.add, self._products)
        if float(moved.norm()) > 0:
            self._v = moved
