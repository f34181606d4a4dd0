import pytest
from version_windows import main, problems, window
from workspace import packages


@pytest.mark.parametrize(
    ("version", "expected"),
    [("0.1.0", ">=0.1,<0.2"), ("0.12.3", ">=0.12,<0.13"), ("1.4.2", ">=1.4,<2"), ("2.0.0", ">=2.0,<3")],
)
def test_window(version, expected):
    assert window(version) == expected


def test_windows_that_hold_are_silent(repository):
    assert problems(packages(repository.root)) == []


@pytest.mark.parametrize(
    ("requirement", "message"),
    [
        ("core>=0.2,<0.3", "alpha: core>=0.2,<0.3 does not hold core 0.1.0; expected core>=0.1,<0.2"),
        ("core", "alpha: expected a window such as core>=0.1,<0.2, got core"),
        ("core>=0.1", "alpha: expected a window such as core>=0.1,<0.2, got core>=0.1"),
    ],
)
def test_a_bad_window_is_named_with_the_right_one(repository, requirement, message):
    repository.package("alpha", [requirement])
    assert problems(packages(repository.root)) == [message]
    assert main(repository.root) == 1


def test_this_workspace():
    assert main() == 0
