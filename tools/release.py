"""Release every package that has something to release: version, change log, commit, annotated tag, wheel.

Packages go in topological order, one commit and one tag `<name>-vX.Y.Z` each. The conventional commits under its folder
since its last tag (`tools/changes.py`) decide a package's version. When a release leaves a dependant's window, such as
`core-tensor>=0.1,<0.2`, the window is rewritten and the dependant released too, as a patch at least.
"""

import argparse
import posixpath
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from changes import Change, as_markdown, changes_of, run
from packaging.requirements import Requirement
from packaging.version import Version
from version_windows import window
from workspace import ROOT, Package, packages, requirement_name

UNRELEASED = "## Unreleased"


@dataclass(frozen=True)
class Release:
    """What happens to one package.

    Attributes:
        name: Name of the distribution.
        previous: Version of the last tag, or None for the first release.
        version: The new version.
        notes: Markdown section for the change log, its heading included.
        windows: Requirements to rewrite, old text to new text.
    """

    name: str
    previous: str | None
    version: str
    notes: str
    windows: Mapping[str, str] = field(default_factory=dict)

    @property
    def tag(self) -> str:
        """Name of the tag."""
        return f"{self.name}-v{self.version}"


def last_version(root: Path, name: str) -> str | None:
    """Version of a package's last tag that HEAD descends from, or None before its first release."""
    tags = run(root, "git", "tag", "--merged", "HEAD", "--list", f"{name}-v[0-9]*").split()
    versions = [tag.removeprefix(f"{name}-v") for tag in tags]
    return max(versions, key=Version, default=None)


def bumped(previous: str, changes: Sequence[Change], *, patch: bool = False) -> str:
    """The version after some changes: semantic versioning, where before 1.0 what breaks bumps the minor version.

    Args:
        previous: Version of the last release.
        changes: What users notice.
        patch: Whether there is a reason for a release besides the changes.
    """
    major, minor, micro = Version(previous).release
    breaking = any(change.breaking for change in changes)
    if breaking and major:
        return f"{major + 1}.0.0"
    if breaking or any(change.group == "Added" for change in changes):
        return f"{major}.{minor + 1}.0"
    return f"{major}.{minor}.{micro + 1}" if changes or patch else previous


def new_windows(package: Package, versions: Mapping[str, str]) -> dict[str, str]:
    """Requirements whose window does not hold the version that the workspace will have, with their successors.

    Args:
        package: The dependant.
        versions: Version of every package after the releases planned so far.
    """
    rewritten = {}
    for text in package.requirements:
        name = requirement_name(text)
        if name in versions and name != package.name and versions[name] not in Requirement(text).specifier:
            rewritten[text] = re.sub(r"[<>=!~][^;]*", window(versions[name]), text, count=1)
    return rewritten


def plan(root: Path = ROOT) -> list[Release]:
    """The releases that the commits since the last tags ask for, dependencies first.

    Args:
        root: A git work tree with the workspace.
    """
    releases = []
    versions = {name: package.version for name, package in packages(root).items()}
    for name, package in packages(root).items():
        previous = last_version(root, name)
        windows = new_windows(package, versions)
        changes = changes_of(root, name, None if previous is None else f"{name}-v{previous}", versions)
        version = package.version if previous is None else bumped(previous, changes, patch=bool(windows))
        if version == previous:
            continue
        versions[name] = version
        sections = [
            f"## {version} ({datetime.now(tz=UTC):%Y-%m-%d})",
            written(root / "packages" / name / "CHANGELOG.md"),
        ]
        if (
            previous is not None or not sections[1]
        ):  # all that a first release holds is new; what it is, its author says
            sections.append(as_markdown(changes))
        if windows:
            sections.append("Requires:\n\n" + "\n".join(f"- {new}" for new in windows.values()))
        notes = "\n\n".join(filter(None, sections))
        releases.append(Release(name, previous, version, notes, windows))
    return releases


def written(log: Path) -> str:
    """What the authors of a change log have written for the next release, under `## Unreleased`."""
    _, _, after = log.read_text(encoding="utf-8").partition(f"{UNRELEASED}\n")
    return re.split(r"(?m)^## ", after)[0].strip()


def apply(release: Release, root: Path = ROOT) -> None:
    """Write the version, the windows, the addresses and the change log of one package, commit and tag.

    Args:
        release: What was planned.
        root: A git work tree without changes.

    Raises:
        ValueError: If a file does not look as expected, or git refuses.
    """
    folder = root / "packages" / release.name
    project, log = folder / "pyproject.toml", folder / "CHANGELOG.md"
    text = project.read_text(encoding="utf-8")
    text, found = re.subn(r'(?m)^version = "[^"]+"$', f'version = "{release.version}"', text, count=1)
    if not found:
        raise ValueError(f'{project}: expected a line version = "X.Y.Z"')
    for old, new in release.windows.items():
        text = text.replace(f'"{old}"', f'"{new}"')
    if home := home_page(root):
        text, readme = with_urls(text, home, release.name), folder / "README.md"
        readme.write_text(with_absolute_links(readme.read_text(encoding="utf-8"), home, release.name), encoding="utf-8")
        run(root, "git", "add", str(readme))
    heading, _, rest = log.read_text(encoding="utf-8").partition("\n")
    if UNRELEASED in rest:  # its text is part of the notes
        rest = "".join(re.split(r"(?m)^(?=## )", rest.partition(f"{UNRELEASED}\n")[2])[1:])
    older = f"\n{rest.strip()}\n" if rest.strip() else ""
    project.write_text(text, encoding="utf-8")
    log.write_text(f"{heading}\n\n{release.notes.strip()}\n{older}", encoding="utf-8")
    run(root, "git", "add", str(project), str(log))
    title = f"chore(release): {release.name} {release.version}"
    run(root, "git", "commit", "--quiet", "--allow-empty", "--message", title)
    run(root, "git", "tag", "--annotate", release.tag, "--message", f"{release.name} {release.version}")


