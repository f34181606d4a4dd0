"""`lirank recipe`."""

import json
from pathlib import Path

import click
from core_tensor.app.cli import emit, json_option, out_option, overwrite_option, seed_option, threads_option


@click.command()
@click.argument("name", type=click.Choice(["feed", "jobs", "ads"]))
@out_option("Folder for log, schema and run.", folder=True, required=True)
@click.option("--events", type=click.IntRange(1000), default=100_000, help="Impressions of the generated log.")
@seed_option
@threads_option
@overwrite_option
@json_option
def recipe(name: str, out: Path, events: int, seed: int, overwrite: bool, as_json: bool) -> None:
    """A deployment of the paper, end to end on a generated log: NAME is feed, jobs or ads.

    The source of lirank.evidence.recipes is meant to be read and changed.
    """
    from core_tensor.app.runs import RunFolder

    from lirank.evidence.recipes import run_recipe

    with RunFolder.claim(
        out, "lirank recipe", {"name": name, "events": events, "seed": seed}, overwrite=overwrite
    ) as run:
        if run.result is None:
            run.finish(run_recipe(name, run.path, events=events, seed=seed))
        found = run.result or {}
    emit(found, as_json, lambda: json.dumps(found, indent=2))
