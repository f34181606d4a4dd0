import json

import click
import pytest
from click.testing import CliRunner
from core_tensor.app.cli import command_line, emit, json_option, progress, table
from core_tensor.app.extras import MissingExtraError, require


@command_line("core-tensor")
def main():
    """A command line for the tests."""


@main.command()
@click.option("--size", default=3, help="Rows.")
@json_option
def show(size, as_json):
    """Show a size."""
    if size < 0:
        raise ValueError(f"size: expected a positive number, got {size}")
    if size == 13:
        require("no_such_module_at_all", "core-tensor[cli]")
    if size == 14:
        raise KeyError("a defect, not bad input")
    emit({"size": size}, as_json, lambda: f"{size} rows")


def _run(*arguments):
    return CliRunner().invoke(main, list(arguments))


def test_text_and_json():
    assert _run("show").output == "3 rows\n"
    assert json.loads(_run("show", "--size", "4", "--json").output) == {"size": 4}


def test_help_shows_defaults_and_version_is_the_distribution_s():
    assert "default: 3" in _run("show", "-h").output
    assert _run("--version").output.startswith("core-tensor, version ")


def test_help_shows_the_whole_first_sentence_of_a_command():
    @main.command(name="long")
    def _long():
        """Do a thing whose description is longer than one line of a terminal and still must be read to the very end."""

    assert "read to the very end." in " ".join(_run("--help").output.split())


@pytest.mark.parametrize(
    ("size", "message"),
    [("-1", "Error: size: expected a positive number, got -1\n"), ("13", "pip install 'core-tensor[cli]'")],
)
def test_bad_input_is_one_line_and_exit_code_2(size, message, monkeypatch):
    monkeypatch.delenv("CORE_TENSOR_TRACEBACK", raising=False)
    result = _run("show", "--size", size)
    assert result.exit_code == 2
    assert message in result.output
    assert result.output.count("\n") == 1
    monkeypatch.setenv("CORE_TENSOR_TRACEBACK", "1")
    assert isinstance(_run("show", "--size", size).exception, ValueError | MissingExtraError)


def test_a_defect_is_not_hidden():
    assert isinstance(_run("show", "--size", "14").exception, KeyError)


def test_require_does_not_blame_the_extra_for_a_broken_module(tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency") as raised:
        require("broken_module", "x[y]")
    assert not isinstance(raised.value, MissingExtraError)
    with pytest.raises(MissingExtraError, match=r"pip install 'x\[y\]'"):
        require("no_such_module_at_all.part", "x[y]")


def test_progress_is_silent_when_not_a_terminal(capsys):
    assert list(progress(range(3), "counting")) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_table_is_aligned_markdown():
    assert table([{"name": "a", "value": 1.23456}, {"name": "bcd", "value": None}]) == (
        "| name | value |\n|------|-------|\n| a    | 1.235 |\n| bcd  | -     |"
    )
    assert table([]) == ""
