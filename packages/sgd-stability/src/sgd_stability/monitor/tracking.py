"""The curvature of a probe, followed through training at the price of one Gauss-Newton product per visit."""

import math
from dataclasses import replace
from typing import Any

import torch
from core_tensor.linalg.spectrum import lanczos
from torch import Tensor

from sgd_stability.curvature.gauss_newton import gauss_newton_operator, gauss_newton_product
from sgd_stability.curvature.network import Network
from sgd_stability.curvature.sample_curvature import sample_curvature


class Tracker:
    """The top eigenvector v of a probe's Hessian, and v'H_i v of its samples.

    Every visit measures one half of the probe, in turn, and moves v by a power step; the other half's share is one
    visit old. The first visit finds v by Lanczos and measures both.

    Args:
        network: The probe.
        seed: Seed of the start vector.

    Attributes:
        forms: v'H_i v as last measured, shape (n,); None before the first visit.
    """

    def __init__(self, network: Network, seed: int) -> None:
        self.network = network
        middle = (network.n + 1) // 2
        ranges = [(0, middle), (middle, network.n)] if network.n > 1 else [(0, 1)]
        self._halves = [(a, replace(network.part(a, b), ranks=network.ranks)) for a, b in ranges]
        generator = torch.Generator().manual_seed(seed)
        self._v = torch.randn(network.size, generator=generator).to(network.device, network.dtype)
        self._products: list[Tensor] = []
        self._traces = torch.zeros(network.n)
        self._turn = 0  # which half is next
        self.forms: Tensor | None = None

    def visit(self, products: int, scale: Tensor | None) -> tuple[float, float]:
        """Measure some halves and move the eigenvector.

        Args:
            products: How many halves.
            scale: P^(-1/2) of a diagonal preconditioner, shape (d,).

        Returns:
            lambda1 as known now, and the relative residual of the half measured last.
        """
        count = len(self._halves)
        if self.forms is None:
            start = lanczos(
                gauss_newton_operator(self.network, scale=scale), tolerance=0.05, max_steps=12, start=self._v
            )
            self._v = start.vectors[:, 0]
            self.forms = torch.zeros(self.network.n, dtype=torch.float64)
            self._products = [torch.zeros_like(self._v)] * count
            residual = [self._measure(which, scale) for which in range(count)][-1]
            self._move()
        else:
            residual = math.nan
            for _ in range(products):
                residual = self._measure(self._turn, scale)
                self._move()
                self._turn = (self._turn + 1) % count
        return float(self.forms.mean()), residual

    def suspects(self, count: int, scale: Tensor | None) -> tuple[float, list[int]]:
        """Exact curvature of the samples that are likely to have most of it.

        Args:
            count: How many samples: half of them by v'H_i v, half by the loss's curvature in the outputs.
            scale: P^(-1/2) of a diagonal preconditioner, shape (d,).

        Returns:
            The largest curvature, and the samples' places in the probe, most curved first.

        Raises:
            RuntimeError: If there was no visit yet.
        """
        if self.forms is None:
            raise RuntimeError("tracker: visit the probe first")
        half = max(count // 2, 1)
        n = self.network.n
        by_form = self.forms.topk(min(half, n)).indices
        by_trace = self._traces.topk(min(count - half, n)).indices
        which = torch.cat([by_form, by_trace]).unique()
        values = sample_curvature(self.network.select(which.to(self.network.targets.device)), scale=scale)
        return float(values.max()), which[values.argsort(descending=True).cpu()].tolist()

    def state_dict(self) -> dict[str, Any]:
        """What the next visit needs.

        Returns:
            Tensors and numbers.
        """
        return {
            "v": self._v.clone(),
            "forms": None if self.forms is None else self.forms.clone(),
            "products": list(self._products),
            "traces": self._traces.clone(),
            "turn": self._turn,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state.

        Args:
            state: From `state_dict`.

        Raises:
            ValueError: If it belongs to a model or probe of another size.
        """
        if state["v"].shape != self._v.shape or len(state["traces"]) != self.network.n:
            raise ValueError(
                f"state: expected {self._v.numel()} parameters and a probe of {self.network.n}, got "
                f"{state['v'].numel()} and {len(state['traces'])}"
            )
        self._v, self._traces = state["v"].to(self._v), state["traces"].clone()
        self._products = [product.to(self._v) for product in state["products"]]
        self._turn = int(state["turn"])
        self.forms = None if state["forms"] is None else state["forms"].clone()

    def _measure(self, which: int, scale: Tensor | None) -> float:
        offset, half = self._halves[which]
        v = self._v / self._v.norm()
        found = gauss_newton_product(half, v, scale=scale)
        self._products[which] = found.product
        if self.forms is not None:
            self.forms[offset : offset + half.n] = found.forms.double().cpu()
        self._traces[offset : offset + half.n] = found.output_curvature.float().cpu()
        value = float(torch.dot(v, found.product))
        return float((found.product - value * v).norm()) / max(abs(value), 1e-300)

    def _move(self) -> None:
        moved = torch.stack(self._products).mean(0)
        if float(moved.norm()) > 0:
            self._v = moved
