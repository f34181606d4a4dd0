"""Training that goes on from an earlier run: its vocabulary, its causal memory, its weights, and what it knows."""

from dataclasses import dataclass
from pathlib import Path

from core_tensor.checks import check_number
from torch import Tensor

from lirank.data.batch import Encoder
from lirank.features.prepare import Earlier
from lirank.model.growth import carry_over
from lirank.model.ranker import Ranker
from lirank.train.loop import TrainConfig, Trainer
from lirank.train.prior import CurvaturePrior, load_curvature, save_curvature
from lirank.train.run import CURVATURE, TrainedModel, part_rows


@dataclass(frozen=True)
class Start:
    """Where a training starts.

    Attributes:
        run: Folder of the earlier run.
        prior: Weight of the curvature prior; 0 is a plain warm start, 1 lets the rows of the earlier runs count as much
            as the new ones.
        cold: Folder of the cold-start run that the prior keeps in mind too; None for none.
        cold_weight: Its share of the prior, in [0, 1].
        remember: Share of the earlier curvature that stays when the new one is added, in [0, 1].
    """

    run: Path
    prior: float = 1.0
    cold: Path | None = None
    cold_weight: float = 0.0
    remember: float = 0.9

    def __post_init__(self) -> None:
        """Refuse what is no start."""
        check_number("prior", self.prior, low=0)
        check_number("cold_weight", self.cold_weight, low=0, high=1)
        check_number("remember", self.remember, low=0, high=1)
        if (self.cold is None) != (self.cold_weight == 0):
            raise ValueError("cold, cold_weight: expected both or neither")


def hand_over(trained: TrainedModel) -> Earlier:
    """What the preparation of the new log needs of an earlier run."""
    return Earlier(trained.encoder, trained.causal, trained.record.get("until"))


def curvature_of(folder: Path, trained: TrainedModel, batch_size: int) -> dict[str, Tensor]:
    """The curvature of a run: what it left, or else what its training rows give.

    Args:
        folder: The run's folder.
        trained: The run.
        batch_size: Rows of a batch.

    Returns:
        Curvatures by name of the model's state.

    Raises:
        ValueError: If the run has neither.
    """
    if (folder / CURVATURE).exists():
        return load_curvature(folder / CURVATURE, trained.model)
    rows = part_rows(folder, "train")
    if rows is None:
        raise ValueError(
            f"{folder}: a prior needs {CURVATURE} or the prepared training rows of the run, found neither; use "
            "--prior 0, or the folder that `lirank train` wrote"
        )
    return Trainer(trained.model, trained.encoder, TrainConfig(batch_size=batch_size)).curvature(rows)


@dataclass(frozen=True)
class Known:
    """Weights and curvature of an earlier run, in the shapes of the grown model."""

    weights: dict[str, Tensor]
    curvature: dict[str, Tensor]


def known(folder: Path, trained: TrainedModel, model: Ranker, encoder: Encoder, batch_size: int) -> Known:
    """Carry weights and curvature of a run over to a model that has grown; what is new is known nothing of."""
    found = curvature_of(folder, trained, batch_size)
    state = dict(model.state_dict())
    zeros = {name: tensor.new_zeros(tensor.shape) for name, tensor in state.items()}
    # 0 also for what is not trained and has no curvature
    whole = {n: found.get(n, t.new_zeros(t.shape)) for n, t in trained.model.state_dict().items()}
    arguments = (trained.model, model, trained.encoder, encoder)
    curvature = carry_over(whole, zeros, *arguments, owned=True)
    weights = carry_over(dict(trained.model.state_dict()), state, *arguments)
    return Known(weights, {name: curvature[name] for name in found})


def prior_of(start: Start, before: Known, model: Ranker, encoder: Encoder, batch_size: int) -> CurvaturePrior:
    """The prior of a start."""
    if start.cold is None:
        return CurvaturePrior.of(start.prior, before.weights, before.curvature)
    cold = known(start.cold, TrainedModel.load(start.cold), model, encoder, batch_size)
    return CurvaturePrior.of(
        start.prior, before.weights, before.curvature, cold.weights, cold.curvature, start.cold_weight
    )


def accumulate(folder: Path, start: Start, before: Known, added: dict[str, Tensor]) -> None:
    """Write the curvature that the next run takes for its prior: what is remembered, and that of this run's rows."""
    save_curvature(
        folder / CURVATURE, {name: start.remember * before.curvature[name] + new for name, new in added.items()}
    )
