import lock
import pytest
from lock import read_pins, unmet

HASH = " \\\n    --hash=sha256:00"


def _root(tmp_path, *stated):
    (tmp_path / "packages" / "a").mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text("")
    listed = ", ".join(f'"{requirement}"' for requirement in stated)
    (tmp_path / "packages" / "a" / "pyproject.toml").write_text(f'[project]\nname = "a"\ndependencies = [{listed}]\n')
    return tmp_path


def test_the_tracked_lock_satisfies_the_workspace():
    assert lock.main(["check"]) == 0


@pytest.mark.parametrize(
    ("stated", "python", "message"),
    [
        ("numpy>=2", "3.11", None),
        ("numpy>=2.5", "3.11", "the lock has 2.4.6 for Python 3.11"),
        ("numpy>=2.5", "3.12", None),
        ("Scipy", "3.12", "not in the lock"),
        ("scipy ; python_version < '3.12'", "3.12", None),
        ("a[plot]", "3.12", None),
    ],
)
def test_unmet_requirements_are_named(tmp_path, stated, python, message):
    entries = ("numpy==2.4.6 ; python_full_version < '3.12'", "numpy==2.5.4 ; python_full_version >= '3.12'")
    pins = read_pins("# comment\n# another\n" + "\n".join(entry + HASH for entry in entries))
    found = unmet(_root(tmp_path, stated), pins, python)
    assert bool(found) == bool(message)
    assert all(message in line and "packages/a/pyproject.toml" in line for line in found)


@pytest.mark.parametrize("entry", ["numpy>=2" + HASH, "numpy==2.4.6"])
def test_an_entry_without_version_or_hash_is_refused(entry):
    with pytest.raises(ValueError, match="expected a version and hashes"):
        read_pins(entry)
