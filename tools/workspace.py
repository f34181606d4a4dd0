"""The packages of this workspace, what each depends on, and which of them a change touches.

`workspace.py packages` prints every package, dependencies before dependants; `workspace.py dependants NAME` prints what
depends on one, directly or not; `workspace.py affected REF` what the diff to a git reference touches, with dependants.
"""

import argparse
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]

# A change to anything at the root can change every package, except for what only people or other gates read.
_HARMLESS = ("docs/", ".github/", ".ci/", "tools/", "LICENSE", "noxfile.py", "mkdocs.yml", ".pre-commit-config.yaml")


@dataclass(frozen=True)
class Package:
    """One distribution of the workspace.

    Attributes:
        name: Name of the distribution, which is also its folder under `packages/`.
        version: Its version.
        requirements: Its required dependencies, as written in `pyproject.toml`.
        folder: Its folder.
        siblings: Names of the workspace's packages among its dependencies, extras included.
    """

    name: str
    version: str
    requirements: tuple[str, ...]
    folder: Path
    siblings: frozenset[str]


def requirement_name(requirement: str) -> str:
    """Normalised name of the distribution that a requirement asks for, such as `core-tensor` for `core_tensor[cli]>=1`.

    Raises:
        ValueError: If it does not begin with a name.
    """
    match = re.match(r"\s*([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)", requirement)
    if match is None:
        raise ValueError(f"requirement: expected one that begins with a name, got {requirement!r}")
    return re.sub(r"[-_.]+", "-", match[1]).lower()


def packages(root: Path = ROOT) -> dict[str, Package]:
    """Every package by name, dependencies before dependants.

    Args:
        root: The workspace.

    Raises:
        graphlib.CycleError: If packages depend on one another in a circle.
    """
    projects = {
        file.parent: tomllib.loads(file.read_text(encoding="utf-8"))["project"]
        for file in sorted(root.glob("packages/*/pyproject.toml"))
    }
    names = {project["name"] for project in projects.values()}
    found = {}
    for folder, project in projects.items():
        required = tuple(project.get("dependencies", ()))
        optional = (item for extra in project.get("optional-dependencies", {}).values() for item in extra)
        siblings = {requirement_name(item) for item in (*required, *optional)} & names - {project["name"]}
        found[project["name"]] = Package(project["name"], project["version"], required, folder, frozenset(siblings))
    order = TopologicalSorter({name: sorted(package.siblings) for name, package in found.items()}).static_order()
    return {name: found[name] for name in order}


def dependants(names: Iterable[str], workspace: Mapping[str, Package]) -> set[str]:
    """The given packages and everything that depends on them, directly or not.

    Raises:
        ValueError: If a name is no package of the workspace.
    """
    reached = set(names)
    if unknown := reached - set(workspace):
        raise ValueError(f"names: expected packages of the workspace, got {', '.join(sorted(unknown))}")
    for name, package in workspace.items():  # in topological order, so one pass reaches everything
        if package.siblings & reached:
            reached.add(name)
    return reached


def touched(paths: Iterable[str], workspace: Mapping[str, Package]) -> set[str]:
    """The packages that changed files belong to; a changed file that may concern all of them touches all of them.

    Args:
        paths: Changed files, relative to the root, with forward slashes.
        workspace: The packages.
    """
    found = set()
    for path in paths:
        parts = PurePosixPath(path).parts
        if parts[0] == "packages" and len(parts) > 2:
            if parts[1] in workspace:  # a package that was removed touches nothing that is still there
                found.add(parts[1])
        elif not (path.startswith(_HARMLESS) or (len(parts) == 1 and path.endswith(".md"))):
            return set(workspace)
    return found


def changed_files(reference: str, root: Path = ROOT) -> list[str]:
    """Files that differ from where this branch left `reference`, uncommitted and untracked ones included.

    Raises:
        ValueError: If git does not know the reference.
    """

    def git(*arguments: str) -> list[str]:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"reference: expected a commit that git knows, got {reference!r} ({done.stderr.strip()})")
        return [line for line in done.stdout.split("\0") if line]

    base = git("merge-base", reference, "HEAD")[0].strip()
    tracked = git("diff", "--name-only", "--no-renames", "-z", base)
    return tracked + git("ls-files", "--others", "--exclude-standard", "-z")


def affected(reference: str, root: Path = ROOT) -> list[str]:
    """The packages that the diff to a git reference touches and their dependants, dependencies first."""
    workspace = packages(root)
    reached = dependants(touched(changed_files(reference, root), workspace), workspace)
    return [name for name in workspace if name in reached]


def main() -> int:
    """Print names, one a line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("packages", help="every package, dependencies before dependants")
    commands.add_parser("dependants", help="what depends on a package").add_argument("name", metavar="NAME")
    commands.add_parser("affected", help="what a diff touches, with dependants").add_argument(
        "reference", metavar="REF"
    )
    options = parser.parse_args()
    workspace = packages()
    try:
        match options.command:
            case "packages":
                names = list(workspace)
            case "dependants":
                reached = dependants([options.name], workspace) - {options.name}
                names = [name for name in workspace if name in reached]
            case _:
                names = affected(options.reference)
    except ValueError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    for name in names:
        print(name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
