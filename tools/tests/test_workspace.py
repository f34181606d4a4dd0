import pytest
import workspace
from workspace import ROOT, affected, dependants, packages, requirement_name


@pytest.mark.parametrize(
    ("requirement", "name"),
    [
        ("torch", "torch"),
        ("core-tensor[cli]>=0.1,<0.2", "core-tensor"),
        (" Ruamel.Yaml_x ; python_version < '3.12'", "ruamel-yaml-x"),
        ("a @ file:///a.whl", "a"),
    ],
)
def test_requirement_name(requirement, name):
    assert requirement_name(requirement) == name


def test_requirement_without_a_name_is_refused():
    with pytest.raises(ValueError, match="begins with a name, got '>=1'"):
        requirement_name(">=1")


def test_dependencies_come_first(repository):
    assert list(packages(repository.root)) == ["core", "lonely", "alpha", "beta"]


def test_dependants_reach_through_others(repository):
    found = packages(repository.root)
    assert dependants(["core"], found) == {"core", "alpha", "beta"}
    assert dependants(["beta"], found) == {"beta"}
    with pytest.raises(ValueError, match="expected packages of the workspace, got unknown"):
        dependants(["unknown"], found)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("packages/core/src/core/__init__.py", ["core", "alpha", "beta"]),
        ("packages/alpha/tests/test_new.py", ["alpha", "beta"]),
        ("packages/lonely/README.md", ["lonely"]),
        ("packages/removed/gone.py", []),
        ("docs/index.md", []),
        ("README.md", []),
        ("pyproject.toml", ["core", "lonely", "alpha", "beta"]),
        ("unheard-of.toml", ["core", "lonely", "alpha", "beta"]),
    ],
)
def test_affected_by_a_changed_file(repository, path, expected):
    old = (repository.root / path).read_text() if (repository.root / path).exists() else ""
    repository.write(path, f"{old}\n# changed\n")
    assert affected("main", repository.root) == expected  # uncommitted or untracked
    repository.git("switch", "--quiet", "--create", "branch")
    repository.commit("feat: change")
    assert affected("main", repository.root) == expected
    assert affected("HEAD", repository.root) == []


def test_affected_ignores_what_the_other_branch_did(repository):
    repository.git("branch", "branch")
    repository.write("packages/lonely/src/lonely/__init__.py", "x = 1\n")
    repository.commit("feat(lonely): x")
    repository.git("switch", "--quiet", "branch")
    repository.write("packages/beta/src/beta/__init__.py", "x = 1\n")
    repository.commit("feat(beta): x")
    assert affected("main", repository.root) == ["beta"]


def test_a_rename_touches_both_packages(repository):
    repository.write("packages/lonely/src/lonely/data.txt", "moved\n" * 20)
    repository.commit("feat(lonely): data")
    repository.git("mv", "packages/lonely/src/lonely/data.txt", "packages/beta/src/beta/data.txt")
    assert affected("HEAD", repository.root) == ["lonely", "beta"]


def test_unknown_reference_is_named(repository):
    with pytest.raises(ValueError, match="a commit that git knows, got 'nowhere'"):
        affected("nowhere", repository.root)


def test_command_line_prints_names_and_refuses_bad_ones(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["workspace.py", "packages"])
    assert workspace.main() == 0
    assert capsys.readouterr().out.split()[0] == "core-tensor"
    monkeypatch.setattr("sys.argv", ["workspace.py", "dependants", "nothing"])
    assert workspace.main() == 2
    assert "got nothing" in capsys.readouterr().err


def test_this_workspace_has_one_rule_for_names():
    for name, package in packages(ROOT).items():
        assert package.folder.name == name
        assert (package.folder / "src" / name.replace("-", "_") / "py.typed").exists()
