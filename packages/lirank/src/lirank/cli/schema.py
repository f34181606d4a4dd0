"""`lirank schema`: draft and check the file that describes a log."""

from pathlib import Path

import click
from core_tensor.app.cli import CommandGroup, out_option

from lirank.cli.options import logs_argument, schema_option


@click.group(cls=CommandGroup)
def schema() -> None:
    """Draft or check the schema of a log."""


@schema.command()
@logs_argument
@click.option("--label", "labels", multiple=True, help="Column of a label; several are several tasks.")
@click.option("--time", default="", show_default=False, help="Column of the event time.")
@click.option(
    "--group", default="", show_default=False, help="Column within which ranking is judged, such as the user."
)
@out_option("Schema to write (YAML); without it the schema is printed.")
def infer(logs: Path, labels: tuple[str, ...], time: str, group: str, out: Path | None) -> None:
    """Draft a schema from LOGS, to be read and edited."""
    from lirank.data.infer import doubts, infer_schema
    from lirank.data.parquet import ParquetLog

    log = ParquetLog.open(logs)
    found = infer_schema(log, labels, time, group)
    for doubt in doubts(log, found):
        click.echo(f"note: {doubt}", err=True)
    if out is None:
        click.echo(found.to_yaml(), nl=False)
    else:
        found.save(out)
        click.echo(f"{out}: {len(found.features)} features, {len(found.labels)} label(s); read it before you train")


@schema.command()
@logs_argument
@schema_option()
def check(logs: Path, schema_file: Path) -> None:
    """Read LOGS once as training would, and report what the schema refuses or cannot use."""
    from lirank.data.batch import Encoder
    from lirank.data.parquet import ParquetLog
    from lirank.features.causal import CausalFeatures
    from lirank.schema.features import Popularity, load_schema

    log, described = ParquetLog.open(logs), load_schema(schema_file)
    log.require(described.columns())
    encoder = Encoder(described)
    for table in log.read(described.columns()):
        extended = table
        if described.causal:  # causal columns are numbers of our own making; an empty memory gives their form
            extended = CausalFeatures(described, 1.0).lookup(table)
        encoder.observe(extended)
        encoder.encode(extended)
    own = tuple(f"{feature.name}." for feature in described.of(Popularity))
    for note in encoder.check_columns():
        if not note.startswith(own):
            click.echo(f"note: {note}")
    for name, vocabulary in encoder.vocabularies.items():
        click.echo(f"{name}: {', '.join(f'{key} {value}' for key, value in vocabulary.summary().items())}")
    click.echo(f"{log.rows} rows fit the schema")
