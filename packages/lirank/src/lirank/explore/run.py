"""Exploration on a trained run: the belief about its last layer, scores for serving, and logs judged off-policy."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from core_tensor.app.files import digest
from core_tensor.checks import check_choice, check_number
from torch import Tensor

from lirank.data.batch import Batch
from lirank.explore.estimators import Estimate, LoggedEvents, direct_method, doubly_robust, ips, snips
from lirank.explore.policies import first_place_probabilities, thompson, upper_confidence
from lirank.explore.posterior import LogisticPosterior, Posterior
from lirank.model.ranker import Ranker
from lirank.train.run import MODEL, TrainedModel

Kind = Literal["greedy", "ucb", "thompson"]
KINDS: tuple[Kind, ...] = ("greedy", "ucb", "thompson")


def last_features(model: Ranker, batch: Batch, task: int) -> Tensor:
    """What the head of a task is multiplied with, and 1 for its bias.

    Args:
        model: The model.
        batch: What the encoder made.
        task: Number of the label.

    Returns:
        Features, shape (B, d), float32.
    """
    training = model.training
    model.eval()
    with torch.no_grad():
        hidden = model.network.hidden(model.vectors(batch))[task]
    model.train(training)
    return torch.cat([hidden, hidden.new_ones(len(hidden), 1)], 1)


def head(model: Ranker, task: int) -> Tensor:
    """Weights and bias of a task's head, shape (d,), float64: the mean before any event."""
    linear = model.network.tasks.heads[task]
    assert isinstance(linear, torch.nn.Linear)
    return torch.cat([linear.weight.detach()[0], linear.bias.detach()]).double()


def task_of(trained: TrainedModel, label: str) -> int:
    """Number of a label; an empty name is the first."""
    names = [entry.name for entry in trained.encoder.schema.labels]
    if label and label not in names:
        raise ValueError(f"label: expected one of {', '.join(names)}, got {label!r}")
    return names.index(label) if label else 0


def fit_posterior(
    trained: TrainedModel,
    tables: Iterator[pa.Table],
    task: int,
    *,
    precision: float = 1.0,
    posterior: Posterior | None = None,
    keep: float = 1.0,
) -> tuple[LogisticPosterior, int]:
    """The belief about a task's head after some events.

    Args:
        trained: The run.
        tables: Rows with causal columns and labels, oldest first.
        task: Number of the label.
        precision: Precision of the prior around the trained head.
        posterior: Belief to go on from, of this run; None starts at the prior.
        keep: Share of that belief's evidence that stays.

    Returns:
        The posterior, and the events it has seen now.

    Raises:
        ValueError: If the belief is of another width.
    """
    mean = head(trained.model, task)
    found = LogisticPosterior.prior(len(mean), precision, mean) if posterior is None else posterior.forgotten(keep)
    if not isinstance(found, LogisticPosterior) or len(found.mean) != len(mean):
        raise ValueError(f"posterior: expected one of {len(mean)} weights for clicks; is it of another run?")
    events = 0
    for table in tables:
        batch = trained.encoder.encode(table)
        assert batch.labels is not None
        known = ~batch.labels[:, task].isnan()
        if bool(known.any()):
            phi = last_features(trained.model, batch, task)[known]
            weight = None if batch.weight is None else batch.weight[known]
            found = found.updated(phi, batch.labels[known, task], weight)
            events += int(known.sum())
    return found, events


def save_for(posterior: Posterior, path: Path, run: Path, label: str) -> None:
    """Write a posterior with the run and the label that it belongs to."""
    posterior.save(path, {"run": digest(run / MODEL), "label": label})


