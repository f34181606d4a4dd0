"""The shell that every package's command line shares: options, help with defaults, progress, one-line errors.

Needs the extra `core-tensor[cli]` (click and tqdm), which every package with a command depends on.
"""

import contextlib
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click
from tqdm import tqdm

from core_tensor.app.devices import check_device
from core_tensor.app.extras import MissingExtraError

T = TypeVar("T")
_BAD_INPUT = (ValueError, TypeError, OSError, EOFError, MissingExtraError)
_FOREIGN = {("zipfile", "BadZipFile"), ("zlib", "error"), ("struct", "error"), ("_struct", "error")}
"""Errors of broken files that reach the shell past a reader, by module and name."""
_FILE_FORMATS = ("safetensors", "safetensors_rust", "pyarrow", "PIL", "yaml", "msgspec", "lmdb")


class CommandGroup(click.Group):
    """A click group whose help has the whole first sentence of every command; click would cut it at the line's end."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List every command with its whole first sentence.

        Args:
            ctx: Click's context.
            formatter: Where the help is written.
        """
        commands = [self.commands[name] for name in self.list_commands(ctx)]
        rows = [(str(c.name), c.get_short_help_str(limit=1000)) for c in commands if not c.hidden]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)


class CommandLine(CommandGroup):
    """A click group whose commands end bad input with one clear line and exit code 2, and Ctrl-C with code 130.

    Bad input is a ValueError or TypeError, whatever the operating system refuses, a broken file, or a missing extra.
    Anything else is a bug and shows its traceback; with `CORE_TENSOR_TRACEBACK=1` in the environment, all do.
    """

    def main(self, *args: Any, standalone_mode: bool = True, **kwargs: Any) -> Any:
        """Run the command line; see the class. Arguments, result and errors are click's."""
        run: Callable[..., Any] = super().main
        if not standalone_mode:
            return run(*args, standalone_mode=False, **kwargs)
        try:
            result = run(*args, standalone_mode=False, **kwargs)
            sys.stdout.flush()  # a full disk behind `> file` shows here, not when the interpreter closes the file
        except (click.exceptions.Abort, KeyboardInterrupt):
            _stop(f"Interrupted. The same command continues: {shlex.join([str(self.name), *sys.argv[1:]])}", 130)
        except BrokenPipeError:  # `| head` has read enough
            _silence()
            sys.exit(0)
        except click.ClickException as error:
            error.show()
            sys.exit(error.exit_code)
        except Exception as error:
            if os.environ.get("CORE_TENSOR_TRACEBACK") or not is_bad_input(error):
                raise
            _stop(f"Error: {one_line(error)}", 2)
        sys.exit(result if isinstance(result, int) else 0)


def _stop(line: str, code: int) -> NoReturn:
    """Print a last line, where standard error still takes one, and leave."""
    with contextlib.suppress(OSError):
        click.echo(line, err=True)
    try:
        sys.stdout.flush()
    except OSError:
        _silence()
    sys.exit(code)


def _silence() -> None:
    """Let standard output go nowhere: what could not be written would fail again when the interpreter ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def is_bad_input(error: BaseException) -> bool:
    """Whether an error is due to input or the machine rather than to a bug.

    Args:
        error: Any exception.

    Returns:
        True for bad arguments, files and machines; False for a bug.
    """
    kinds = [(kind.__module__, kind.__name__) for kind in type(error).__mro__]
    foreign = any(kind in _FOREIGN or kind[0].split(".")[0] in _FILE_FORMATS for kind in kinds)
    return isinstance(error, _BAD_INPUT) or foreign


def one_line(error: BaseException) -> str:
    """The message of an error on one line; an operating-system error as its message and file name.

    Args:
        error: Any exception.

    Returns:
        The line.
    """
    if isinstance(error, OSError) and error.errno is not None:
        reason = os.strerror(error.errno)
        return f"{error.filename}: {reason}" if error.filename is not None else reason
    return " ".join(str(error).split()) or type(error).__name__


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


# ----------------------------------------------------------------------------------------------------------------------
# Options, which have the same name and meaning in every command

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def out_option(what: str, *, folder: bool = False, default: str | None = None, required: bool = False) -> Decorator:
    """The option `-o/--out`, passed to the command as `out`, a `pathlib.Path` or None.

    Args:
        what: What is written there, for the help.
        folder: Whether it is a folder, not a file.
        default: Default path.
        required: Whether the command needs it.

    Returns:
        A decorator of commands.
    """
    kind = click.Path(path_type=Path, dir_okay=folder, file_okay=not folder)
    return click.option("--out", "-o", type=kind, default=default, required=required, help=what)


def _set_threads(context: click.Context, parameter: click.Parameter, count: int | None) -> int | None:
    """Tell torch, if the user said anything."""
    del context, parameter
    if count is not None:
        import torch

        torch.set_num_threads(count)
    return count


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
seed_option = click.option("--seed", default=0, type=click.IntRange(0), help="Seed of everything random.")
threads_option = click.option(
    "--threads", type=click.IntRange(1), callback=_set_threads, expose_value=False, help="Threads. [default: torch's]"
)


def _device(context: click.Context, parameter: click.Parameter, text: str) -> str:
    """A device of torch that this machine has; refused before any work."""
    del context, parameter
    if text != "cpu":
        try:
            check_device("device", text)
        except ValueError as error:
            raise click.BadParameter(str(error).removeprefix("device: ")) from error
    return text


device_option = click.option(
    "--device", default="cpu", callback=_device, help="Device to compute on, such as cpu or cuda:0."
)
overwrite_option = click.option("--overwrite", is_flag=True, help="Start anew where an earlier run has written.")
quick_option = click.option("--quick", is_flag=True, help="A smaller run that ends sooner.")


# ----------------------------------------------------------------------------------------------------------------------
# Output


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
    """A progress bar with the time left on standard error, silent when that is not a terminal.

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
