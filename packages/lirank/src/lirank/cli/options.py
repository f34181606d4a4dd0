"""Options that several commands share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

LOGS = "LOGS is a Parquet file or a folder of them; hive partitions become columns."
logs_argument = click.argument("logs", type=click.Path(exists=True, path_type=Path))
run_argument = click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))


def schema_option(*, required: bool = True, more: str = "") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The option `--schema`, passed as `schema_file`."""
    return click.option(
        "--schema",
        "schema_file",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        required=required,
        help=f"Schema of the log (YAML, see `lirank schema infer`){more}.",
    )


def split_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options that divide a log into training, validation and test rows."""
    for option in (
        click.option(
            "--allow-future",
            is_flag=True,
            help="Allow a split that trains on events from after those it tests (user and random).",
        ),
        click.option("--test", type=click.FloatRange(0, 1, max_open=True), default=0.1, help="Share that tests."),
        click.option("--valid", type=click.FloatRange(0, 1, max_open=True), default=0.1, help="Share that chooses."),
        click.option(
            "--split",
            "kind",
            type=click.Choice(["time", "user", "random"]),
            default="time",
            help="By time, by each group's last events, or at random.",
        ),
    ):
        function = option(function)
    return function