def home_page(root: Path) -> str | None:
    """Address of the repository on the web, from its remote `origin`; None where that is a folder, or there is none."""
    if "origin" not in run(root, "git", "remote").split():
        return None
    remote = run(root, "git", "remote", "get-url", "origin")
    found = re.fullmatch(r"(?:(?:https|ssh)://)?(?:[^@/]+@)?([\w-]+(?:\.[\w-]+)+)[:/](.+?)(?:\.git)?/?", remote)
    return f"https://{found[1]}/{found[2]}" if found else None


def with_urls(project: str, home: str, name: str) -> str:
    """The text of a `pyproject.toml` with the table `[project.urls]`, which only a clone with its remote can know."""
    table = f'''[project.urls]
Source = "{home}"
Changelog = "{home}/blob/HEAD/packages/{name}/CHANGELOG.md"
Issues = "{home}/issues"

'''
    without = re.sub(r"(?ms)^\[project\.urls\]\n.*?(?=^\[|\Z)", "", project)
    before, project_table, rest = without.partition("[project]\n")
    own, bracket, others = rest.partition("\n[")
    return f"{before}{project_table}{own.rstrip()}\n\n{table}{bracket.strip()}{others}".rstrip() + "\n"


def with_absolute_links(readme: str, home: str, name: str) -> str:
    """A README whose links and pictures also work on an index, which shows it far from its folder."""

    def absolute(match: re.Match[str]) -> str:
        kind = "raw" if match[1] else "blob"
        path = posixpath.normpath(posixpath.join("packages", name, match[3]))
        return f"{match[1]}[{match[2]}]({home}/{kind}/HEAD/{path})"

    return re.sub(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)\s]+)\)", absolute, readme)


def build(names: Sequence[str], root: Path = ROOT) -> None:
    """Wheel and sdist of each package into `dist/`."""
    for name in names:
        run(root, "uv", "build", "--quiet", "--package", name, "--out-dir", "dist")


def check_state(root: Path = ROOT) -> None:
    """Refuse a work tree from which a release would go wrong.

    Args:
        root: A git work tree.

    Raises:
        ValueError: If it has changes, is no branch, is shallow, or lacks commits or tags of its remote.
    """
    if dirty := run(root, "git", "status", "--porcelain"):
        raise ValueError(f"work tree: expected no changes, got\n{dirty}")
    branch = run(root, "git", "branch", "--show-current")
    if not branch:
        raise ValueError("work tree: expected a branch, got a detached HEAD")
    if run(root, "git", "rev-parse", "--is-shallow-repository") == "true":
        raise ValueError("work tree: expected the whole history, got a shallow clone: git fetch --unshallow --tags")
    if "origin" not in run(root, "git", "remote").split():
        return
    run(root, "git", "fetch", "--quiet", "--tags", "origin", branch)
    behind = int(run(root, "git", "rev-list", "--count", f"HEAD..origin/{branch}"))
    if behind:
        raise ValueError(f"{branch}: expected all commits of origin/{branch}, {behind} are missing: git pull")


def release_all(root: Path = ROOT, *, wheels: bool = True) -> list[Release]:
    """Plan and carry out; a step that fails takes all commits and tags of this call back.

    Args:
        root: A git work tree without changes.
        wheels: Whether to build them.

    Returns:
        What was released.
    """
    head, tags = run(root, "git", "rev-parse", "HEAD"), run(root, "git", "tag", "--list").split()
    releases = plan(root)
    try:
        for release in releases:
            apply(release, root)
        if wheels:
            build([release.name for release in releases], root)
    except BaseException:
        if made := set(run(root, "git", "tag", "--list").split()) - set(tags):
            run(root, "git", "tag", "--delete", *made)
        run(root, "git", "reset", "--quiet", "--hard", head)  # the work tree had no changes
        raise
    return releases


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Print the plan; carry it out unless asked not to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--dry-run", action="store_true", help="only print what would be released")
    parser.add_argument("--no-wheels", action="store_true", help="do not build what is released")
    options = parser.parse_args(arguments)
    try:
        if options.dry_run:
            releases = plan(root)
        else:
            check_state(root)
            releases = release_all(root, wheels=not options.no_wheels)
    except ValueError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    for release in releases:
        print(f"{release.name}: {release.previous or 'unreleased'} -> {release.version}\n\n{release.notes}\n")
    if not releases:
        print("nothing to release")
        return 0
    branch = run(root, "git", "branch", "--show-current") or "main"
    # all or nothing: a tag without its commit, or a commit without its tag, would be planned again
    print(f"git push --atomic origin {branch} {' '.join(release.tag for release in releases)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
