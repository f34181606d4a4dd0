import pytest
import release
from release import apply, last_version, main, plan
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
        ("0.3.1", "<!-- 3 -->Changed", True, "0.4.0"),
        ("1.3.1", "<!-- 3 -->Changed", True, "2.0.0"),
        ("1.3.1", "<!-- 0 -->Added", False, "1.4.0"),
        ("1.3.1", "<!-- 1 -->Fixed", False, "1.3.2"),
    ],
)
def test_semantic_versions(previous, group, breaking, version):
    assert release.bumped(previous, [{"group": group, "breaking": breaking}]) == version


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
