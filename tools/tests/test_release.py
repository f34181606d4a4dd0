import tomllib

import pytest
import release
from changes import Change, as_markdown, parse
from release import apply, home_page, last_version, main, plan
from version_windows import problems
from workspace import packages


@pytest.fixture
def released(repository):
    """Every package released once."""
    for planned in plan(repository.root):
        apply(planned, repository.root)
    return repository


@pytest.fixture
def change(released):
    def commit(package, message):
        released.write(f"packages/{package}/src/{package}/change.py", f"# {message}\n")
        released.commit(message)

    return commit


def summary(repository):
    return [(r.name, r.previous, r.version) for r in plan(repository.root)]


def test_the_first_release_takes_the_version_that_stands_there(repository):
    repository.write("packages/lonely/src/lonely/new.py", "")
    repository.commit("feat(lonely): a thing")
    first = {r.name: r for r in plan(repository.root)}
    assert list(first) == ["core", "lonely", "alpha", "beta"]
    assert first["lonely"].previous is None
    assert first["lonely"].version == "0.1.0"
    assert "- A thing" in first["lonely"].notes
    assert "A thing" not in first["core"].notes


@pytest.mark.parametrize(
    ("previous", "group", "breaking", "version"),
    [
        ("0.3.1", "Changed", True, "0.4.0"),
        ("1.3.1", "Changed", True, "2.0.0"),
        ("1.3.1", "Added", False, "1.4.0"),
        ("1.3.1", "Fixed", False, "1.3.2"),
    ],
)
def test_semantic_versions(previous, group, breaking, version):
    assert release.bumped(previous, [Change(group, "x", breaking)]) == version


def test_nothing_is_released_twice(released, change):
    assert summary(released) == []
    change("lonely", "docs(lonely): words")
    change("lonely", "test(lonely): more")
    assert summary(released) == []


@pytest.mark.parametrize(
    ("message", "version"),
    [
        ("fix(lonely): mend", "0.1.1"),
        ("perf(lonely): faster", "0.1.1"),
        ("feat(lonely): new", "0.2.0"),
        ("refactor(lonely)!: other names", "0.2.0"),
    ],
)
def test_the_type_of_a_commit_decides_the_version(released, change, message, version):
    change("lonely", message)
    assert summary(released) == [("lonely", "0.1.0", version)]


def test_a_fix_stays_in_the_windows_of_dependants(released, change):
    change("core", "fix(core): mend")
    assert summary(released) == [("core", "0.1.0", "0.1.1")]


@pytest.mark.parametrize(
    ("message", "core", "alpha"),
    [
        ("feat(core): a kernel; fix(alpha): a leak", ["Added: A kernel"], ["Fixed: A leak"]),
        ("feat(core,alpha): one thing.", ["Added: One thing"], ["Added: One thing"]),
        ("fix(core): a; perf: b; docs: c; feat(alpha): d", ["Fixed: A", "Faster: B"], ["Added: D"]),
        ("fix: everywhere", ["Fixed: Everywhere"], ["Fixed: Everywhere"]),
        ("feat(reader): a room", ["Added: A room"], ["Added: A room"]),
        ("feat(core): what; and then: a colon", ["Added: What; and then: a colon"], []),
        ("refactor(core)!: names; fix(alpha): x", ["Changed: Names"], ["Fixed: X"]),
        ("no type at all", [], []),
        ("docs(core): words", [], []),
    ],
)
def test_an_entry_belongs_to_the_packages_that_its_scope_names(message, core, alpha):
    def entries(name):
        return [f"{change.group}: {change.text}" for change in parse(message, name, ["core", "alpha"])]

    assert entries("core") == core
    assert entries("alpha") == alpha


def test_what_breaks_comes_first_and_says_how_to_upgrade(released, change):
    change("lonely", "fix(lonely): mend")
    change("lonely", "feat(lonely): calm")
    change("lonely", "feat(lonely): new names\n\nWhy.\n\nBREAKING CHANGE: write `b`\nfor `a`.\n\nSigned-off-by: X")
    (planned,) = plan(released.root)
    assert planned.version == "0.2.0"
    body = planned.notes.partition("\n\n")[2]
    assert body == ("Added:\n\n- **breaking:** New names. To upgrade: write `b` for `a`.\n- Calm\n\nFixed:\n\n- Mend")
    assert as_markdown([]) == ""


