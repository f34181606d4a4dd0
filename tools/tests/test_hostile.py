import subprocess
import sys
from pathlib import Path

HOSTILE = Path(__file__).resolve().parents[1] / "hostile.py"


def _run(*arguments):
    return subprocess.run([sys.executable, HOSTILE, *arguments], capture_output=True, text=True)


def test_readers_of_a_package_run_in_a_process_of_their_own():
    done = _run("files", "core-tensor", "--rounds", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "readers of core-tensor, 12 cases: 0 failed" in done.stdout


def test_a_failure_and_a_death_are_reported_with_their_case(tmp_path):
    tests = tmp_path / "packages" / "bad" / "tests"
    tests.mkdir(parents=True)
    (tests / "hostile_readers.py").write_text(
        "import os\n"
        "def make(folder):\n    (folder / 'a').write_text('12345')\n    return folder / 'a'\n"
        "def keyed(path):\n    if path.read_text(errors='replace') != '12345':\n        raise KeyError('x')\n"
        "def dies(path):\n    if path.read_text(errors='replace') != '12345':\n        os._exit(139)\n"
        "READERS = [('keyed', make, keyed), ('dies', make, dies)]\n"
    )
    copy = tmp_path / "tools" / "hostile.py"
    copy.parent.mkdir()
    copy.write_text(HOSTILE.read_text())
    done = subprocess.run([sys.executable, copy, "files", "bad", "--rounds", "8"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "FAILED keyed, seed " in done.stdout
    assert "KeyError: 'x'" in done.stdout
    assert "the process died (139) at dies, seed " in done.stdout