@dataclass(frozen=True)
class Explorer:
    """Scores of a run under a belief about its last layer.

    Attributes:
        model: The run's model.
        posterior: The belief.
        task: Number of the label.
    """

    model: Ranker
    posterior: Posterior
    task: int

    @classmethod
    def open(cls, trained: TrainedModel, run: Path, path: Path) -> "Explorer":
        """Read a posterior for a run.

        Args:
            trained: The run.
            run: Its folder.
            path: What `lirank explore fit` wrote.

        Returns:
            The explorer.

        Raises:
            ValueError: If the posterior is broken or of another run.
        """
        posterior, about = Posterior.read(path)
        if about.get("run") != digest(run / MODEL):
            raise ValueError(f"{path}: the posterior of another run than {run}; a network trained anew needs a new one")
        return cls(trained.model, posterior, task_of(trained, about.get("label", "")))

    def logits(
        self,
        batch: Batch,
        kind: Kind,
        *,
        alpha: float = 1.0,
        requests: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Logits before calibration under a policy.

        Args:
            batch: What the encoder made.
            kind: `greedy`: at the mean. `ucb`: mean plus `alpha` standard deviations. `thompson`: one draw per request.
            alpha: Standard deviations of `ucb`.
            requests: Number of the request of every row, for `thompson`; None for one request.
            generator: Source of randomness.

        Returns:
            Logits, shape (B,), float64.
        """
        check_choice("kind", kind, KINDS)
        phi = last_features(self.model, batch, self.task)
        if kind == "thompson":
            return thompson(self.posterior, phi, requests, generator)
        return upper_confidence(self.posterior, phi, alpha if kind == "ucb" else 0.0)

    def probabilities(self, batch: Batch, logits: Tensor) -> Tensor:
        """Calibrated probabilities of logits; the order within a calibration context stays.

        Args:
            batch: The rows.
            logits: What `logits` returned, shape (B,).

        Returns:
            Probabilities, shape (B,), float32.
        """
        context = self.model.vectors(batch).context if self.model.config.calibration_context else None
        with torch.no_grad():
            calibrated = self.model.network.calibration[self.task](logits.float(), context)
        return torch.sigmoid(calibrated + self.model.correction)

    def first_places(self, batch: Batch, draws: int = 1000, generator: torch.Generator | None = None) -> Tensor:
        """Probability that Thompson sampling puts each candidate of one request first: what a log has to hold.

        Args:
            batch: The candidates.
            draws: Posterior draws.
            generator: Source of randomness.

        Returns:
            Probabilities, shape (B,), sum 1.
        """
        phi = last_features(self.model, batch, self.task)
        return first_place_probabilities(self.posterior, phi, draws, generator)


@dataclass(frozen=True)
class Logged:
    """Candidates of logged requests, one row each.

    Attributes:
        request: Request of every row, shape (n,), int64.
        shown: Which candidate the logging policy took, shape (n,), bool: one per request.
        reward: What came of it, shape (n,); read where shown.
        propensity: Probability with which it was taken, shape (n,); read where shown.
    """

    request: np.ndarray
    shown: np.ndarray
    reward: np.ndarray
    propensity: np.ndarray

    def __post_init__(self) -> None:
        """Refuse requests without exactly one shown candidate."""
        requests, place = np.unique(self.request, return_inverse=True)
        times = np.bincount(place, self.shown, len(requests))
        if (times != 1).any():
            bad = int((times != 1).argmax())
            raise ValueError(
                f"shown: expected one shown candidate per request, request {requests[bad]} has {int(times[bad])}"
            )


def judge(
    logged: Logged,
    probability: np.ndarray,
    model: np.ndarray | None = None,
    *,
    clip: float = float("inf"),
    cluster: np.ndarray | None = None,
) -> dict[str, Estimate]:
    """What a policy would have earned per request.

    Args:
        logged: The logged requests.
        probability: Probability with which the policy takes each candidate, shape (n,), sum 1 in every request.
        model: A model's reward of every candidate, shape (n,), for DM and DR; None for IPS and SNIPS only.
        clip: Largest weight.
        cluster: What requests belong together, such as the user, shape (n,), int64.

    Returns:
        Estimates by name: `IPS`, `SNIPS`, and with a model `DM`, `DR`.

    Raises:
        ValueError: If the probabilities of a request do not add up to 1.
    """
    requests, place = np.unique(logged.request, return_inverse=True)
    total = np.bincount(place, probability, len(requests))
    if not np.allclose(total, 1.0, atol=1e-6):
        bad = int(np.abs(total - 1).argmax())
        raise ValueError(f"probability: expected a sum of 1 per request, request {requests[bad]} has {total[bad]:g}")
    order = np.flatnonzero(logged.shown)
    order = order[np.argsort(place[order])]  # the shown row of every request
    both = {}
    if model is not None:
        expected = np.bincount(place, probability * model, len(requests))
        both = {"model_logged": torch.from_numpy(model[order]), "model_policy": torch.from_numpy(expected)}
    events = LoggedEvents(
        torch.from_numpy(logged.reward[order]),
        torch.from_numpy(logged.propensity[order]),
        torch.from_numpy(probability[order]).clamp(0, 1),
        cluster=None if cluster is None else torch.from_numpy(cluster[order]),
        clip=clip,
        **both,
    )
    found = {"IPS": ips(events), "SNIPS": snips(events)}
    return found | ({"DM": direct_method(events), "DR": doubly_robust(events)} if model is not None else {})


def choice_probabilities(
    request: np.ndarray, scores: np.ndarray, kind: Literal["best", "softmax"], temperature: float = 1.0
) -> np.ndarray:
    """Probabilities with which a policy takes each candidate first.

    Args:
        request: Request of every candidate, shape (n,), int64.
        scores: Scores, shape (n,).
        kind: `best` takes the highest score, ties shared; `softmax` draws by exp(score / temperature).
        temperature: Of the softmax.

    Returns:
        Probabilities, shape (n,), sum 1 in every request.
    """
    check_number("temperature", temperature, low=0, open_low=True)
    requests, place = np.unique(request, return_inverse=True)
    top = np.full(len(requests), -np.inf)
    np.maximum.at(top, place, scores)
    value = (scores == top[place]) * 1.0 if kind == "best" else np.exp((scores - top[place]) / temperature)
    shares: np.ndarray = value / np.bincount(place, value, len(requests))[place]
    return shares
