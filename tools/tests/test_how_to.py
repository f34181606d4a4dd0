"""Every how-to page runs from top to bottom: its shell and Python blocks, in one folder, in the order of the page.

A block after the line `<!-- not run: REASON -->` is left out: what needs a GPU, an index, or hours.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from workspace import ROOT

_BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>.+?) -->\n+)?^```(?P<kind>sh|python)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
OURS = {"benchmark", "install", "release", "reproduce"}  # what maintainers do, hours long or with an index
PAGES = [page for page in sorted((ROOT / "docs" / "how-to").glob("*.md")) if page.stem not in OURS]


def program(text: str) -> str:
    """One Python program of all blocks that run; those in Python share one session, as a reader's do."""
    parts = ["import subprocess"]
    for block in _BLOCK.finditer(text):
        if block["reason"]:
            continue
        code = block["code"]
        parts.append(code if block["kind"] == "python" else f"subprocess.run(['bash', '-euc', {code!r}], check=True)")
    return "\n".join(parts)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_runs(page: Path, tmp_path: Path) -> None:
    commands = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    variables = os.environ | {"PATH": commands, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    (tmp_path / "page.py").write_text(program(page.read_text(encoding="utf-8")))
    done = subprocess.run([sys.executable, "page.py"], cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def test_blocks_are_found_and_left_out():
    left_out = "<!-- not run: needs a GPU -->\n```python\nx\n```\n\n```yaml\na: b\n```\n"
    text = f"```sh\nls\n```\n\n{left_out}\n```python\ny = 1\n```\n"
    assert program(text) == "import subprocess\nsubprocess.run(['bash', '-euc', 'ls\\n'], check=True)\ny = 1\n"
