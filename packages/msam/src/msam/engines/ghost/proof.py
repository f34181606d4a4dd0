"""Proof, by measurement, that ghost mode follows a model exactly; run once per path through the model."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from msam.engines.ghost.capture import capture
from msam.engines.ghost.directions import Plan
from msam.engines.ghost.errors import NotFiniteError, UnsupportedError
from msam.engines.ghost.layout import Layout
from msam.engines.ghost.table import Table
from msam.engines.ghost.tape import Call, Path, Tape
from msam.engines.ghost.uses.rules import RULES
from msam.engines.sequential import shard_shares
from msam.step.batches import Shards, tree_map
from msam.step.checks import check_loss
from msam.step.options import Options
from msam.step.passes import is_sharded, kept_statistics, norm_layers, unsynchronised
from msam.step.perturbation import Tracked

LossFunction = Callable[[Any], Tensor]

TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
"""Largest relative difference that rounding explains; a wrong layout or a missed use shows as one of order 1."""

_HOOKS = "activation checkpointing or offloading runs parts of the model again, out of sight"


class Deterministic(TorchFunctionMode):
    """Switches dropout off and replaces random draws by constants, so that passes can be compared.

    Attributes:
        compiled: Whether a call came from code of `torch.compile`, which the proof runs uncompiled.
    """

    def __init__(self) -> None:
        super().__init__()
        self.compiled = False

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.compiled = self.compiled or _called_by_compiled_code()
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is F.multi_head_attention_forward:
            kwargs["training"] = False
        if func is F.scaled_dot_product_attention:
            args, kwargs = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args, kwargs
            if "dropout_p" in kwargs:
                kwargs["dropout_p"] = 0.0
        if name in {"bernoulli_", "bernoulli"}:
            return args[0].fill_(1) if name == "bernoulli_" else torch.ones_like(args[0])
        result = func(*args, **kwargs)
        return torch.full_like(result, 0.5) if func in {torch.rand, torch.rand_like} else result


def _called_by_compiled_code() -> bool:
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not prove.__code__:
        if frame.f_code.co_name == "compile_wrapper" and frame.f_globals.get("__name__") == "torch._dynamo.eval_frame":
            return True
        frame = frame.f_back
    return False


_DROPOUTS = {
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout,
}  # fmt: skip


def prove(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: Any,
    shards: Shards,
    tracked: Tracked,
    table: Table,
    options: Options,
    finite: bool,
) -> Path:
    """Find the layout of every use, and check both passes' loss and gradients against micro-batches that run alone.

    Args:
        model: The model; its statistics and wrappers are left as they are.
        loss_fn: Mean loss of a (micro-)batch.
        batch: Tree of tensors, examples first.
        shards: How it is cut.
        tracked: What is perturbed.
        table: Finds tracked parameters.
        options: Whose `shard_weight` weighs micro-batches.
        finite: Whether a NaN loss raises.

    Returns:
        The path. Calls without gradient (below a head that starts at zero, say) are told apart by their results, and
        noted as silent: the first gradient that they get asks for another proof.

    Raises:
        UnsupportedError: If ghost mode would not give the gradient of sequential mode.
    """
    with (
        kept_statistics(norm_layers(model)),
        unsynchronised(model),
        torch.compiler.set_stance("force_eager"),
        Deterministic() as deterministic,
    ):
        calls, silent, unsure = _place(loss_fn, batch, shards, table, finite)
        masked = True  # for the proof itself; what it met is noted below
        path = Path(calls, silent, unsure, masked, deterministic.compiled)
        plain, equal = Tracked(tracked.parameters, tracked.radii), options.shard_weight is None
        with _replicas():
            plan, loss = capture(loss_fn, batch, shards, plain, table, [path], equal=equal)
        sharded = any(is_sharded(m) for m in model.modules())
        collected = None if sharded else plan.collected()
        _compare(loss_fn, batch, shards, options, loss, plan, sharded=sharded)
        second = Tape(table, shards, "apply", RULES, [path], plan, equal=equal)
        _compare_second(loss_fn, batch, second, loss, collected)
    return replace(path, masked=second.masked)


def _place(
    loss_fn: LossFunction, batch: Any, shards: Shards, table: Table, finite: bool
) -> tuple[list[tuple[Call, Layout]], frozenset[int], frozenset[int]]:
    """Find the layout of every call.

    Returns:
        The calls with their layouts, those without gradient, and those that several layouts fit.

    Raises:
        UnsupportedError: If a call fits none, or the batch in another order makes other calls.
    """
    seen = _probe(loss_fn, batch, shards, table, finite)
    silent = frozenset(i for i, use in enumerate(seen) if use.silent)
    if shards.count == 1:
        return [(use.call, Layout()) for use in seen], silent, frozenset()
    seen = [use.slim(shards.total) for use in seen]
    again = _probe(loss_fn, tree_map(lambda t: t.roll(1, 0) if t.ndim else t, batch), shards, table, finite)
    if [use.call for use in again] != [use.call for use in seen]:
        raise UnsupportedError("the model's path depends on the order of the examples")
    found = [find_layout(use, rolled, shards.total) for use, rolled in zip(seen, again, strict=True)]
    calls = [(use.call, layout) for use, (layout, _) in zip(seen, found, strict=True)]
    return calls, silent, frozenset(i for i, (_, sure) in enumerate(found) if not sure)


@dataclass(frozen=True)
class Seen:
    """What a probe sees of one call.

    Attributes:
        call: The call.
        gradient: The loss's gradient at its result, or None.
        result: Its result, or None where the gradient tells enough.
    """

    call: Call
    gradient: Tensor | None
    result: Tensor | None

    @property
    def silent(self) -> bool:
        """Whether nothing but zeros came back."""
        return self.gradient is None or not bool(self.gradient.any())

    def slim(self, examples: int) -> Seen:
        """Without the result if the gradient alone tells which dimension counts examples: any rolling changes it.

        Args:
            examples: Number B of examples.

        Returns:
            The same, or a copy without the result.
        """
        g = self.gradient
        if g is None or self.silent:
            return self
        same = any(torch.equal(g, g.roll(g.shape[d] // examples, d)) for d in _dimensions(g, examples))
        return self if same else replace(self, result=None)


def _dimensions(x: Tensor, examples: int) -> list[int]:
    """Dimensions that may count examples; the last one holds features, if there is another.

    Returns:
        Their positions.
    """
    return [d for d in range(max(x.ndim - 1, 1)) if x.ndim and x.shape[d] % examples == 0]


def _probe(loss_fn: LossFunction, batch: Any, shards: Shards, table: Table, finite: bool) -> list[Seen]:
    tape = Tape(table, shards, "probe", RULES)
    try:
        with tape, disable_saved_tensors_hooks(_HOOKS):
            loss = check_loss(loss_fn(batch), finite)
    except RuntimeError as error:
        raise (UnsupportedError(_HOOKS) if _HOOKS in str(error) else error) from error
    if not tape.uses:
        raise UnsupportedError("the loss uses no perturbed parameter that ghost mode can see")
    targets: Any = [use.target for use in tape.uses]
    gradients = torch.autograd.grad(loss, targets, allow_unused=True)
    if not all(bool(t.isfinite().all()) for t in (loss.detach(), *gradients) if t is not None):
        raise NotFiniteError("a loss or a gradient is not finite, which proves nothing")
    return list(map(Seen, tape.calls, gradients, tape.results))


def find_layout(use: Seen, rolled: Seen, examples: int) -> tuple[Layout, bool]:
    """The dimension along which rolling the batch by one example rolls a call's gradient, and its result.

    Args:
        use: The call for the batch.
        rolled: The call for the batch rolled by one example.
        examples: Number B of examples.

    Returns:
        The layout, the first dimension for a call that no example influences; and whether no other one would do.

    Raises:
        UnsupportedError: If no dimension fits: the model mixes examples.
    """
    errors: dict[Layout, float] = {}  # over what rounding explains
    shape: tuple[int, ...] = ()
    for x, y in ((use.gradient, rolled.gradient), (use.result, rolled.result)):
        if x is None or y is None or not x.any():
            continue
        shape, allowed = tuple(x.shape), max(TOLERANCES.get(x.dtype, 0.0), 1e-6) * float(torch.linalg.vector_norm(x))
        moved = {Layout(d): x.roll(x.shape[d] // examples, d) for d in _dimensions(x, examples)}
        for layout, expected in (moved | {Layout(0, shared=True): x}).items():
            error = float(torch.linalg.vector_norm(y - expected)) / allowed
            errors[layout] = max(errors.get(layout, 0.0), error)
    best = min(errors, key=lambda layout: errors[layout], default=Layout())
    if not errors.get(best, 0.0) < 1:
        raise UnsupportedError(f"a layer's gradients of shape {shape} do not follow the examples' order")
    return best, sum(error < 1 for error in errors.values()) < 2


def _compare(
    loss_fn: LossFunction, batch: Any, shards: Shards, options: Options, whole: Tensor, plan: Plan, *, sharded: bool
) -> None:
    """Compare the loss, every parameter's recorded gradient and the norms with micro-batches that run alone.

    The recorded gradients are those of the whole loss, so a micro-batch's carries its share as a factor. Under FSDP2
    whole gradients do not exist, and only the loss is compared.

    Raises:
        UnsupportedError: If they differ by more than rounding.
    """
    parameters = plan.tracked.parameters
    tolerance = _tolerance(plan, whole)
    parts = shards.parts(batch)
    total, norms, reached = 0.0, [], set[int]()
    for j, (part, share) in enumerate(zip(parts, shard_shares(parts, shards, options), strict=True)):
        loss = check_loss(loss_fn(part), finite=False)
        total += share * float(loss.detach())
        if not sharded:
            gradients = torch.autograd.grad(loss, list(parameters), allow_unused=True)
            norms.append(_compare_gradients(plan, j, share, gradients, tolerance))
            reached |= {i for i, g in enumerate(gradients) if g is not None}
    if not abs(total - float(whole)) <= tolerance * (1 + abs(float(whole))):
        raise UnsupportedError(
            f"the loss of the batch ({float(whole):.6g}) is not the weighted mean over its micro-batches "
            f"({total:.6g}); give shard_weight (such as the number of valid tokens) if the loss is masked"
        )
    hidden = reached - plan.indices()
    if hidden:
        raise UnsupportedError(f"parameter {min(hidden)} has a gradient, but is used out of sight")
    plan.finish(reach=0.0)
    if sharded:
        return
    slack, rtol = tolerance * max(norms), max(tolerance, 1e-6)
    if not all(abs(got - norm) <= slack + rtol * norm for got, norm in zip(plan.norms, norms, strict=True)):
        raise UnsupportedError(f"the micro-batches' gradients have norms {norms}, but {plan.norms} as measured")


def _compare_second(loss_fn: LossFunction, batch: Any, tape: Tape, whole: Tensor, collected: Plan | None) -> None:
    """Compare pass 2, at radii of zero, with the loss and the gradient at the weights themselves.

    The gradient is put together from what pass 1 recorded, which has been compared by then, parameter by parameter: a
    second whole gradient would cost as much memory as the model.

    Raises:
        UnsupportedError: If they differ by more than rounding, or the pass cannot run.
    """
    plan = tape.plan
    assert plan is not None
    with _replicas():
        with tape:
            loss = check_loss(loss_fn(batch), finite=False)
        tape.finish()
    off, error, tolerance = abs(float(loss.detach()) - float(whole)), 0.0, _tolerance(plan, whole)
    if collected is not None:
        gradients = torch.autograd.grad(loss, list(plan.tracked.parameters), allow_unused=True)
        error = math.hypot(*(_off(collected, i, g) for i, g in enumerate(gradients)))
    size = sum(plan.norms)  # the micro-batches' gradients may cancel in the mean, their rounding does not
    if not (off <= tolerance * (1 + abs(float(whole))) and error <= tolerance * size):
        raise UnsupportedError(
            f"with its own weights for every micro-batch the model's loss is off by {off:.6g}, and its gradient by "
            f"{error:.6g} of {size:.6g}"
        )


def _off(collected: Plan, index: int, gradient: Tensor | None) -> float:
    total = torch.zeros_like(collected.tracked.parameters[index]) if gradient is None else -gradient
    for shard in range(collected.shards.count):
        total += collected.gradient(index, shard)
    return float(torch.linalg.vector_norm(total))


@contextmanager
def _replicas() -> Iterator[None]:
    """What a model raises when its parameters come once for every micro-batch makes it unsupported.

    Yields:
        Nothing.

    Raises:
        UnsupportedError: In place of those errors.
    """
    try:
        yield
    except UnsupportedError:
        raise
    except (RuntimeError, IndexError) as error:
        raise UnsupportedError(f"the model cannot run with one replica per micro-batch: {error}") from error


def _tolerance(plan: Plan, loss: Tensor) -> float:
    return max(TOLERANCES.get(dtype, 2e-3) for dtype in plan.dtypes() | {loss.dtype})


def _norm(tensors: Iterable[Tensor | None]) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(t)) for t in tensors if t is not None))


def _compare_gradients(
    plan: Plan, shard: int, share: float, gradients: Sequence[Tensor | None], tolerance: float
) -> float:
    """Compare one micro-batch's gradients with what was recorded of them.

    Returns:
        The norm over all parameters.

    Raises:
        UnsupportedError: If a parameter's gradient differs by more than rounding.
    """
    norm = share * _norm(gradients)
    for i, (p, gradient) in enumerate(zip(plan.tracked.parameters, gradients, strict=True)):
        off, size = plan.gradient(i, shard), 0.0
        if gradient is not None:
            off, size = off.sub_(gradient, alpha=share), share * float(torch.linalg.vector_norm(gradient))
        error = float(torch.linalg.vector_norm(off))
        # Rounding is relative to the whole gradient: a bias before a batch norm has a zero gradient, but for rounding.
        if not error <= tolerance * (size + norm / len(gradients) ** 0.5):
            raise UnsupportedError(
                f"the gradient of parameter {i} of shape {tuple(p.shape)} is off by {error:.6g} of {size:.6g} as "
                f"recorded in micro-batch {shard}: part of the model runs out of sight, or the loss is no weighted "
                "mean over micro-batches; give shard_weight (such as the number of valid tokens) if the loss is masked"
            )
    return norm
