"""The tools are scripts, not a package: their tests import them as the scripts import one another."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TOOLS))

PROJECT = """\
[project]
name = "{name}"
version = "{version}"
dependencies = {dependencies}
"""


class Repository:
    """A small workspace under git: `core`, two packages that depend on it, and one that depends on nothing."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.git("init", "--quiet", "--initial-branch=main")
        self.git("config", "user.name", "Test")
        self.git("config", "user.email", "test@example.org")
        self.package("alpha", ["core>=0.1,<0.2", "numpy>=1"])
        self.package("beta", ["alpha[plot]>=0.1,<0.2"])
        self.package("core", ["numpy>=1"])
        self.package("lonely", [])
        self.write("README.md", "# Read me\n")
        self.write("pyproject.toml", (TOOLS.parent / "pyproject.toml").read_text())
        self.commit("chore: begin")

    def package(self, name: str, dependencies: list[str], version: str = "0.1.0") -> None:
        text = PROJECT.format(name=name, version=version, dependencies=json.dumps(dependencies))
        self.write(f"packages/{name}/pyproject.toml", text)
        self.write(f"packages/{name}/CHANGELOG.md", f"# Changelog of {name}\n")
        self.write(f"packages/{name}/src/{name}/__init__.py", "")
        links = "[docs](../../docs/x.md#y), [here](#z), [b](https://b.example)"
        self.write(f"packages/{name}/README.md", f"![A](a.png) and {links}\n")

    def write(self, path: str, text: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def read(self, path: str) -> str:
        return (self.root / path).read_text()

    def commit(self, message: str) -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message", message)

    def git(self, *arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=self.root, capture_output=True, text=True, check=True)
        return done.stdout.strip()


@pytest.fixture
def repository(tmp_path):
    return Repository(tmp_path)
