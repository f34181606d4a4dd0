"""Off-policy estimates on the Open Bandit Dataset (small, men's campaign): IPS, SNIPS, DM and DR with 95 % intervals.

10,000 impressions under a uniformly random policy and 10,000 under Bernoulli Thompson sampling ("bts"), with the
propensities that were logged. What a policy earns when it runs itself is known for both, so the estimates can be
judged: "uniform" from the bts log against the random log, and on the random log itself. "lirank Thompson" is the first
place of draws from a posterior of the items' click logits, fitted to the first half of the random log. The reward model
of DM and DR is the smoothed click rate per item of that half, and no estimate sees the half that it was fitted to.
There are about 50 clicks in each log, so the intervals are wide: a check of the pipeline, not a ranking of policies.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from _study import study
from core_tensor.app import figures
from core_tensor.dev.testing import shared_data
from lirank.explore.estimators import LoggedEvents, direct_method, doubly_robust, ips, snips
from lirank.explore.policies import first_place_probabilities
from lirank.explore.posterior import LogisticPosterior
from torch import Tensor

ITEMS = 34
ESTIMATORS = {"IPS": ips, "SNIPS": snips, "DM": direct_method, "DR": doubly_robust}


@dataclasses.dataclass(frozen=True)
class Rows:
    """Logged impressions: item, click and propensity, shape (n,) each."""

    item: Tensor
    click: Tensor
    propensity: Tensor

    def part(self, rows: slice) -> "Rows":
        """Some of the rows."""
        return Rows(self.item[rows], self.click[rows], self.propensity[rows])


def load(policy: str) -> Rows:
    """One of the two logs in order of time."""
    table = pd.read_csv(shared_data("open_bandit", f"{policy}_men.csv.gz"), index_col=0).sort_values("timestamp")
    columns = (table[name].to_numpy() for name in ("item_id", "click", "propensity_score"))
    item, click, propensity = (torch.from_numpy(column.copy()) for column in columns)
    return Rows(item, click.double(), propensity.double())


def estimates(rows: Rows, policy: Tensor, model: Tensor) -> dict[str, dict[str, float]]:
    """Every estimator of a policy that does not look at the user, by name; per thousand impressions."""
    events = LoggedEvents(
        reward=rows.click,
        propensity=rows.propensity,
        probability=policy[rows.item],
        model_logged=model[rows.item],
        model_policy=(policy @ model).expand(len(rows.item)),
    )
    found = {}
    for name, estimator in ESTIMATORS.items():
        estimate = estimator(events)
        found[name] = {key: 1000 * getattr(estimate, key) for key in ("value", "low", "high")} | {
            "effective_events": estimate.effective_events
        }
    return found


def on_policy(rows: Rows) -> dict[str, float]:
    """Clicks per thousand impressions of the policy that logged, with a normal interval."""
    mean = float(rows.click.mean())
    half = 1.96 * (mean * (1 - mean) / len(rows.click)) ** 0.5
    return {"value": 1000 * mean, "low": 1000 * (mean - half), "high": 1000 * (mean + half)}


def thompson(rows: Rows, draws: int) -> Tensor:
    """How often each item comes first under draws from the posterior of the items' click logits, shape (ITEMS,)."""
    features = torch.eye(ITEMS, dtype=torch.float64)
    base = float(torch.logit(rows.click.mean()))
    prior = LogisticPosterior.prior(ITEMS, 4.0, torch.full((ITEMS,), base, dtype=torch.float64))
    belief = prior.updated(features[rows.item], rows.click)
    return first_place_probabilities(belief, features, draws, torch.Generator().manual_seed(0))


def picture(table: list[dict[str, Any]], path: Path) -> None:
    """Estimates with intervals, one panel per question, and the band of what was earned where that is known."""
    plt = figures.pyplot("lirank[plot]")
    questions = list(dict.fromkeys(row["question"] for row in table))
    figure, axes = plt.subplots(
        1, len(questions), figsize=(11.0, 3.0), sharex=True, sharey=True, constrained_layout=True
    )
    for axis, question in zip(axes, questions, strict=True):
        mine = [row for row in table if row["question"] == question]
        if mine[0]["earned"] is not None:
            axis.axvspan(mine[0]["earned_low"], mine[0]["earned_high"], color="0.9")
            axis.axvline(mine[0]["earned"], color="0.5", linewidth=1)
        places = range(len(mine) - 1, -1, -1)
        middle = [row["value"] for row in mine]
        ends = [[row["value"] - row["low"] for row in mine], [row["high"] - row["value"] for row in mine]]
        axis.errorbar(middle, places, xerr=ends, fmt="o", capsize=3)
        axis.set_ylim(-0.6, len(mine) - 0.4)
        axis.set_title(question)
    told = "clicks per 1000 impressions, 95 % intervals; gray: what the policy earned when it ran itself"
    figure.supxlabel(told, fontsize="medium")
    axes[0].set_yticks(range(len(ESTIMATORS)), reversed(ESTIMATORS))
    figures.save(figure, path)


def main() -> None:
    """Estimate, and write the table."""
    options = study(__doc__)
    random, bts = load("random"), load("bts")
    half = len(random.item) // 2
    fitted, fresh = random.part(slice(half)), random.part(slice(half, None))
    shown = torch.bincount(fitted.item, minlength=ITEMS).double()
    clicks = torch.bincount(fitted.item, fitted.click, minlength=ITEMS)
    model = (clicks + 10 * fitted.click.mean()) / (shown + 10)
    uniform = torch.full((ITEMS,), 1 / ITEMS, dtype=torch.float64)
    policy = thompson(fitted, 1_000 if options.quick else 20_000)
    questions = {
        "uniform, from its own log": (fresh, uniform, on_policy(fresh)),
        "uniform, from the bts log": (bts, uniform, on_policy(random)),
        "lirank Thompson, from the random log": (fresh, policy, None),
    }
    table = []
    for question, (rows, judged, earned) in questions.items():
        truth = {f"earned{end}": earned[key] if earned else None for end, key in _ENDS.items()}
        table += [
            {"question": question, "estimator": name, **estimate, **truth}
            for name, estimate in estimates(rows, judged, model).items()
        ]
    logs = {"random": on_policy(random), "bts": on_policy(bts)}
    options.update("exploration.json", {"estimates": table, "logs": logs})
    picture(table, options.out / "exploration.png")


_ENDS = {"": "value", "_low": "low", "_high": "high"}

if __name__ == "__main__":
    main()
