r"""A learning rate that follows the curvature: one run instead of a grid.

After every k-th step the monitor's `lower` (every rate below is stable) is measured, and the rate is set to

    eta <- min( growth * eta, share * lower ),

`lower` averaged over the checks in logarithms, since a few suspects decide it; the average falls faster than it rises,
and at once while the rate ramps up.
It starts far below the first `lower`, because the weights of the start are not those the rate is for, and grows step by
step, by `growth` in a quarter of `every` steps at most; while it does, checks come four times as often. A rate that is
too high drives the weights to where the loss is flat, and would follow the flatter curvature further up: so it does
not grow while the probe's loss does not fall, and is halved where that loss has risen. The last part of the run lets it
fall linearly to zero, whatever the curvature.
"""

import math
from typing import Any

import torch
from core_tensor.checks import check_number

from sgd_stability.monitor.monitor import StabilityMonitor
from sgd_stability.report.check import Check


class StabilityScheduler:
    """Sets an optimizer's learning rate from the curvature of a probe.

        monitor = StabilityMonitor(model, "cross_entropy", loader)
        scheduler = StabilityScheduler(optimizer, monitor, total_steps=10_000)
        for batch in loader:
            ...
            optimizer.step()
            scheduler.step()

    The optimizer's own rate does not matter, only the proportions between its groups' rates. Do not attach the monitor
    elsewhere: the scheduler asks it for checks by itself.

    Args:
        optimizer: The optimizer.
        monitor: A monitor of the same model.
        total_steps: Steps of the run.
        every: Steps between checks, once the rate has settled; a tenth of the run if absent, and at most 200.
        share: Share of `lower` that is aimed at.
        growth: Largest factor over a quarter of `every` steps.
        decay: Share of the run, at its end, over which the rate falls linearly to zero.
        first: Share of the first `lower` that the run starts at.

    Attributes:
        rates: Learning rate that every step was taken with.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        monitor: StabilityMonitor,
        *,
        total_steps: int,
        every: int | None = None,
        share: float = 0.85,
        growth: float = 1.5,
        decay: float = 0.3,
        first: float = 0.05,
    ) -> None:
        check_number("total_steps", total_steps, low=1, integer=True)
        every = max(1, min(200, total_steps // _CHECKS)) if every is None else every
        check_number("every", every, low=1, integer=True)
        check_number("share", share, low=0, open_low=True)
        check_number("growth", growth, low=1, open_low=True)
        check_number("decay", decay, low=0, high=1)
        check_number("first", first, low=0, open_low=True, high=1)
        self.optimizer, self.monitor = optimizer, monitor
        self.total_steps, self.every = total_steps, every
        self.share, self.growth, self.decay, self.first = share, growth, decay, first
        self.steps = 0
        self.rates: list[float] = []
        self._rate, self._goal = 0.0, 0.0  # before the decay at the end; where the rate is on its way to
        self._log_lower = math.nan
        self._loss = self._least = math.inf  # average of the probe's loss at the last check, and its least value
        self._next = 0
        largest = max(float(group["lr"]) for group in optimizer.param_groups)
        if not largest > 0:
            raise ValueError("optimizer: expected a group with a positive learning rate, for their proportions")
        self._shares = [float(group["lr"]) / largest for group in optimizer.param_groups]
        monitor._watch(optimizer, hooks=monitor.every_cheap > 0)
        monitor.every = total_steps + 1  # the scheduler asks
        monitor._rough = True  # of the first check no more than a twentieth is used
        self._adaptive = type(monitor._optimizer) is not torch.optim.SGD  # inside any wrapper
        if self._adaptive:
            self._set(0.0)  # the first steps measure second moments only
            self._next = _MOMENTS
        else:
            self._check()

    def step(self) -> None:
        """Set the rate of the next step; call it after `optimizer.step()`."""
        self.rates.append(self.get_last_lr()[0])
        self.steps += 1
        self.monitor.steps = self.steps
        if self.steps >= self._next and self.steps < self._end:
            self._check()
        self._rate = min(self._goal, self._rate * self.growth ** (1 / self._ramping))
        self._set(self._rate * self._decayed())

    def get_last_lr(self) -> list[float]:
        """The rates in use.

        Returns:
            One per parameter group.
        """
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    @property
    def rate(self) -> float:
        """The rate that the curvature allows now, before the decay at the end."""
        return self._rate

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs, the monitor's state included.

        Returns:
            Tensors, numbers and lists only.
        """
        own = {name: getattr(self, name) for name in _STATE}
        return {**own, "rates": list(self.rates), "monitor": self.monitor.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state.

        Args:
            state: From `state_dict` of a scheduler with the same settings.
        """
        self.monitor.load_state_dict(state["monitor"])
        for name in _STATE:
            setattr(self, name, type(getattr(self, name))(state[name]))
        self.rates = [float(rate) for rate in state["rates"]]
        self._set(self._rate * self._decayed())

    @property
    def _end(self) -> float:
        """First step of the decay."""
        return self.total_steps * (1 - self.decay)

    def _decayed(self) -> float:
        left = (self.total_steps - self.steps) / max(self.total_steps - self._end, 1.0)
        return max(0.0, min(1.0, left))

    def _check(self) -> None:
        """A check, and the rate that follows from it."""
        check = self.monitor._guarded(self.monitor._checked)
        self._next = self.steps + self._spacing()
        if check is None:
            return  # the monitor has said why; the rate stays
        self._follow(check)
        self.monitor._react(check)

    def _follow(self, check: Check) -> None:
        if check.state == "diverged":
            self._rate = self._goal = self._rate / 4  # nothing is known of the curvature; ramp up again from here
            return
        if not 0 < check.lower < math.inf:
            return
        newest = math.log(check.lower)
        if math.isnan(self._log_lower):
            self._log_lower = newest
        # what the first weights allowed says little of the next ones
        falling = 1.0 if self._ramps else _FALLING
        weight = falling if newest < self._log_lower else _RISING
        self._log_lower += weight * (newest - self._log_lower)
        self._goal = self.share * math.exp(self._log_lower)
        if self._rate == 0.0:
            self._rate = self.first * self._goal
        # a rate that is too high flattens the loss, and would follow the flatter curvature further up
        elif check.loss > self._loss:
            self._goal = min(self._goal, self._rate)
        if check.average_loss > _RISEN * self._least:
            self._goal = min(self._goal, self._rate / 2)
            self._least = check.average_loss  # halved again only after another rise
        self._loss, self._least = check.average_loss, min(self._least, check.average_loss)

    @property
    def _ramping(self) -> int:
        """Steps between two checks while the rate still grows."""
        return max(1, self.every // 4)

    @property
    def _ramps(self) -> bool:
        """Whether the rate is still on its way up."""
        return self._rate < 0.7 * self._goal

    def _spacing(self) -> int:
        """Steps to the next check: closer together while the rate ramps up, but not before it has grown a little."""
        if math.isnan(self._log_lower):
            return _FIRST * self._ramping
        return self._ramping if self._ramps else self.every

    def _set(self, rate: float) -> None:
        for group, share in zip(self.optimizer.param_groups, self._shares, strict=True):
            group["lr"] = rate * share


_STATE = ("steps", "_rate", "_goal", "_log_lower", "_loss", "_least", "_next")
_MOMENTS = 10
"""Steps at rate zero after which an adaptive optimizer's second moments are worth a look."""
_RISING, _FALLING = 0.3, 0.7
"""Weight of the newest check in the average."""
_FIRST = 3
"""Quarters of `every` between the first check and the second."""
_RISEN = 1.15
"""Factor over its least average at which the loss has risen."""
_CHECKS = 10
"""Checks of a run after the rate has settled, if it lasts long enough."""