def test_what_the_authors_wrote_heads_the_notes_and_stands_alone_in_a_first_release(repository):
    log = "packages/lonely/CHANGELOG.md"
    repository.write(log, "# Changelog of lonely\n\n## Unreleased\n\nThe first one.\n")
    repository.commit("feat(lonely): a thing")
    first = {r.name: r for r in plan(repository.root)}["lonely"]
    assert first.notes.partition("\n\n")[2] == "The first one."
    apply(first, repository.root)
    repository.write(log, repository.read(log).replace("\n\n## 0.1.0", "\n\n## Unreleased\n\nRead this.\n\n## 0.1.0"))
    repository.commit("fix(lonely): a leak")
    second = {r.name: r for r in plan(repository.root)}["lonely"]
    assert second.notes.partition("\n\n")[2] == "Read this.\n\nFixed:\n\n- A leak"
    apply(second, repository.root)
    text = repository.read(log)
    assert "Unreleased" not in text
    assert text.index("## 0.1.1") < text.index("Read this.") < text.index("## 0.1.0") < text.index("The first one.")


def test_leaving_a_window_releases_the_dependants_with_new_windows(released, change):
    change("core", "feat(core): new")
    releases = plan(released.root)
    assert [(r.name, r.version, dict(r.windows)) for r in releases] == [
        ("core", "0.2.0", {}),
        ("alpha", "0.1.1", {"core>=0.1,<0.2": "core>=0.2,<0.3"}),
    ]
    for planned in releases:
        apply(planned, released.root)
    assert '"core>=0.2,<0.3"' in released.read("packages/alpha/pyproject.toml")
    assert "- core>=0.2,<0.3" in released.read("packages/alpha/CHANGELOG.md")
    assert problems(packages(released.root)) == []
    assert summary(released) == []
    change("alpha", "fix(alpha): mend")
    assert summary(released) == [("alpha", "0.1.1", "0.1.2")]


def test_a_window_keeps_its_extras_and_its_marker(repository):
    repository.package("alpha", ["core[cli]>=0.0.1,<0.1; python_version < '4'"])
    package = packages(repository.root)["alpha"]
    assert release.new_windows(package, {"core": "0.1.0"}) == {
        "core[cli]>=0.0.1,<0.1; python_version < '4'": "core[cli]>=0.1,<0.2; python_version < '4'"
    }


def test_apply_writes_version_log_commit_and_annotated_tag(released, change):
    change("lonely", "feat(lonely): second")
    change("lonely", "fix(lonely): third")
    (planned,) = plan(released.root)
    apply(planned, released.root)
    assert packages(released.root)["lonely"].version == "0.2.0"
    log = released.read("packages/lonely/CHANGELOG.md")
    assert log.startswith("# Changelog of lonely\n\n## 0.2.0 (")
    assert log.index("- Second") < log.index("- Third") < log.index("## 0.1.0")
    assert released.git("log", "-1", "--format=%s") == "chore(release): lonely 0.2.0"
    assert released.git("cat-file", "-t", "lonely-v0.2.0") == "tag"
    assert released.git("status", "--porcelain") == ""
    assert last_version(released.root, "lonely") == "0.2.0"


@pytest.mark.parametrize(
    "remote",
    [
        "https://example.org/group/papers.git",
        "https://token@example.org/group/papers",
        "git@example.org:group/papers.git",
        "ssh://git@example.org/group/papers.git",
    ],
)
def test_the_addresses_of_a_package_come_from_its_remote(released, change, remote):
    change("lonely", "feat(lonely): new")
    released.git("remote", "add", "origin", remote)
    for _ in range(2):  # written again, not twice
        (release,) = plan(released.root)
        apply(release, released.root)
        project = tomllib.loads(released.read("packages/lonely/pyproject.toml"))["project"]
        assert project["urls"] == {
            "Source": "https://example.org/group/papers",
            "Changelog": "https://example.org/group/papers/blob/HEAD/packages/lonely/CHANGELOG.md",
            "Issues": "https://example.org/group/papers/issues",
        }
        assert project["version"] == release.version
        assert project["dependencies"] == []
        assert released.read("packages/lonely/README.md") == (
            "![A](https://example.org/group/papers/raw/HEAD/packages/lonely/a.png) and "
            "[docs](https://example.org/group/papers/blob/HEAD/docs/x.md#y), [here](#z), [b](https://b.example)\n"
        )
        change("lonely", "fix(lonely): mend")


def test_a_remote_on_this_machine_is_no_address(released, tmp_path):
    assert home_page(released.root) is None
    released.git("remote", "add", "origin", str(tmp_path / "bare.git"))
    assert home_page(released.root) is None


def test_tags_are_ordered_as_versions(released, change):
    released.git("tag", "lonely-v0.10.0")
    released.git("tag", "lonely-v0.9.0")
    assert last_version(released.root, "lonely") == "0.10.0"


