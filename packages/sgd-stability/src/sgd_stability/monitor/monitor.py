r"""A live answer, while training, to "is this learning rate stable, and which samples decide it?".

Three tiers, by cost:

1. every `every_cheap` steps, two sharpnesses along the way training goes: of a drawn batch along its gradient, which
   SGD at the edge of stability holds at 2 / eta (a gradient and a Hessian product), and of the probe's loss along the
   last update (ten forward passes of the probe).
2. every `every` steps, one Gauss-Newton product on 64 samples of the probe, in turn. It moves the tracked top
   eigenvector by a power step, gives v'H_iv and the loss of every sample, and so a band for eta*: unstable above the
   exact threshold of the compressed family, stable below the bound of lambda1 and L. L comes from per-sample
   curvatures of a few suspects. Where the rate is within the band, the upper end is sharpened now and then by the
   suspects' own directions.
3. on demand, `exact()`: the full analysis. With `settle`, a check that its band leaves undecided asks for it by itself.

A check has one of four states (see `Check.state`): stable, caution, unstable, diverged. On a probe all of these are
estimates of the dataset's figures. The model is switched to evaluation mode for a check, so batch normalization enters
with its running statistics; biases that it cancels in training are left out. A hook of the optimizer never raises:
what goes wrong in a check is warned of once.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from core_tensor.app.ranks import ALONE
from core_tensor.checks import check_choice, check_number
from torch import Tensor, nn

from sgd_stability.curvature.data import Data, batch_size_of, collect, sharing
from sgd_stability.curvature.losses import LossValues, chance, resolve_loss
from sgd_stability.curvature.network import make_network
from sgd_stability.monitor.directional import batch_sharpness, critical_sharpness
from sgd_stability.monitor.normalized import batch_normalized, cancelled_biases
from sgd_stability.monitor.tracking import NotFiniteError, Tracker
from sgd_stability.report.analysis import analyze
from sgd_stability.report.check import Band, Check, LossRecord, band, safe_batch_size, state_of
from sgd_stability.report.optimizers import OptimizerState, read_optimizer, trained
from sgd_stability.report.plots import plot_history
from sgd_stability.report.report import StabilityReport
from sgd_stability.theory.dynamics import update_threshold
from sgd_stability.theory.sampling import Sampling, Scheme


class InstabilityWarning(UserWarning):
    """The learning rate is above the upper end of the band while the loss does not fall, or the run is lost."""


class MonitorWarning(UserWarning):
    """A check could not be made; training continues."""


T = TypeVar("T")
_SHARPEN_EVERY = 16
"""Checks between two measurements of the sharper upper end."""
Reaction = Literal["warn", "reduce_lr"] | Callable[["StabilityMonitor", Check], None] | None


class StabilityMonitor:
    """Watches an optimizer; see the module's docstring for the tiers.

    Args:
        model: The model in training; wrapped by DistributedDataParallel or `torch.compile` if you like.
        loss: As in `analyze`; its curvature in the outputs must be positive semidefinite.
        data: Training data, as in `analyze`; the probe is drawn from it once.
        batch_size: Samples per optimizer step (over all ranks and accumulated batches); read off a `DataLoader` if
            absent.
        every: Steps between tier-2 checks.
        every_cheap: Steps between tier-1 measurements; 0 switches them off.
        probe_batch: Samples in the probe.
        suspects: Samples per check whose curvature is computed exactly.
        products: Products per check, each on 64 samples of the probe in turn; more of them track the top eigenvector
            more closely.
        directions: Directions of the sharper upper end, every 16th check at most; 1 leaves it at one direction.
        settle: Let the full analysis, of the probe, decide checks that the band leaves undecided.
        sampling: How minibatches are drawn.
        on_unstable: `"warn"`, `"reduce_lr"` (to 0.9 of the largest safe rate), a function `(monitor, check)`, or None.
        max_overhead: Put a check off while checks have taken more than this share of the time since attaching; None
            never does.
        distributed: Share the work over the ranks of the default process group; every rank must attach such a monitor,
            with the same model and the same whole data set.
        seed: Seed of the probe and of the start vector.

    Attributes:
        history: The checks so far.
        sharpness_history: Tier-1 measurements (step, batch sharpness, critical sharpness).
        start_loss: Loss of the probe when the monitor was made.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: str | nn.Module | LossValues,
        data: Data,
        *,
        batch_size: int | None = None,
        every: int = 200,
        every_cheap: int = 0,
        probe_batch: int = 256,
        suspects: int = 8,
        products: int = 1,
        directions: int = 8,
        settle: bool = False,
        sampling: Scheme = "without_replacement",
        on_unstable: Reaction = "warn",
        max_overhead: float | None = None,
        distributed: bool = False,
        seed: int = 0,
    ) -> None:
        for name, value, low in (("every", every, 1), ("every_cheap", every_cheap, 0), ("suspects", suspects, 1)):
            check_number(name, value, low=low, integer=True)
        check_number("products", products, low=1, integer=True)
        check_number("directions", directions, low=1, integer=True)
        if max_overhead is not None:
            check_number("max_overhead", max_overhead, low=0, open_low=True)
        if isinstance(on_unstable, str):
            check_choice("on_unstable", on_unstable, ("warn", "reduce_lr"))
        if batch_size is None:
            batch_size = batch_size_of(data)
        if batch_size is None:
            raise ValueError("batch_size: expected one, or a DataLoader that has one")
        self.model, self.loss, self.data, self.sampling = model, loss, data, sampling
        self.every, self.every_cheap, self.settle = every, every_cheap, settle
        self.suspects, self.products, self.directions = suspects, products, directions
        self.on_unstable, self.max_overhead, self.seed = on_unstable, max_overhead, seed
        self._ranks = sharing(distributed)
        self._samples = collect(
            data, max_samples=probe_batch, seed=seed, like=next(model.parameters(), None), ranks=self._ranks
        )
        self.n = self._samples.n
        self.batch_size = min(batch_size, self.n)
        self._scheme = Sampling(self.n, self.batch_size, sampling)
        with _evaluating(model):
            self._network = make_network(
                model, resolve_loss(loss), self._samples.inputs, self._samples.targets, ranks=self._ranks
            )
            if not self._network.convex:
                raise ValueError("loss: expected one that is convex in the outputs, for a Gauss-Newton Hessian")
            self.start_loss = self._network.mean_loss()
        self._record = LossRecord(self.start_loss, chance(self._network.loss, self._network.targets))
        self._tracker = Tracker(self._network, seed)
        self._sharper, self._sharpened = 1.0, -_SHARPEN_EVERY  # share of the one-direction upper end; check of it
        self._cancelled: list[str] | None = None  # biases that batch normalization cancels; None before a look at it
        self.steps = 0
        self.history: list[Check] = []
        self.sharpness_history: list[tuple[int, float, float]] = []
        self._optimizer: torch.optim.Optimizer | None = None
        self._handles: list[Any] = []
        self._rough = False  # whether the first check may start from a rough eigenvector
        self._before: list[Tensor] = []  # the parameters before a step that tier 1 will look at
        self._spent, self._started = 0.0, 0.0
        self._failures: set[type[Exception]] = set()  # kinds already told

    def attach(self, optimizer: torch.optim.Optimizer) -> "StabilityMonitor":
        """Check after every `every`-th step of an optimizer, with its learning rate, momentum and weight decay.

        Args:
            optimizer: SGD, Adam, AdamW, NAdam or RMSprop; curvature is taken over the parameters that it trains.

        Returns:
            This monitor.
        """
        self._watch(optimizer, hooks=True)
        return self

    def _watch(self, optimizer: torch.optim.Optimizer, hooks: bool) -> None:
        """Understand an optimizer; without hooks the caller counts the steps and asks for checks."""
        self.detach()
        # Accelerate wraps the optimizer and steps the inner one.
        inner = getattr(optimizer, "optimizer", optimizer)
        optimizer = inner if isinstance(inner, torch.optim.Optimizer) else optimizer
        names = trained(optimizer, self._network.parameters)
        if len(names) < len(self._network.parameters):
            self._restrict(names)
        self._optimizer = optimizer
        self._started, self._spent = time.perf_counter(), 0.0
        if hooks:
            self._handles = [
                optimizer.register_step_pre_hook(lambda *_: self._before_step()),
                optimizer.register_step_post_hook(lambda *_: self._after_step()),
            ]

    def _restrict(self, names: Iterable[str]) -> None:
        """Take curvature over fewer parameters."""
        parameters = {name: self._network.parameters[name] for name in names}
        self._network = replace(self._network, parameters=parameters, known={})
        self._tracker = Tracker(self._network, self.seed)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters that curvature is taken over, by name."""
        return self._network.parameters

    def set_size(self, n: int) -> None:
        """Say that the data are a uniform subsample of a dataset.

        Args:
            n: Samples in the complete dataset, at least as many as in the data.
        """
        check_number("n", n, low=self.n, integer=True)
        self.n = n
        self._scheme = Sampling(n, self.batch_size, self.sampling)

    def detach(self) -> None:
        """Stop watching; the history stays."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._optimizer, self._before = [], None, []

    def check(self) -> Check:
        """Tier 2, now.

        Returns:
            The check, also appended to `history`.

        Raises:
            RuntimeError: If the monitor is not attached.
        """
        check = self._checked()
        self._react(check)
        return check

    def _checked(self) -> Check:
        """A check, without the reaction to it."""
        if self._optimizer is None:
            raise RuntimeError("monitor: attach it to an optimizer first")
        start = time.perf_counter()
        self._check_unchanged(self._optimizer)
        if self._cancelled is None and batch_normalized(self._network.model):
            self._cancelled = cancelled_biases(self._network)
            if self._cancelled:
                self._restrict(name for name in self._network.parameters if name not in self._cancelled)
        state = read_optimizer(self._optimizer, self._network.parameters)
        with _evaluating(self.model):
            try:
                check = self._measured(state)
            except NotFiniteError:
                check = self._not_finite(state)
        check = replace(check, seconds=time.perf_counter() - start)
        self.history.append(check)
        self._spent += check.seconds
        return check

    def _check_unchanged(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse to go on with the curvature of other parameters than those that are trained by now."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        now = {name for name, p in self._network.model.named_parameters() if p.requires_grad and id(p) in held}
        if changed := sorted(now ^ {*self._network.parameters, *(self._cancelled or ())}):
            raise ValueError(
                f"model: expected the parameters that were trained when the monitor was made, but {changed[0]!r} was "
                "frozen or released since; make a new StabilityMonitor after such a change"
            )

    def _measured(self, state: OptimizerState) -> Check:
        """A check of a run whose figures are finite."""
        scale = None if state.preconditioner is None else state.preconditioner.rsqrt().to(self._network.dtype)
        if scale is not None and bool(scale.isnan().any()):
            raise NotFiniteError
        # 1. curvature and loss of the probe
        visit = self._tracker.visit(self.products, scale, rough=self._rough)
        L, places = self._tracker.suspects(self.suspects, scale)
        self._record.add(visit.loss, visit.spread)
        # 2. the band: weight decay through a preconditioner is curvature that all samples share
        assert self._tracker.forms is not None
        shift = state.decay * self._tracker.quadratic_form(scale) if state.decay else 0.0
        forms, lambda1, L = self._tracker.forms + shift, visit.lambda1 + shift, L + shift
        found = self._sharpened_band(band(forms, L, self._scheme, state.update), state, places, scale)
        exact = self._settled(found, state)
        # 3. what it means
        return Check(
            step=self.steps,
            lr=state.lr,
            batch_size=self.batch_size,
            loss=visit.loss,
            average_loss=self._record.average,
            lambda1=lambda1,
            residual=visit.residual,
            edge=state.update.edge(1.0) / state.lr if state.lr > 0 else math.inf,
            max_sample_curvature=L,
            lower=found.lower,
            upper=found.upper,
            exact=exact,
            state=state_of(state.lr, found, exact, self._record),
            culprits=[int(self._samples.ids[i]) for i in places],
            safe_batch_size=safe_batch_size(lambda1, L, state, self._scheme),
            seconds=0.0,
        )

    def _not_finite(self, state: OptimizerState) -> Check:
        """A check of a run that has ended in NaN or infinity; the rate of the last one that was safe stays known."""
        self._record.add(math.nan, math.nan)
        lower = next((c.lower for c in reversed(self.history) if c.state != "diverged"), math.nan)
        unknown = math.nan
        return Check(
            self.steps, state.lr, self.batch_size, unknown, unknown, unknown, unknown, unknown, unknown, lower,
            unknown, unknown, "diverged", [], None, 0.0,
        )  # fmt: skip

    def _sharpened_band(self, found: Band, state: OptimizerState, places: list[int], scale: Tensor | None) -> Band:
        """The band with an upper end of more directions, measured now or scaled from the last time it was."""
        due = len(self.history) - self._sharpened >= _SHARPEN_EVERY
        if self.directions > 1 and due and found.holds(state.lr):
            family = self._tracker.family(places, self.directions, scale)
            upper = update_threshold(family, self._scheme, state.update, tolerance=1e-3).value
            self._sharper = min(upper / found.upper, 1.0) if 0 < found.upper < math.inf else 1.0
            self._sharpened = len(self.history)
        upper = found.upper * self._sharper
        return Band(min(found.lower, upper), upper)

    def exact(self, *, max_samples: int = 512, **options: Any) -> StabilityReport:
        """Tier 3: the full analysis at the present parameters, with the attached optimizer's update rule.

        Args:
            max_samples: Most samples to analyse.
            options: Further options of `analyze`.

        Returns:
            The report.
        """
        if self._optimizer is not None:
            state = read_optimizer(self._optimizer, self._network.parameters)
            options = {"update": state.update, "preconditioner": state.preconditioner, **options}
        options = {"parameters": list(self._network.parameters), **options}
        options = {"sampling": self.sampling, "seed": self.seed, "distributed": self._ranks is not ALONE, **options}
        with _evaluating(self.model):
            return analyze(self.model, self.loss, self.data, max_samples=max_samples, **options)

    def batch_sharpness(self) -> float:
        """The first of tier 1: g'H_B g / ||g||^2 of a batch drawn from the probe.

        Returns:
            The batch sharpness; NaN where the gradient vanishes.
        """
        generator = torch.Generator().manual_seed(self.seed + self.steps)
        which = torch.randperm(self._network.n, generator=generator)[: self.batch_size]
        with _evaluating(self.model):
            return batch_sharpness(self._network.select(which.to(self._network.targets.device)))

    def plot(self, path: str | Path, *, losses: Sequence[tuple[int, float]] = ()) -> Path:
        """Draw the sharpness against its edge, and the learning rate against the band, over training.

        Args:
            path: Picture to write.
            losses: Losses (step, loss) to draw on top.

        Returns:
            The path.
        """
        return plot_history(self.history, path, losses=losses, sharpness=self.sharpness_history)

    def to_dict(self) -> dict[str, Any]:
        """The history as JSON-ready values.

        Returns:
            Settings and one entry per check.
        """
        return {
            "every": self.every,
            "batch_size": self.batch_size,
            "probe": self._network.n,
            "n": self.n,
            "checks": [check.to_dict() for check in self.history],
            "sharpness": [
                [step, *(value if math.isfinite(value) else None for value in values)]
                for step, *values in self.sharpness_history
            ],
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs to reach the same checks.

        Returns:
            Tensors, numbers and lists only.
        """
        return {
            "steps": self.steps,
            "history": [vars(check).copy() for check in self.history],
            "sharpness_history": list(self.sharpness_history),
            "tracker": self._tracker.state_dict(),
            "record": self._record.state_dict(),
            "sharper": [self._sharper, self._sharpened],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state.

        Args:
            state: From `state_dict` of a monitor with the same model, probe and settings.
        """
        self._tracker.load_state_dict(state["tracker"])
        self._record.load_state_dict(state["record"])
        self._sharper, self._sharpened = float(state["sharper"][0]), int(state["sharper"][1])
        self.steps = int(state["steps"])
        self.history = [Check(**entry) for entry in state["history"]]
        self.sharpness_history = [(int(step), float(a), float(b)) for step, a, b in state["sharpness_history"]]

    def _before_step(self) -> None:
        if self.every_cheap and (self.steps + 1) % self.every_cheap == 0:
            self._before = [p.detach().clone() for p in self._network.parameters.values()]

    def _after_step(self) -> None:
        self.steps += 1
        if self._before:
            start = time.perf_counter()
            self._guarded(self._measure_directions)
            self._spent += time.perf_counter() - start
        if self.steps % self.every == 0 and not self._too_expensive():
            check = self._guarded(self._checked)
            if check is not None:
                self._react(check)  # outside the guard: the caller's own function may stop the training

    def _guarded(self, measure: Callable[[], T]) -> T | None:
        """Measure; training continues in any case, and every kind of failure is reported once."""
        try:
            return measure()
        except Exception as error:
            if type(error) not in self._failures:
                self._failures.add(type(error))
                message = f"step {self.steps}: no check was possible ({type(error).__name__}: {error})"
                warnings.warn(message, MonitorWarning, stacklevel=4)
            return None

    def _measure_directions(self) -> None:
        assert self._optimizer is not None
        lr = max(float(group["lr"]) for group in self._optimizer.param_groups)
        with _evaluating(self.model):
            critical = critical_sharpness(self._network, self._before, lr)
        self._before = []
        self.sharpness_history.append((self.steps, self.batch_sharpness(), critical))

    def _too_expensive(self) -> bool:
        if self.max_overhead is None or not self.history:
            return False
        over = self._spent > self.max_overhead * (time.perf_counter() - self._started)
        return bool(self._ranks.sum(torch.tensor(float(over))) > 0)  # all ranks check, or none

    def _settled(self, found: Band, state: OptimizerState) -> float:
        if not self.settle or not found.holds(state.lr):
            return math.nan
        return float(self.exact(max_samples=self._network.n).lr_threshold(self.batch_size))

    def _react(self, check: Check) -> None:
        if check.state not in {"unstable", "diverged"}:
            return
        if callable(self.on_unstable):
            self.on_unstable(self, check)
        elif self.on_unstable == "reduce_lr" and self._optimizer is not None and check.safe_lr > 0:
            for group in self._optimizer.param_groups:
                group["lr"] = group["lr"] * min(0.9 * check.safe_lr / check.lr, 1.0)
        elif self.on_unstable is not None:
            warnings.warn(f"{check}; {check.advice}", InstabilityWarning, stacklevel=4)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    # Evaluation mode for a while; every module gets its own mode back.
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
