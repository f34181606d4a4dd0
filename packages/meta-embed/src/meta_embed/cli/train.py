"""`meta-embed train`."""

from pathlib import Path

import click
from core_tensor.app.cli import emit, json_option, out_option, overwrite_option, seed_option, threads_option


@click.command()
@click.argument("events", type=click.Path(path_type=Path))
@click.option(
    "--config", "-c", required=True, type=click.Path(path_type=Path, dir_okay=False), help="Columns and options, YAML."
)
@out_option("Folder of the run.", folder=True, required=True)
@click.option(
    "--tune/--no-tune", default=True, help="Choose shrinkage and length of the warm start on held-back members."
)
@seed_option
@threads_option
@overwrite_option
@json_option
def train(events: Path, config: Path, out: Path, tune: bool, seed: int, overwrite: bool, as_json: bool) -> None:
    """Meta-train on EVENTS, a Parquet file or a folder of them; the same command continues a killed run.

    Under torchrun every process takes its share of the tasks.

    \b
    The least that CONFIG says, what the columns mean:
      columns:
        entity: member   # whose events: strings or integers
        time: time       # timestamps, or seconds
        label: clicked   # in [0, 1]
        row: [{name: item, kind: id}]
        member: [{name: age, kind: dense}]   # the cold start; may be absent

    \b
    Further sections, in the words of meta_embed.Config:
      model: {method: map, width: 17}   # or maml: gradient steps
      inner, episodes, train            # steps and rates; tasks; epochs
    """  # noqa: D301
    import msgspec
    from core_tensor.app import files, ranks
    from core_tensor.app.runs import RunFolder

    from meta_embed.config import read_config
    from meta_embed.tasks.events import parquet_files
    from meta_embed.train.run import train_run

    options = read_config(config)
    with ranks.join() as processes:
        data = files.digest(*parquet_files(events))
        inputs = {"config": msgspec.to_builtins(options), "data": data, "seed": seed, "tune": tune}
        with RunFolder.claim(out, "meta-embed train", inputs, overwrite=overwrite, ranks=processes) as run:
            if run.result is None:

                def report(entry: dict[str, float]) -> None:
                    if processes.first:
                        what = "warm start with" if "precision" in entry else ""
                        told = " ".join(f"{name.replace('_', ' ')} {value:.5g}" for name, value in entry.items())
                        click.echo(f"{what} {told}".strip(), err=True)

                run.finish(train_run(run, events, options, seed, processes, tuned=tune, report=report))
            result = run.result or {}
        if processes.first:
            text = (
                f"model {result['version']}: {result['members']} members, held-back loss"
                f" {result['held_back_loss']:.5f} at epoch {result['best_epoch']}\nrun: {out}"
            )
            emit({"run": str(out), **result}, as_json, text)
