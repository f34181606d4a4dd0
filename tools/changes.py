"""What users of one package notice: the entries of its change log, from conventional commits.

A title may hold several entries, `feat(core-tensor): a kernel; fix(msam): a leak; docs: words`; an entry without a
scope has the scope of the one before it. A commit belongs to every package whose files it touches, and an entry to
those that its scope names, so a commit over several packages appears in each with that package's own words. A scope
that names no package, or no scope at all, means every package that the commit touches. The text of a `BREAKING
CHANGE:` paragraph says how to upgrade.
"""

import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

GROUPS = {"feat": "Added", "fix": "Fixed", "perf": "Faster"}
"""Types of commits that users notice; the others appear only where they break something, under `Changed`."""
_ENTRY = re.compile(r"(?P<type>[a-z]+)(?:\((?P<scope>[^)]*)\))?(?P<breaks>!)?: +(?P<text>.+)", re.DOTALL)
_NEXT = re.compile(r"; (?=[a-z]+(?:\([^)]*\))?!?: )")


@dataclass(frozen=True)
class Change:
    """One entry of a change log.

    Attributes:
        group: Heading that it belongs under.
        text: What changed.
        breaking: Whether code that used the package may have to change.
        upgrade: How, if the commit says it.
    """

    group: str
    text: str
    breaking: bool = False
    upgrade: str = ""


def run(root: Path, *command: str) -> str:
    """Output of a command at the root.

    Raises:
        ValueError: If it fails, with what it said.
    """
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout.strip()


def changes_of(root: Path, name: str, since: str | None, packages: Sequence[str] | dict[str, str]) -> list[Change]:
    """Changes of a package, oldest first.

    Args:
        root: A git work tree.
        name: The package.
        since: Tag of its last release; None for all its history.
        packages: Names of all packages, to tell their scopes from others.

    Returns:
        What users of it notice.
    """
    history = "HEAD" if since is None else f"{since}..HEAD"
    log = run(root, "git", "log", "--reverse", "--no-merges", "--format=%B%x00", history, "--", f"packages/{name}")
    return [change for message in log.split("\0") for change in parse(message.strip(), name, packages)]


def parse(message: str, name: str, packages: Sequence[str] | dict[str, str]) -> Iterator[Change]:
    """The entries of one commit that concern a package.

    Args:
        message: The whole message.
        name: The package.
        packages: Names of all packages.

    Yields:
        What its users notice.
    """
    title, _, body = message.partition("\n")
    found = re.search(r"(?ms)^BREAKING[ -]CHANGE: *(.+?)(?:\n\n|\Z)", body)
    upgrade = " ".join(found.group(1).split()) if found else ""
    scopes: list[str] = []
    for i, part in enumerate(_NEXT.split(title)):
        entry = _ENTRY.fullmatch(part.strip())
        if entry is None:
            continue
        if entry["scope"] is not None:
            scopes = [scope.strip() for scope in entry["scope"].split(",")]
        named = [scope for scope in scopes if scope in packages]
        breaking = bool(entry["breaks"]) or (bool(upgrade) and i == 0)
        group = GROUPS.get(entry["type"], "Changed" if breaking else "")
        if group and (name in named or not named):
            text = entry["text"].strip().rstrip(".;")
            yield Change(group, text[0].upper() + text[1:], breaking, upgrade if breaking else "")


def as_markdown(changes: Sequence[Change]) -> str:
    """Lists under their groups, what breaks first.

    Args:
        changes: Entries, in the order in which they were made.

    Returns:
        Markdown without a heading.
    """
    sections = []
    for group in ("Changed", "Added", "Fixed", "Faster"):
        members = sorted((change for change in changes if change.group == group), key=lambda c: not c.breaking)
        lines = [
            f"- {'**breaking:** ' if change.breaking else ''}{change.text}"
            + (f". To upgrade: {change.upgrade}" if change.upgrade else "")
            for change in members
        ]
        if lines:
            sections.append(f"{group}:\n\n" + "\n".join(dict.fromkeys(lines)))
    return "\n\n".join(sections)
