"""Check that every package's window on another package of the workspace, such as `core-tensor>=0.1,<0.2`, holds it.

uv resolves workspace members to one another whatever their windows say, so nothing else would notice a window that
keeps a released wheel from being installed.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version
from workspace import ROOT, Package, packages, requirement_name


def window(version: str) -> str:
    """The window that a dependant puts on a version: compatible until the next minor release.

    Args:
        version: Such as `0.3.1`.

    Returns:
        Such as `>=0.3,<0.4`; `>=1.3,<2` from version 1 on.
    """
    parsed = Version(version)
    upper = f"{parsed.major}.{parsed.minor + 1}" if parsed.major == 0 else str(parsed.major + 1)
    return f">={parsed.major}.{parsed.minor},<{upper}"


def problems(workspace: Mapping[str, Package]) -> list[str]:
    """One line for every window that is open at an end or does not hold the version in the workspace."""
    found = []
    for package in workspace.values():
        for text in package.requirements:
            name = requirement_name(text)
            if name not in workspace or name == package.name:
                continue
            specifier, version = Requirement(text).specifier, workspace[name].version
            operators = {clause.operator for clause in specifier}
            if not ({">=", "=="} & operators and {"<", "=="} & operators):
                found.append(f"{package.name}: expected a window such as {name}{window(version)}, got {text}")
            elif not specifier.contains(version, prereleases=True):
                found.append(f"{package.name}: {text} does not hold {name} {version}; expected {name}{window(version)}")
    return found


def main(root: Path = ROOT) -> int:
    """Print what is wrong; the exit code says whether anything is."""
    found = problems(packages(root))
    print("\n".join(found) or "every version window holds its package")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
