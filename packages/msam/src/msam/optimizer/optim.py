"""`MSAM`: any torch optimizer, fed with mSAM's gradient."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from core_tensor.modules import unwrap
from torch import Tensor, nn
from torch.optim import Optimizer

from msam.engines.byhand import ByHand
from msam.engines.choice import Engines
from msam.engines.sequential import LossFunction
from msam.optimizer.telemetry import Check, Explanation, check, explain
from msam.step.batches import batch_size, cut
from msam.step.checks import check_closure_loss, check_finite_loss
from msam.step.groups import Own, make_base, take_own
from msam.step.options import Options, Rho
from msam.step.passes import is_sharded, norm_parameters, world_size
from msam.step.perturbation import Tracked
from msam.step.record import StepRecord

_MISSING: Any = object()


class MSAM(Optimizer):
    r"""Micro-batch-averaged sharpness-aware minimization around any base optimizer.

    The base optimizer is fed with $\sum_j \frac{n_j}{n} \nabla L_{S_j}(w + \rho\, g_j / \|g_j\|)$ over the disjoint
    micro-batches S_j of a batch; one micro-batch is SAM. `state_dict()` is the base optimizer's own (surrogates,
    `every` and schedules add the key `"msam"`), schedulers and GradScalers take this object as they take any optimizer.

        opt = MSAM(model, torch.optim.AdamW, lr=1e-3, rho=0.05, num_micro_batches=8)
        loss = opt.step(lambda batch: F.cross_entropy(model(batch[0]), batch[1]), (x, y))

    Not Momentum-SAM (arXiv 2401.12033), a different method that other packages list as MSAM.

    Args:
        model: The model that the loss function calls; DDP and FSDP2 models as wrapped.
        optimizer: Base optimizer: a class (or function) called as `optimizer(params, **base)`, an instance, or a list
            of instances over disjoint parameters, such as Muon for matrices and AdamW for the rest.
        params: Parameters or parameter groups; all of the model's if None. A group may hold `perturb=False` (it is
            trained, not perturbed) and `rho` (its own radius).
        rho: See `Options`, as are all options below.
        num_micro_batches: Micro-batches per batch and process.
        micro_batch_size: Examples per micro-batch (exactly one of the two).
        mode: `"auto"`, `"ghost"`, `"sequential"` or `"vmap"`.
        ascent: `"full"`, `"half"`, `"norm"` or `"chained"`.
        adaptive: ASAM's scaling.
        every: Perturb on each `every`-th step only.
        bn: Which pass moves running statistics.
        rng: Whether both passes draw the same dropout masks.
        clip_norm: Largest norm of the averaged gradient.
        shard_weight: Weight of a micro-batch.
        reduction: Whether the loss function returns the mean or the sum over its examples.
        check_finite: Whether a NaN loss raises.
        base: Arguments of the base optimizer, such as `lr`.

    Raises:
        ValueError: If an option is out of range, a sharded (FSDP2) model is to be perturbed in weight space, or the
            base optimizer's step needs a closure (LBFGS).
        TypeError: If `model` is no module or `optimizer` makes no optimizer.

    Source: arXiv 2302.09693 and 2212.04343.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[..., Optimizer] | Optimizer | Sequence[Optimizer],
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | None = None,
        *,
        rho: Rho = 0.05,
        num_micro_batches: int | None = None,
        micro_batch_size: int | None = None,
        mode: Literal["auto", "ghost", "sequential", "vmap"] = "auto",
        ascent: Literal["full", "half", "norm", "chained"] = "full",
        adaptive: bool | Literal["element", "filter", "layer"] = False,
        every: int = 1,
        bn: Literal["first", "both", "frozen"] = "first",
        rng: Literal["same", "independent"] = "same",
        clip_norm: float | None = None,
        shard_weight: Callable[[Any], float] | None = None,
        reduction: Literal["mean", "sum"] = "mean",
        check_finite: bool = True,
        **base: Any,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        self.options = Options(
            rho=rho,
            num_micro_batches=num_micro_batches,
            micro_batch_size=micro_batch_size,
            mode=mode,
            ascent=ascent,
            adaptive=adaptive,
            every=every,
            bn=bn,
            rng=rng,
            clip_norm=clip_norm,
            shard_weight=shard_weight,
            reduction=reduction,
            check_finite=check_finite,
        )
        self.model = unwrap(model, parallel=False)
        self.base, self._own = make_base(model, optimizer, params, base)
        super().__init__(self.base.param_groups, self.base.defaults)
        self._alias()
        self.engines = Engines(self.model, self.options, self.trainable())
        self.record: StepRecord | None = None
        self._steps = 0
        self._ready = False  # a gradient waits for step()
        self._by_hand = ByHand(self.model, self.options)
        if ascent == "norm" and not self.tracked(0.0).parameters:
            raise ValueError("ascent: 'norm' expects a model with trainable normalization layers, got none")

    # -- set-up -----------------------------------------------------------------------------------------------------

    def _alias(self) -> None:
        self.param_groups = self.base.param_groups
        self.state = self.base.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, which may hold `perturb` and `rho`.

        Args:
            param_group: As in any torch optimizer.
        """
        if not hasattr(self, "engines"):  # torch's constructor: the base holds the groups already
            super().add_param_group(param_group)
            return
        self._own.append(take_own(param_group))
        self.base.add_param_group(param_group)
        self._alias()
        self.engines = Engines(self.model, self.options, self.trainable())

    def follow(self, model: nn.Module) -> None:
        """Work on the same model in another wrapper, such as DDP, which some frameworks put on after the optimizer.

        Args:
            model: The model that the loss function calls from now on, with the same parameters.
        """
        model = unwrap(model, parallel=False)
        if model is self.model:
            return
        engines = Engines(model, self.options, self.trainable())
        engines.chain.links = self.engines.chain.links
        self.model, self.engines, self._by_hand = model, engines, ByHand(model, self.options)

    def trainable(self) -> list[Tensor]:
        """The parameters that get gradients; freezing and unfreezing between steps is allowed.

        Returns:
            Those of all groups, in order.
        """
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    def tracked(self, rho: float) -> Tracked:
        """The parameters that are perturbed, with the radius of each one's group.

        Args:
            rho: Radius of groups that set none.

        Returns:
            Parameters, radii and scaling.
        """
        norms = norm_parameters(self.model) if self.options.ascent == "norm" else None
        parameters: list[Tensor] = []
        radii: list[float] = []
        for group, own in zip(self.param_groups, self._own, strict=True):
            if own.perturb:
                found = [p for p in group["params"] if p.requires_grad and (norms is None or id(p) in norms)]
                parameters += found
                radii += [rho if own.rho is None else own.rho] * len(found)
        return Tracked(tuple(parameters), tuple(radii), self.options.scaling)

    @property
    def perturbs(self) -> bool:
        """Whether the next step perturbs, or is one of the plain ones between that `every` asks for."""
        return self._steps % self.options.every == 0

    def reach(self, micro_batches: int) -> Tracked:
        """What the next perturbed step moves, and how far: `tracked` at the radius that the schedule has arrived at.

        Args:
            micro_batches: Micro-batches of one process, which `rho="auto"` depends on.

        Returns:
            Parameters, radii and scaling.

        Raises:
            ValueError: If nothing can be perturbed.
        """
        tracked = self.tracked(self.options.radius(self._steps, micro_batches * world_size(self.model)))
        if not tracked.parameters:
            raise ValueError("params: expected a trainable parameter in a group with perturb=True, got none")
        return tracked

    # -- one call per batch ---

    def step(self, closure: Any = None, batch: Any = _MISSING, *, scaler: Any = None) -> Any:
        """Update the weights: from a loss function and a batch, from a standard closure, or from gradients at hand.

        `step(loss_fn, batch)` does everything: zero the gradients, both passes over every micro-batch, clip, update.
        `step(closure)` takes torch's closure (zero_grad, backward, return the loss) and calls it twice: SAM, so it
        goes with one micro-batch. `step()` applies what `backward` or `ascent`/`descent` have gathered.

        Args:
            closure: `loss_fn(batch)` giving a mean loss, or a closure without arguments, or None.
            batch: Tensor or tree of tensors, examples first, for `loss_fn`.
            scaler: `torch.amp.GradScaler`; the gradients are unscaled once and its `step` decides about the update
                (`scaler.update()` stays with the caller).

        Returns:
            The mean loss at the weights before the update, scalar tensor; None from `step()`.

        Raises:
            ValueError: If there is neither a closure nor a gathered gradient, the loss is unusable, a gradient by hand
                is not finite, or a closure meets an `ascent` that needs to see the batch.
        """
        if closure is None:
            if not self._ready:
                raise ValueError(
                    "closure: expected step(loss_fn, batch) or step(closure), or backward()/descent() before step(), "
                    "got neither"
                )
            self._update()
            return None
        if batch is _MISSING:
            return self._update(closure) if self._ready else self._closure_step(closure)
        for group in self.param_groups:  # `zero_grad` without its profiler range, which costs as much as a small layer
            for p in group["params"]:
                p.grad = None
        self._restart()
        loss = self.backward(closure, batch, scaler=scaler)
        self._finish(scaler)
        return loss

    def backward(self, loss_fn: LossFunction, batch: Any, *, weight: float = 1.0, scaler: Any = None) -> Tensor:
        """Add the mSAM gradient of a batch to `.grad`; call it several times for gradient accumulation.

        Args:
            loss_fn: Mean loss of a (micro-)batch.
            batch: Tensor or tree of tensors, examples first.
            weight: Factor of this batch's gradient, such as its share of the examples of one update.
            scaler: `torch.amp.GradScaler` whose scale multiplies the losses.

        Returns:
            The mean loss at the weights, scalar tensor.

        Raises:
            ValueError: If the batch cannot be cut as asked, or the loss is unusable.
        """
        shards = cut(batch_size(batch), self.options.num_micro_batches, self.options.micro_batch_size)
        scale = scaler.scale if scaler is not None and scaler.is_enabled() else None
        if self.perturbs:
            self.record = self.engines.perturbed(
                loss_fn, batch, shards, self.reach(shards.count), self.trainable, scale=scale, weight=weight
            )
        else:
            self.record = self.engines.plain(loss_fn, batch, shards, self.trainable, scale=scale, weight=weight)
        self._ready = True
        if self.options.check_finite and scale is None:
            check_finite_loss(self.record.perturbed_loss)
        return self.record.loss

    def _finish(self, scaler: Any) -> None:
        if scaler is not None:
            scaler.unscale_(self)
        if self.options.clip_norm is not None:
            parameters = [p for group in self.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.options.clip_norm)
        if scaler is not None:
            scaler.step(self)
        else:
            self._update()

    def _update(self, closure: Callable[[], Any] | None = None) -> Any:
        """Apply the gathered gradient; a closure then only reports, as Lightning's does in manual optimization.

        Returns:
            What the closure returned.
        """
        value = None if closure is None else closure()
        self._by_hand.check(self.trainable)
        self.base.step()
        self._steps += 1
        self._restart()
        return value

    def _restart(self) -> None:
        self._ready = False
        self._by_hand.restart()

    def _closure_step(self, closure: Callable[[], Any]) -> Tensor:
        if self.options.num_micro_batches != 1:
            raise ValueError(
                "closure: a closure without a batch cannot be cut into micro-batches; use step(loss_fn, batch), or "
                f"num_micro_batches=1 (SAM), got {self.options.num_micro_batches}"
            )
        with torch.enable_grad():
            first = None
            if self.perturbs:
                with self.ascent():
                    first = check_closure_loss(closure(), self.options.check_finite)
            with self.descent():
                loss = check_closure_loss(closure(), self.options.check_finite)
        first = loss if first is None else first
        self.record = replace(self._by_hand.record, loss=first, perturbed_loss=loss)
        self._finish(None)
        return first

    # -- the two passes by hand ---

    def ascent(self) -> AbstractContextManager[None]:
        """Pass 1 of one micro-batch: run forward and `loss.backward()` inside; the gradient gives the perturbation.

        With `every` a loop asks `perturbs`: a plain step has no pass 1, and only the `descent()` of each micro-batch.
        A gradient that is not finite makes `.grad` infinite: a GradScaler then skips the update, `step()` raises.

        Returns:
            A context, which raises ValueError if the block left no gradient.

        Raises:
            ValueError: If the step is a plain one, `ascent="half"` or `"chained"` needs to see the batch, or a sharded
                model has no weights to perturb.
        """
        if not self.perturbs:
            raise ValueError(
                f"ascent: every={self.options.every} makes this a plain step, which has no pass 1; enter ascent() only "
                "if `perturbs`, and descent() always"
            )
        if is_sharded(self.model):
            raise ValueError(
                "ascent: a model sharded by FSDP2 has no whole weights to perturb; use step(loss_fn, batch)"
            )
        return self._by_hand.ascent(self.reach(self.options.num_micro_batches or 1), self.trainable())

    @contextmanager
    def descent(self, weight: float = 1.0) -> Iterator[None]:
        """Pass 2 of the same micro-batch, at the perturbed weights: run forward and `loss.backward()` inside.

        `.grad` is the weighted mean over the micro-batches so far at any time; the weights are put back at the end.
        In a plain step (see `perturbs`) it is the only pass, at the weights themselves. `record` then holds what is
        known of the micro-batches so far: their ascent norms and perturbations, not the losses.

        Args:
            weight: Weight of this micro-batch in the mean, such as its number of examples.

        Yields:
            Nothing.
        """
        with self._by_hand.descent(self.trainable(), weight, self.perturbs):
            yield
        self._ready, self.record = True, self._by_hand.record

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and with them what `ascent`/`descent` and `backward` have gathered.

        Args:
            set_to_none: As in torch.
        """
        super().zero_grad(set_to_none)
        self._restart()

    # -- state ---

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state; stateful options add the key `"msam"`.

        Returns:
            State that `load_state_dict` takes.
        """
        state = self.base.state_dict()
        if self.options.stateful:
            state["msam"] = {"steps": self._steps, "chain": self.engines.chain.state()}
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state, also one of the bare base optimizer.

        Args:
            state_dict: What `state_dict` returned.

        Raises:
            ValueError: If a stateful option finds no `"msam"` key.
        """
        state = dict(state_dict)
        own = state.pop("msam", None)
        if self.options.stateful and own is None:
            raise ValueError(
                "state_dict: expected the key 'msam' (every, schedules and chained ascent need it), got none"
            )
        self.base.load_state_dict(state)
        self._alias()
        if own is not None:
            self._steps = int(own["steps"])
            self.engines.chain.load(own["chain"], self.tracked(0.0).parameters)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copying and pickling take the model along, which both passes need; copy a model and its optimizer together.

        What one step keeps is left behind: gradients that wait for `step()`, and the record.

        Returns:
            A function and its arguments, as in Python's copy protocol.
        """
        kept = (self.engines.chain.state(), self.engines.winners)
        parts = (self.model, self.base, self.options, self._own, self._steps, *kept)
        return _remade, (type(self), *parts)

    # -- looking inside ---

    def explain(self, loss_fn: LossFunction, batch: Any) -> Explanation:
        """See `msam.optimizer.telemetry.explain`; nothing changes: weights, gradients, statistics, generators.

        Args:
            loss_fn: Mean loss of a (micro-)batch.
            batch: Tree of tensors, examples first.

        Returns:
            Figures of every micro-batch.
        """
        return explain(self, loss_fn, batch)

    def check(self, loss_fn: LossFunction, batch: Any) -> Check:
        """See `msam.optimizer.telemetry.check`: a dry run that proves that the perturbation happens.

        Args:
            loss_fn: Mean loss of a (micro-)batch.
            batch: Tree of tensors, examples first.

        Returns:
            The figures it compared.
        """
        return check(self, loss_fn, batch)


def _remade(
    kind: type[MSAM], model: nn.Module, base: Optimizer, options: Options, own: list[Own], steps: int, chain: Any,
    winners: Any,
) -> MSAM:  # fmt: skip
    """Put an `MSAM` together from copies of another one's parts, which share their parameters.

    Returns:
        The copy.
    """
    for group, mine in zip(base.param_groups, own, strict=True):
        group |= mine._asdict()
    made = kind(model, base, **vars(options))
    made._steps, made.engines.winners = steps, winners
    made.engines.chain.load(chain, made.tracked(0.0).parameters)
    return made


def msam_step(optimizer: MSAM, loss_fn: LossFunction, batch: Any) -> Tensor:
    """`optimizer.step(loss_fn, batch)` as a function.

    Args:
        optimizer: An `MSAM`.
        loss_fn: Mean loss of a (micro-)batch.
        batch: Tree of tensors, examples first.

    Returns:
        The mean loss at the weights before the update.
    """
    return cast(Tensor, optimizer.step(loss_fn, batch))
