r"""The curvature prior of incremental training: new data may move a weight as far as old data did not pin it down.

With $L$ the mean loss of the new rows, $w_p$ the weights of the run before and $H$ the diagonal of its Fisher
information, $w_0$ and $H_0$ those of a cold-start run, the objective is

$$ L(w) + \tfrac{\lambda}{2} \left[ \alpha (w - w_0)^\top H_0 (w - w_0) + (1 - \alpha) (w - w_p)^\top H (w - w_p)
\right] = L(w) + \tfrac{\lambda}{2} (w - a)^\top h (w - a) + const , $$

$h = \alpha H_0 + (1 - \alpha) H$, $a = (\alpha H_0 w_0 + (1 - \alpha) H w_p) / h$. $\lambda = 1$ lets the rows of the
runs before count as much as the new ones. $H$ is $B$ times the mean squared gradient of batches of B rows (the square
of a batch's mean gradient is about Fisher / B), and accumulates over runs: $H_t = \rho H_{t-1} + H_{new}$.

The penalty acts behind the optimizer's step and in its metric, as AdamW's decay does, so that the resting point is the
minimum of the objective: $w \leftarrow a + e^{-\eta \lambda h / (\sqrt{\hat v} + \epsilon)} (w - a)$. Rows of the table
are caught up when they are looked up again, with the sum of the rates in between: exactly what step by step would give.

Departure: the exponential in place of $(1 - \eta \lambda h)$, which is its first order and overshoots where it is above
1. Rows that no new batch touches are left as they are, so that a step costs what the batch touches.

Source: LiRank, arXiv 2402.06859, section 4.2 (incremental training).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from core_tensor.checks import check_number
from torch import Tensor, nn

from lirank.data.batch import Batch
from lirank.train import checkpoint
from lirank.train.row_optimizers import RowOptimizer

TABLE = "table.weight"


@dataclass(frozen=True)
class CurvaturePrior:
    """What a training must not forget.

    Attributes:
        weight: Weight lambda of the penalty; 0 is a plain warm start.
        anchor: Weights a by name of the model's state, for every trained parameter and the table.
        curvature: Curvatures h by name, of the same shapes, not negative.
    """

    weight: float
    anchor: Mapping[str, Tensor]
    curvature: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        """Refuse what is no prior."""
        check_number("weight", self.weight, low=0)
        for name, curvature in self.curvature.items():
            if curvature.shape != self.anchor[name].shape or not bool((curvature >= 0).all()):
                raise ValueError(f"curvature: {name} is negative, not a number, or of another shape than its anchor")

    @classmethod
    def of(
        cls,
        weight: float,
        previous: Mapping[str, Tensor],
        curvature: Mapping[str, Tensor],
        cold: Mapping[str, Tensor] | None = None,
        cold_curvature: Mapping[str, Tensor] | None = None,
        cold_weight: float = 0.0,
    ) -> "CurvaturePrior":
        """The prior of one or two earlier runs.

        Args:
            weight: Weight lambda.
            previous: Weights of the run before.
            curvature: Its curvature.
            cold: Weights of a cold-start run, in the shapes of the run before; None for none.
            cold_curvature: Its curvature.
            cold_weight: Share alpha of the cold-start run, in [0, 1].

        Returns:
            The prior.
        """
        check_number("cold_weight", cold_weight, low=0, high=1)
        if cold is None or cold_curvature is None or cold_weight == 0:
            return cls(weight, {n: previous[n].clone() for n in curvature}, dict(curvature))
        anchors, total = {}, {}
        for name, mine in curvature.items():
            a, b = cold_weight * cold_curvature[name], (1 - cold_weight) * mine
            h = total[name] = a + b
            mean = (a * cold[name] + b * previous[name]) / h.clamp_min(1e-38)
            anchors[name] = torch.where(h > 0, mean, previous[name])
        return cls(weight, anchors, total)


class Pull:
    """Applies a prior during a training.

    Args:
        prior: The prior.
        parameters: Trained parameters of the network by name of the model's state.
        optimizer: Their optimizer (AdamW).
        rows: The optimizer of the table.
    """

    def __init__(
        self,
        prior: CurvaturePrior,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        rows: RowOptimizer,
    ) -> None:
        for name, tensor in {**parameters, TABLE: rows.table.weight}.items():
            if name not in prior.curvature or prior.curvature[name].shape != tensor.shape:
                raise ValueError(f"prior: expected a curvature of {name} of shape {tuple(tensor.shape)}")
        self.prior, self._parameters, self._optimizer, self._rows = prior, parameters, optimizer, rows
        n = len(rows.table.weight)
        self.clock = torch.zeros((), dtype=torch.float64)  # sum of the table's learning rates so far
        self.caught_up = torch.zeros(n, dtype=torch.float64)  # the clock up to which each row is pulled
        self.touched = torch.zeros(n, dtype=torch.int64)  # step that last touched each row; 0 for none

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint has to hold."""
        return {"clock": self.clock, "caught_up": self.caught_up, "touched": self.touched}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned."""
        self.clock, self.caught_up, self.touched = state["clock"], state["caught_up"], state["touched"]

    @torch.no_grad()
    def before_lookup(self, ids: Tensor) -> None:
        """Catch rows up before they are looked up.

        Args:
            ids: Rows of the batch, shape (n,), int64.
        """
        ids = ids.unique()
        behind = ids[(self.touched[ids] > 0) & (self.caught_up[ids] < self.clock)]
        if len(behind):
            elapsed = (self.clock - self.caught_up[behind]).float()[:, None]
            scale = self._rows.scale(behind, self.touched[behind])
            weight, anchor = self._rows.table.weight.detach(), self.prior.anchor[TABLE][behind]
            rate = self.prior.weight * self.prior.curvature[TABLE][behind] * elapsed / scale
            weight[behind] = _pulled(weight[behind], anchor, rate)
        self.caught_up[ids] = self.clock

    def everything(self) -> None:
        """Catch all rows up, before the model is measured or saved."""
        self.before_lookup(self.touched.nonzero()[:, 0])

    @torch.no_grad()
    def after_step(self, ids: Tensor) -> None:
        """Pull the network's weights, and note which rows the step has touched.

        Args:
            ids: Rows of the batch, shape (n,), int64.
        """
        self.touched[ids] = self._rows.steps
        self.clock = self.clock + self._rows.lr
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                state = self._optimizer.state.get(parameter)
                if not state:  # it has had no gradient yet
                    continue
                name = names[id(parameter)]
                scale = (state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))).sqrt() + group["eps"]
                rate = group["lr"] * self.prior.weight * self.prior.curvature[name] / scale
                parameter.copy_(_pulled(parameter, self.prior.anchor[name], rate))


def _pulled(weight: Tensor, anchor: Tensor, rate: Tensor) -> Tensor:
    return torch.where(rate > 0, anchor + torch.exp(-rate) * (weight - anchor), weight)


def rows_of(batch: Batch) -> Tensor:
    """All rows of the table that a batch looks up, shape (n,)."""
    return torch.cat([batch.ids.flatten(), *(lists.values for lists in batch.lists.values())])


# ----------------------------------------------------------------------------------------------------------------------


def save_curvature(path: Path, curvature: Mapping[str, Tensor]) -> None:
    """Write the curvature of a run."""
    checkpoint.save(path, curvature, {"kind": "curvature"})


def load_curvature(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """Read what `save_curvature` wrote, for the model that it belongs to."""
    found, _ = checkpoint.load(path, "the curvature of a lirank run")
    state = model.state_dict()
    for name, tensor in found.items():
        if name not in state or state[name].shape != tensor.shape:
            raise ValueError(f"{path}: {name} does not fit the run's model")
    return found
