"""The README's commands do what it says, in a clean clone."""

import re
import subprocess
from pathlib import Path

import pytest
from workspace import ROOT, packages

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"```sh\n(.+?)\n```", README, re.DOTALL)


def test_the_two_commands():
    assert COMMANDS == ["uv run quantease demo --quick", "uvx nox -s test"]
    assert COMMANDS[1] in (ROOT / ".ci" / "run").read_text()


def test_the_table_names_every_package():
    assert set(re.findall(r"^\| \[`([a-z-]+)`\]\(packages/\1\)", README, re.MULTILINE)) == set(packages())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_first_command_in_a_clean_clone(tmp_path, monkeypatch):
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", ROOT, clone], check=True)
    for variable in ("VIRTUAL_ENV", "UV_PROJECT_ENVIRONMENT", "OMP_NUM_THREADS"):  # a user has none of the session's
        monkeypatch.delenv(variable, raising=False)
    done = subprocess.run(COMMANDS[0].split(), cwd=clone, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert re.search(r"quantease\s*\|\s*[\d.]+", done.stdout), done.stdout
    pictures = [path for path in Path(clone).rglob("*.png") if ".venv" not in path.parts]
    assert pictures
