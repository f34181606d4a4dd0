import json
import signal
import subprocess
import sys
import time

import click
import pytest
from click.testing import CliRunner
from core_tensor.app.cli import command_line, device_option, emit, json_option, progress, table
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


SCRIPT = """
import sys, zipfile, zlib, time, os, errno, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored
import click
from core_tensor.app.cli import *

@command_line("core-tensor")
def main():
    "A command line."

@main.command()
@click.argument("what")
@threads_option
@out_option("A file.")
def fail(what, out):
    "Fail in some way."
    if what == "zip": raise zipfile.BadZipFile("not a zip")
    if what == "zlib": zlib.decompress(b"x")
    if what == "disk": raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out.npz")
    if what == "readonly": raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    if what == "write": out.write_text("x")
    if what == "print": click.echo("x" * 100)
    if what == "lines": raise ValueError("first\\nsecond")
    if what == "bug": raise KeyError("bug")
    if what == "slow": print("ready", flush=True); time.sleep(30)

main()
"""


def _script(*arguments, **options):
    command = [sys.executable, "-c", SCRIPT, *arguments]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("zip",), "Error: not a zip\n"),
        (("zlib",), "Error: Error -5 while decompressing data: incomplete or truncated stream\n"),
        (("disk",), "Error: out.npz: No space left on device\n"),
        (("readonly",), "Error: Read-only file system\n"),
        (("write", "-o", "/proc/nowhere/x"), "Error: /proc/nowhere/x: No such file or directory\n"),
        (("lines",), "Error: first second\n"),
    ],
)
def test_what_comes_from_outside_is_one_line(arguments, message):
    done = _script("fail", *arguments)
    assert (done.returncode, done.stderr) == (2, message)


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "", "meta:x"])
def test_a_device_that_is_not_there_is_refused_before_any_work(device):
    worked = []
    command = click.command()(device_option(lambda device: worked.append(device)))
    done = CliRunner().invoke(command, ["--device", device])
    assert done.exit_code == 2
    assert f"expected a device that torch finds here, got {device!r}" in done.stderr
    assert not worked
    assert CliRunner().invoke(command, []).exit_code == 0
    assert worked == ["cpu"]


def test_a_full_disk_behind_the_output_is_one_line():
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = _script("fail", "print", stdout=full)
    assert (done.returncode, done.stderr) == (2, "Error: No space left on device\n")


def test_bugs_keep_their_traceback():
    done = _script("fail", "bug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_no_threads_are_refused():
    done = _script("fail", "print", "--threads", "0")
    assert done.returncode == 2
    assert "0 is not in the range x>=1" in done.stderr


def test_ctrl_c_says_that_the_same_command_continues():
    command = [sys.executable, "-c", SCRIPT, "fail", "slow"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert "The same command continues: core-tensor fail slow\n" in process.stderr.read()
    assert process.returncode == 130


def test_the_shell_loads_no_torch():
    code = "import sys, core_tensor.app.cli, core_tensor.app.runs, core_tensor.app.ranks, core_tensor.app.figures\n"
    code += "import core_tensor.app.files, core_tensor.app.exports\nassert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