def test_dry_run_prints_and_changes_nothing(released, change, capsys):
    change("lonely", "feat(lonely): new")
    released.write("packages/lonely/dirty.txt", "x")
    before = released.git("rev-parse", "HEAD")
    assert main(["--dry-run"], released.root) == 0
    assert "lonely: 0.1.0 -> 0.2.0" in capsys.readouterr().out
    assert released.git("rev-parse", "HEAD") == before
    assert released.git("tag", "--list", "lonely-*") == "lonely-v0.1.0"


def test_a_dirty_work_tree_is_refused(released, capsys):
    released.write("packages/lonely/dirty.txt", "x")
    assert main([], released.root) == 2
    assert "work tree: expected no changes, got\n?? packages/lonely/dirty.txt" in capsys.readouterr().err


@pytest.fixture
def published(released, tmp_path_factory):
    """The released workspace with a bare remote that has everything."""
    remote = tmp_path_factory.mktemp("remote") / "remote.git"
    released.git("clone", "--quiet", "--bare", str(released.root), str(remote))
    released.git("remote", "add", "origin", str(remote))
    released.git("fetch", "--quiet", "origin")
    return released, remote


def test_the_printed_command_publishes_and_a_second_clone_has_nothing_to_release(published, tmp_path, capsys):
    repository, remote = published
    repository.write("packages/core/src/core/new.py", "")
    repository.commit("feat(core): new")
    assert main(["--no-wheels"], repository.root) == 0
    command = capsys.readouterr().out.strip().splitlines()[-1]
    assert command.startswith("git push --atomic origin main core-v0.2.0")
    repository.git(*command.split()[1:])
    clone = tmp_path / "clone"
    repository.git("clone", "--quiet", str(remote), str(clone))
    assert plan(clone) == []
    assert main(["--no-wheels"], clone) == 0
    assert "nothing to release" in capsys.readouterr().out


def test_a_branch_behind_its_remote_is_refused(published, tmp_path, capsys):
    repository, remote = published
    clone = tmp_path / "clone"
    repository.git("clone", "--quiet", str(remote), str(clone))
    repository.write("packages/core/src/core/new.py", "")
    repository.commit("feat(core): new")
    repository.git("push", "--quiet", "origin", "main")
    assert main(["--no-wheels"], clone) == 2
    assert "expected all commits of origin/main, 1 are missing" in capsys.readouterr().err


def test_a_shallow_clone_is_refused(published, tmp_path, capsys):
    repository, remote = published
    clone = tmp_path / "clone"
    repository.git("clone", "--quiet", "--depth=1", f"file://{remote}", str(clone))
    assert main(["--no-wheels"], clone) == 2
    assert "shallow clone" in capsys.readouterr().err


def test_a_step_that_fails_takes_everything_back(released, change, monkeypatch, capsys):
    change("core", "feat(core): new")
    change("lonely", "feat(lonely): new")
    before = released.git("rev-parse", "HEAD"), released.git("tag", "--list")

    def fail(names, root):
        raise ValueError("uv build: no space left")

    monkeypatch.setattr(release, "build", fail)
    assert main([], released.root) == 2
    assert "no space left" in capsys.readouterr().err
    assert (released.git("rev-parse", "HEAD"), released.git("tag", "--list")) == before
    assert released.git("status", "--porcelain") == ""


def test_a_tag_of_somebody_else_survives_the_way_back(released, change, capsys):
    change("lonely", "feat(lonely): new")
    released.git("tag", "lonely-v0.2.0", released.git("commit-tree", "HEAD^{tree}", "-m", "elsewhere"))
    assert main(["--no-wheels"], released.root) == 2
    assert "lonely-v0.2.0" in released.git("tag", "--list")


def test_the_first_release_of_this_workspace(tmp_path):
    """Release 0.1.0 of every package, end to end but for the wheels, in a throw-away clone with a bare remote."""
    remote, clone = tmp_path / "remote.git", tmp_path / "clone"
    run = release.run
    run(release.ROOT, "git", "clone", "--quiet", "--bare", "--no-hardlinks", str(release.ROOT), str(remote))
    for tag in run(remote, "git", "tag", "--list").split():
        run(remote, "git", "tag", "--delete", tag)
    run(tmp_path, "git", "clone", "--quiet", str(remote), str(clone))
    run(clone, "git", "checkout", "--quiet", "-B", "main", "origin/HEAD")
    for name, value in (("user.name", "Test"), ("user.email", "test@example.org")):
        run(clone, "git", "config", name, value)
    releases = release.release_all(clone, wheels=False)
    assert {r.name: r.version for r in releases} == {name: p.version for name, p in packages(clone).items()}
    assert all(r.notes.startswith(f"## {r.version} (") for r in releases)
    assert problems(packages(clone)) == []
    run(clone, "git", "push", "--quiet", "--atomic", "origin", "main", *(r.tag for r in releases))
    assert plan(clone) == []
