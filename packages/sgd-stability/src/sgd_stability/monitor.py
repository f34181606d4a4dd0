r"""A live answer, while training, to "is this learning rate stable, and which samples decide it?".

Three tiers, by cost:

1. every `every_cheap` steps, the batch sharpness g'H_B g / ||g||^2 of one drawn batch (a gradient and a product with
   the Hessian); SGD at the edge of stability holds it at 2 / eta.
2. every `every` steps, one Gauss-Newton product on half of the probe, in turn. It moves the tracked top eigenvector by
   a power step, gives v'H_iv of every sample, and so a band for eta*: unstable above the exact threshold of the
   compressed family, stable below the bound of lambda1 and L. L comes from exact per-sample curvatures of a few
   suspects.
3. on demand, `exact()`: the full analysis of up to 512 samples.

On a probe all of these are estimates of the data set's figures. The model is switched to evaluation mode for a check,
so batch normalisation enters with its running statistics.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from core_tensor.checks import check_choice, check_number
from core_tensor.spectrum import SymmetricOperator, hessian_operator, lanczos
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sgd_stability.analysis import analyze
from sgd_stability.bounds import momentum_stability
from sgd_stability.data import Data, collect
from sgd_stability.dynamics import Update, update_threshold
from sgd_stability.family import CurvatureFamily
from sgd_stability.losses import LossValues, resolve_loss
from sgd_stability.network import Network, call, make_network, take
from sgd_stability.optimizers import OptimizerState, read_optimizer
from sgd_stability.probe import gauss_newton_probe
from sgd_stability.report import StabilityReport
from sgd_stability.sampling import Sampling, Scheme
from sgd_stability.truncated import block_curvature, scaled_curvature


class InstabilityWarning(UserWarning):
    """The learning rate is above the certified upper end of the band."""


@dataclass(frozen=True)
class Check:
    """One tier-2 check.

    Attributes:
        step: Optimizer step.
        lr: Learning rate.
        batch_size: Batch size.
        lambda1: Sharpness of the probe along the tracked eigenvector: a lower estimate.
        residual: ||H v - lambda1 v|| / lambda1 of the half just measured.
        edge: Sharpness at which full-batch training becomes unstable at this rate.
        max_sample_curvature: L over the suspects.
        lower: Every rate below is stable (estimate); 0 where no bound is known.
        upper: Every rate above is unstable (estimate).
        state: `"stable"`, `"unstable"` or `"undecided"`.
        culprits: Ids of the most curved samples, most curved first.
        safe_batch_size: Smallest batch size at which this rate is below `lower`; None if there is none.
        seconds: What the check cost.
    """

    step: int
    lr: float
    batch_size: int
    lambda1: float
    residual: float
    edge: float
    max_sample_curvature: float
    lower: float
    upper: float
    state: Literal["stable", "unstable", "undecided"]
    culprits: list[int]
    safe_batch_size: int | None
    seconds: float

    def __str__(self) -> str:
        verdict = self.state.upper() + (f" x{self.lr / self.upper:.2f}" if self.state == "unstable" else "")
        return (
            f"step {self.step} lr {self.lr:.3g} B {self.batch_size} | lambda1 {self.lambda1:.3g} (edge {self.edge:.3g})"
            f" | eta* in [{self.lower:.3g}, {self.upper:.3g}] | {verdict} | largest safe lr {self.lower:.3g}, smallest "
            f"safe B {self.safe_batch_size or '-'} | culprits {', '.join(f'#{i}' for i in self.culprits[:3])}"
        )


Reaction = Literal["warn", "reduce_lr"] | Callable[["StabilityMonitor", Check], None] | None


class StabilityMonitor:
    """Watches an optimizer; see the module's docstring for the tiers.

    Args:
        model: The model in training.
        loss: As in `analyze`; its curvature in the outputs must be positive semidefinite.
        data: Training data, as in `analyze`; the probe is drawn from it once.
        batch_size: Samples per optimizer step (over all ranks and accumulated batches); read off a `DataLoader` if
            absent.
        every: Steps between tier-2 checks.
        every_cheap: Steps between tier-1 checks; 0 switches them off.
        probe_batch: Samples in the probe.
        suspects: Samples per check whose curvature is computed exactly.
        products: Half-probe products per check; more of them track the top eigenvector more closely.
        sampling: How minibatches are drawn.
        on_unstable: `"warn"`, `"reduce_lr"` (to 0.9 of the largest safe rate), a function `(monitor, check)`, or None.
        max_overhead: Put a check off while checks have taken more than this share of the time since attaching; None
            never does.
        seed: Seed of the probe and of the start vector.

    Attributes:
        history: The checks so far.
        sharpness_history: Tier-1 measurements (step, batch sharpness).
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
        sampling: Scheme = "without_replacement",
        on_unstable: Reaction = "warn",
        max_overhead: float | None = None,
        seed: int = 0,
    ) -> None:
        check_number("every", every, low=1, integer=True)
        check_number("every_cheap", every_cheap, low=0, integer=True)
        check_number("suspects", suspects, low=1, integer=True)
        check_number("products", products, low=1, integer=True)
        if max_overhead is not None:
            check_number("max_overhead", max_overhead, low=0, open_low=True)
        if isinstance(on_unstable, str):
            check_choice("on_unstable", on_unstable, ("warn", "reduce_lr"))
        if batch_size is None and isinstance(data, DataLoader):
            batch_size = data.batch_size
        if batch_size is None:
            raise ValueError("batch_size: expected one, or a DataLoader that has one")
        self.model, self.loss, self.data, self.sampling = model, loss, data, sampling
        self.every, self.every_cheap = every, every_cheap
        self.suspects, self.products = suspects, products
        self.on_unstable, self.max_overhead, self.seed = on_unstable, max_overhead, seed
        device = next((p.device for p in model.parameters()), None)
        self._samples = collect(data, max_samples=probe_batch, seed=seed, device=device)
        self.n = self._samples.n
        self.batch_size = min(batch_size, self.n)
        Sampling(self.n, self.batch_size, sampling)
        with _evaluating(model):
            self._network = make_network(model, resolve_loss(loss), self._samples.inputs, self._samples.targets)
            if self._network.factor.signs is not None:
                raise ValueError("loss: expected one that is convex in the outputs, for a Gauss-Newton Hessian")
        self._halves = _halves(self._network)
        generator = torch.Generator().manual_seed(seed)
        first = next(iter(self._network.parameters.values()))
        self._v = torch.randn(self._network.size, generator=generator).to(first.device, first.dtype)
        self._weighted: list[Tensor | None] = [None] * len(self._halves)
        self._products: list[Tensor | None] = [None] * len(self._halves)
        self._traces = torch.zeros(self._network.n)
        self._turn = 0  # which half the next check measures first
        self.steps = 0
        self.history: list[Check] = []
        self.sharpness_history: list[tuple[int, float]] = []
        self._optimizer: torch.optim.Optimizer | None = None
        self._handle: Any = None
        self._spent, self._started = 0.0, 0.0

    def attach(self, optimizer: torch.optim.Optimizer) -> "StabilityMonitor":
        """Check after every `every`-th step of an optimizer, with its learning rate, momentum and weight decay.

        Args:
            optimizer: SGD, Adam or AdamW.

        Returns:
            This monitor.
        """
        self.detach()
        # Accelerate wraps the optimizer and steps the inner one.
        inner = getattr(optimizer, "optimizer", optimizer)
        self._optimizer = optimizer = inner if isinstance(inner, torch.optim.Optimizer) else optimizer
        self._started, self._spent = time.perf_counter(), 0.0
        self._handle = optimizer.register_step_post_hook(lambda *_: self._after_step())
        return self

    def detach(self) -> None:
        """Stop watching."""
        if self._handle is not None:
            self._handle.remove()
        self._optimizer = self._handle = None

    def check(self) -> Check:
        """Run tier 2 now.

        Returns:
            The check, also appended to `history`.

        Raises:
            RuntimeError: If the monitor is not attached.
        """
        if self._optimizer is None:
            raise RuntimeError("monitor: attach it to an optimizer first")
        start = time.perf_counter()
        state = read_optimizer(self._optimizer, self._network.parameters)
        scale = None if state.preconditioner is None else state.preconditioner.rsqrt()
        with _evaluating(self.model):
            lambda1, residual = self._track(scale)
            L, culprits = self._suspects(scale)
        found = self._judge(state, lambda1, residual, L, culprits, start)
        self.history.append(found)
        self._spent += found.seconds
        if found.state == "unstable":
            self._react(found)
        return found

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
        with _evaluating(self.model):
            return analyze(self.model, self.loss, self.data, sampling=self.sampling, max_samples=max_samples, **options)

    def batch_sharpness(self) -> float:
        """Tier 1: g'H_B g / ||g||^2 of a batch drawn from the probe.

        Returns:
            The batch sharpness; NaN where the gradient vanishes.
        """
        generator = torch.Generator().manual_seed(self.seed + self.steps)
        which = torch.randperm(self._network.n, generator=generator)[: min(self.batch_size, self._network.n)]
        inputs, targets = take(self._network.inputs, which), self._network.targets[which]
        parameters = list(self._network.parameters.values())

        def closure() -> Tensor:
            return self._network.loss.values(call(self.model, inputs), targets).mean()

        with _evaluating(self.model):
            with torch.enable_grad():
                g = torch.cat([x.reshape(-1) for x in torch.autograd.grad(closure(), parameters)])
            squared = float(g.square().sum())
            sharpness = float(torch.dot(g, hessian_operator(closure, parameters)(g))) if squared > 0 else math.nan
        return sharpness / squared if squared > 0 else math.nan

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
            "checks": [
                {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(c).items()}
                for c in self.history
            ],
            "batch_sharpness": [[step, value] for step, value in self.sharpness_history if math.isfinite(value)],
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs to go on to the same checks.

        Returns:
            Tensors, numbers and lists only.
        """
        return {
            "steps": self.steps,
            "turn": self._turn,
            "history": [asdict(c) for c in self.history],
            "sharpness_history": list(self.sharpness_history),
            "v": self._v.clone(),
            "weighted": list(self._weighted),
            "products": list(self._products),
            "traces": self._traces.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state.

        Args:
            state: From `state_dict` of a monitor with the same model, probe and settings.

        Raises:
            ValueError: If it belongs to a model of another size.
        """
        if state["v"].shape != self._v.shape:
            raise ValueError(f"state: expected {self._v.numel()} parameters, got {state['v'].numel()}")
        self.steps, self._turn = int(state["steps"]), int(state["turn"])
        self.history = [Check(**entry) for entry in state["history"]]
        self.sharpness_history = [(int(step), float(value)) for step, value in state["sharpness_history"]]
        self._v, self._traces = state["v"].to(self._v), state["traces"].clone()
        self._weighted, self._products = list(state["weighted"]), list(state["products"])

    def _after_step(self) -> None:
        self.steps += 1
        if self.every_cheap and self.steps % self.every_cheap == 0:
            start = time.perf_counter()
            self.sharpness_history.append((self.steps, self.batch_sharpness()))
            self._spent += time.perf_counter() - start
        if self.steps % self.every == 0 and not self._too_expensive():
            self.check()

    def _too_expensive(self) -> bool:
        if self.max_overhead is None or not self.history:
            return False
        return self._spent > self.max_overhead * (time.perf_counter() - self._started)

    def _track(self, scale: Tensor | None) -> tuple[float, float]:
        # Power steps on the next halves in turn; the first check finds the eigenvector by Lanczos and measures all.
        count = len(self._halves)
        first = any(w is None for w in self._weighted)
        if first:
            self._v = self._first_eigenvector(scale)
        residual = math.nan
        for turn in range(count if first else self.products):
            which = turn if first else (self._turn + turn) % count
            v = self._v / self._v.norm()
            offset, half = self._halves[which]
            probe = gauss_newton_probe(half, v, scale=scale)
            self._weighted[which], self._products[which] = probe.weighted, probe.product
            self._traces[offset : offset + half.n] = probe.output_curvature.float().cpu()
            value = float(torch.dot(v, probe.product))
            residual = float((probe.product - value * v).norm()) / max(abs(value), 1e-300)
            if not first or turn == count - 1:
                moved = torch.stack([p for p in self._products if p is not None]).mean(0)
                self._v = moved if float(moved.norm()) > 0 else v
        self._turn = (self._turn + self.products) % count
        return float(self._forms().mean()), residual

    def _first_eigenvector(self, scale: Tensor | None) -> Tensor:
        def product(v: Tensor) -> Tensor:
            parts = [gauss_newton_probe(half, v, scale=scale).product * half.n for _, half in self._halves]
            return torch.stack(parts).sum(0) / self._network.n

        operator = SymmetricOperator(product, self._network.size, self._v.dtype, self._v.device)
        return lanczos(operator, tolerance=0.05, max_steps=12, start=self._v).vectors[:, 0]

    def _forms(self) -> Tensor:
        return torch.cat([w for w in self._weighted if w is not None]).double().square().sum(1)  # v'H_i v, (n,)

    def _suspects(self, scale: Tensor | None) -> tuple[float, list[int]]:
        half = max(self.suspects // 2, 1)
        by_form = self._forms().topk(min(half, self._network.n)).indices.cpu()
        by_trace = self._traces.topk(min(self.suspects - half, self._network.n)).indices
        which = torch.cat([by_form, by_trace]).unique()
        part = Network(
            self.model,
            self._network.loss,
            take(self._network.inputs, which),
            self._network.targets[which],
            self._network.parameters,
        )
        values = block_curvature(part) if scale is None else scaled_curvature(part, scale)
        order = values.argsort(descending=True).cpu()
        return float(values.max()), [int(self._samples.ids[which[i]]) for i in order]

    def _judge(
        self, state: OptimizerState, lambda1: float, residual: float, L: float, culprits: list[int], start: float
    ) -> Check:
        sampling = Sampling(self.n, self.batch_size, self.sampling)
        weighted = torch.cat([w for w in self._weighted if w is not None])  # (n, R)
        upper = update_threshold(CurvatureFamily.from_factors(weighted.double()[:, :, None]), sampling, state.update)
        lower = min(momentum_stability(lambda1, L, sampling, state.update).lr, upper.value)
        verdict: Literal["stable", "unstable", "undecided"] = "undecided"
        if state.lr > upper.value:
            verdict = "unstable"
        elif state.lr < lower:
            verdict = "stable"
        return Check(
            step=self.steps,
            lr=state.lr,
            batch_size=self.batch_size,
            lambda1=lambda1,
            residual=residual,
            edge=state.update.edge(1.0) / state.lr if state.lr > 0 else math.inf,
            max_sample_curvature=L,
            lower=lower,
            upper=upper.value,
            state=verdict,
            culprits=culprits,
            safe_batch_size=self._safe_batch_size(lambda1, L, state.lr, state.update),
            seconds=time.perf_counter() - start,
        )

    def _safe_batch_size(self, lambda1: float, L: float, lr: float, update: Update) -> int | None:
        def safe(B: int) -> bool:
            return lr < momentum_stability(lambda1, L, Sampling(self.n, B, self.sampling), update).lr

        if not safe(self.n):
            return None
        low, high = 0, self.n
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if safe(middle) else (middle, high)
        return high

    def _react(self, found: Check) -> None:
        if self.on_unstable == "warn":
            warnings.warn(str(found), InstabilityWarning, stacklevel=4)
        elif self.on_unstable == "reduce_lr" and self._optimizer is not None:
            target = 0.9 * (found.lower or found.upper)
            for group in self._optimizer.param_groups:
                group["lr"] = group["lr"] * target / found.lr
        elif callable(self.on_unstable):
            self.on_unstable(self, found)


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


def _halves(network: Network) -> list[tuple[int, Network]]:
    if network.n < 2:
        return [(0, network)]
    middle = (network.n + 1) // 2
    return [(0, network.part(0, middle)), (middle, network.part(middle, network.n))]
