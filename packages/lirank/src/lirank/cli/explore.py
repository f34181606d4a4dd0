"""`lirank explore`: the belief about a run's last layer, and what a policy would have earned on a log."""

from pathlib import Path
from typing import Any

import click
from core_tensor.app.cli import CommandGroup, emit, json_option, out_option, seed_option, table, threads_option

from lirank.cli.options import logs_argument, run_argument


@click.group(cls=CommandGroup)
def explore() -> None:
    """Explore on the last layer of a run, and judge policies on logged propensities."""


@explore.command()
@run_argument
@click.argument("logs", type=click.Path(exists=True, path_type=Path), required=False)
@out_option("File for the posterior (safetensors).", required=True)
@click.option("--label", default="", show_default=False, help="Label to explore. [default: the first]")
@click.option("--precision", type=click.FloatRange(0, min_open=True), default=1.0, help="Of the prior around the head.")
@click.option(
    "--from", "start", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Posterior to continue."
)
@click.option(
    "--keep", type=click.FloatRange(0, 1, min_open=True), default=1.0, help="Share of its evidence that stays."
)
@threads_option
@json_option
def fit(
    run: Path,
    logs: Path | None,
    out: Path,
    label: str,
    precision: float,
    start: Path | None,
    keep: float,
    as_json: bool,
) -> None:
    """Fit the Gaussian belief about the last layer of RUN to its training rows, or to LOGS from after them.

    With --from, LOGS are added to an earlier posterior of RUN. After the network was trained again, fit anew.
    """
    from lirank.exploration import fit_run_posterior

    found = fit_run_posterior(run, logs, out, label=label, precision=precision, start=start, keep=keep)
    emit(
        found,
        as_json,
        f"{out}: {found['events']} events of {found['label']}, {found['weights']} weights; standard deviation of a "
        f"logit {found['deviation']:.3g} on average",
    )


@explore.command()
@run_argument
@logs_argument
@click.option("--request", required=True, help="Column that tells requests apart; one row per candidate.")
@click.option("--shown", required=True, help="Column that is 1 for the candidate that was shown, one per request.")
@click.option("--propensity", required=True, help="Column of the probability with which it was shown.")
@click.option("--label", default="", show_default=False, help="Label that is the reward. [default: the first]")
@click.option("--posterior", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="For ucb and thompson.")
@click.option(
    "--policy", type=click.Choice(["best", "softmax", "ucb", "thompson"]), default="best", help="What to judge."
)
@click.option("--temperature", type=click.FloatRange(0, min_open=True), default=1.0, help="Of softmax, in logits.")
@click.option("--alpha", type=click.FloatRange(0), default=1.0, help="Standard deviations of ucb.")
@click.option("--draws", type=click.IntRange(1), default=1000, help="Posterior draws per request of thompson.")
@click.option("--clip", type=click.FloatRange(0, min_open=True), default=float("inf"), help="Largest weight.")
@seed_option
@threads_option
@json_option
def estimate(
    run: Path,
    logs: Path,
    request: str,
    shown: str,
    propensity: str,
    label: str,
    clip: float,
    seed: int,
    as_json: bool,
    policy: Any,
    **options: Any,
) -> None:
    """What a policy on RUN's scores would have earned per request of LOGS, logged by another policy.

    IPS and SNIPS reweight what was shown; DM trusts RUN's own predictions; DR corrects them by what was shown. LOGS
    come from after the training of RUN and hold every candidate of a request.
    """
    from lirank.exploration import Columns, Policy, estimate_policy

    columns = Columns(request, shown, propensity)
    found = estimate_policy(run, logs, columns, Policy(policy, **options), label=label, clip=clip, seed=seed)
    rows = [{"estimator": name} | entry for name, entry in found["estimates"].items()]
    counted = f"{found['requests']} requests, {found['candidates']} candidates"
    head = f"{counted}; the logging policy earned {found['logged']:.4g} a request"
    emit(found, as_json, lambda: f"{head}\n{table(rows)}")
