"""The shell that every package's command line shares: help with defaults, `--json`, progress, one-line errors.

Needs the extra `core-tensor[cli]` (click and tqdm), which every package with a command depends on.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import click
from tqdm import tqdm

from core_tensor.app.extras import MissingExtraError

T = TypeVar("T")
_BAD_INPUT = (
    ValueError,
    MissingExtraError,
    FileNotFoundError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)


class CommandLine(click.Group):
    """A click group whose commands end bad input with one clear line and exit code 2.

    `CORE_TENSOR_TRACEBACK=1` in the environment shows the traceback instead.
    """

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; turn the errors of bad input into one line on standard error.

        Args:
            ctx: Click's context.

        Returns:
            What the command returns.

        Raises:
            click.UsageError: For bad input, which click prints and ends with exit code 2.
        """
        try:
            return super().invoke(ctx)
        except _BAD_INPUT as error:
            if os.environ.get("CORE_TENSOR_TRACEBACK"):
                raise
            click.echo(f"Error: {error}", err=True)
            ctx.exit(2)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List every command with its whole first sentence; click would cut it at the end of the line.

        Args:
            ctx: Click's context.
            formatter: Where the help is written.
        """
        commands = [self.commands[name] for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl([(str(c.name), c.get_short_help_str(limit=1000)) for c in commands if not c.hidden])


def command_line(distribution: str) -> Callable[[Callable[..., Any]], CommandLine]:
    """Decorator that makes a function the root of a package's command line, with `--help` and `--version`.

    Args:
        distribution: Name of the distribution, for `--version`.

    Returns:
        A decorator.
    """
    settings = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100}

    def decorate(function: Callable[..., Any]) -> CommandLine:
        versioned = click.version_option(package_name=distribution)(function)
        return click.group(name=distribution, cls=CommandLine, context_settings=settings)(versioned)

    return decorate


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")


def emit(result: Mapping[str, Any], as_json: bool, text: str | Callable[[], str]) -> None:
    """Print a command's result, for machines or for people.

    Args:
        result: What `--json` prints, on one line.
        as_json: Whether the user asked for JSON.
        text: What people read, or a function that renders it.
    """
    if as_json:
        click.echo(json.dumps(result, allow_nan=False))
    else:
        click.echo(text() if callable(text) else text)


def progress(items: Iterable[T], description: str, total: int | None = None, unit: str = "it") -> "tqdm[T]":
    """A progress bar with ETA on standard error, silent when that is not a terminal.

    Args:
        items: What to iterate over.
        description: What is going on.
        total: Number of items, if `items` has no length.
        unit: Name of one item.

    Returns:
        An iterable bar; `set_postfix` adds live figures.
    """
    return tqdm(items, desc=description, total=total, unit=unit, disable=None, dynamic_ncols=True)


def table(rows: Iterable[Mapping[str, Any]], digits: int = 4) -> str:
    """Align rows of equal keys as a plain-text (and valid Markdown) table.

    Args:
        rows: One mapping per row; the first row's keys are the header.
        digits: Significant digits of floats.

    Returns:
        The table, one line per row.
    """

    def show(value: Any) -> str:
        if value is None:
            return "-"
        return f"{value:.{digits}g}" if isinstance(value, float) else str(value)

    listed = list(rows)
    if not listed:
        return ""
    header = list(listed[0])
    cells = [header] + [[show(row.get(key)) for key in header] for row in listed]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])
