"""Whether the tracked lock satisfies every `pyproject.toml`: `lock.py check`.

A fresh resolution is no function of the tracked files, since an index may show an older upload late. So nothing is
resolved here: every requirement that the workspace states has to be met by a pinned version, on every supported Python.
"""

import argparse
import re
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

from packaging.markers import Marker, default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from workspace import ROOT

PYTHONS = ("3.11", "3.12", "3.13")


@dataclass(frozen=True)
class Pin:
    """One entry of the lock: a version, the environments it is for, and the hashes of its artifacts."""

    name: str
    version: Version
    marker: Marker | None
    hashes: tuple[str, ...]


def read_pins(text: str) -> list[Pin]:
    """The entries of a lock.

    Raises:
        ValueError: If a line is no pinned requirement with hashes.
    """
    found = []
    for entry in re.split(r"\n(?=\S)", text.strip()):
        if entry.startswith("#"):
            continue
        head, *hashes = [part.strip() for part in entry.split("\\\n")]
        requirement = Requirement(head)
        exact = [specifier.version for specifier in requirement.specifier if specifier.operator == "=="]
        if len(exact) != 1 or not hashes or not all(part.startswith("--hash=sha256:") for part in hashes):
            raise ValueError(f"lock: expected a version and hashes, got {head!r}")
        found.append(Pin(canonicalize_name(requirement.name), Version(exact[0]), requirement.marker, tuple(hashes)))
    return found


def requirements(root: Path) -> dict[str, list[str]]:
    """What the workspace asks for, by the file and table that asks."""
    found: dict[str, list[str]] = {}
    top = tomllib.loads((root / "pyproject.toml").read_text())
    for group, entries in top.get("dependency-groups", {}).items():
        found[f"pyproject.toml [{group}]"] = [entry for entry in entries if isinstance(entry, str)]
    for file in sorted(root.glob("packages/*/pyproject.toml")):
        project = tomllib.loads(file.read_text())["project"]
        extras = project.get("optional-dependencies", {})
        found[str(file.relative_to(root))] = [
            *project.get("dependencies", []),
            *(r for e in extras.values() for r in e),
        ]
    return found


def unmet(root: Path, pins: list[Pin], python: str) -> list[str]:
    """Requirements that no pin meets on one Python, each with the file that states it."""
    environment: dict[str, str] = {name: str(value) for name, value in default_environment().items()}
    environment |= {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    live = {pin.name: pin for pin in pins if pin.marker is None or pin.marker.evaluate(environment)}
    own = {canonicalize_name(path.parent.name) for path in root.glob("packages/*/pyproject.toml")}
    missing = []
    for source, stated in requirements(root).items():
        for requirement in map(Requirement, stated):
            name = canonicalize_name(requirement.name)
            if name in own or (requirement.marker and not requirement.marker.evaluate(environment)):
                continue
            if name not in live:
                missing.append(f"{source}: {requirement}: not in the lock for Python {python}")
            elif not requirement.specifier.contains(live[name].version, prereleases=True):
                missing.append(f"{source}: {requirement}: the lock has {live[name].version} for Python {python}")
    return missing


def main(arguments: list[str] | None = None) -> int:
    """Print what is unmet; 1 if anything is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["check"])
    parser.parse_args(arguments)
    pins = read_pins((ROOT / "tools" / "requirements.lock").read_text())
    missing = list(dict.fromkeys(line for python in PYTHONS for line in unmet(ROOT, pins, python)))
    for line in missing:
        print(line)
    if missing:
        print("tools/requirements.lock does not satisfy the above: run `uvx nox -s lock` and commit it")
    return bool(missing)


if __name__ == "__main__":
    sys.exit(main())
