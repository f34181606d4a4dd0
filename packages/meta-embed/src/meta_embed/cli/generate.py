"""`meta-embed generate`."""

from pathlib import Path
from typing import Any

import click
from core_tensor.app.cli import device_option, emit, json_option, overwrite_option, progress, threads_option

store_option = click.option(
    "--store", required=True, help="Folder (LMDB), sqlite:FOLDER, parquet:FOLDER or redis://HOST:PORT/DB?prefix=NAME:."
)
events_option = click.option(
    "--events", required=True, type=click.Path(path_type=Path), help="Parquet file or a folder of them."
)


@click.command()
@click.argument("run", type=click.Path(path_type=Path, file_okay=False))
@events_option
@store_option
@click.option("--codec", default="int8", type=click.Choice(["int8", "float32"]), help="How vectors are stored.")
@click.option(
    "--precision", default="none", type=click.Choice(["none", "diagonal", "full"]),
    help="Posterior precision to store, for exploration.",
)  # fmt: skip
@click.option("--history/--no-history", default=True, help="Keep each member's latest events, which refresh needs.")
@click.option("--as-of", type=float, help="Leave out events and labels after this time, seconds.")
@click.option("--buckets", default=16, type=click.IntRange(1), help="Parts; each must fit into memory.")
@click.option("--work", type=click.Path(path_type=Path), help="Folder for the parts. [default: beside the store]")
@device_option
@threads_option
@overwrite_option
@json_option
def generate(
    run: Path, events: Path, store: str, codec: Any, precision: Any, history: bool, as_of: float | None, buckets: int,
    work: Path | None, device: str, overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    """Make a vector for every member of EVENTS with the model of RUN; the same command continues a killed job."""
    from core_tensor.app import files, ranks
    from core_tensor.app.runs import RunFolder

    from meta_embed.generate.job import GenerateOptions
    from meta_embed.generate.job import generate as run_job
    from meta_embed.model.build import load_model
    from meta_embed.store.address import check_writable, parse
    from meta_embed.tasks.events import parquet_files

    model, config, vocabulary, version = load_model(run)
    options = GenerateOptions(codec, precision, history, float("inf") if as_of is None else as_of, buckets)
    kind, folder = parse(store)
    place = work or (Path("meta-embed-redis") if kind == "redis" else folder / "generation")
    check_writable(store)
    with ranks.join(device) as processes:
        inputs = {"version": version, "data": files.digest(*parquet_files(events)), "store": store, "options": options}
        # a finished generation that is asked for again, of other events or after a retraining, starts anew
        with RunFolder.claim(
            place, "meta-embed generate", inputs, overwrite=overwrite or _finished(place), ranks=processes
        ) as job:
            first, last = processes.range(buckets)
            with progress(range(first, last), "generate", unit="bucket") as bar:
                result = run_job(
                    model.to(device), config, vocabulary, version, events, store, job.path / "parts", options,
                    device=device, ranks=processes, report=lambda _: bar.update(),
                )  # fmt: skip
            job.finish(result)
        if processes.first:
            text = f"{result['members']} members, model {version}\nstore: {store}"
            emit({"store": store, **result}, as_json, text)


def _finished(place: Path) -> bool:
    """Whether the folder holds the record of a generation that has ended."""
    from core_tensor.app.runs import RECORD, read_record

    return (place / RECORD).exists() and read_record(place)["result"] is not None
