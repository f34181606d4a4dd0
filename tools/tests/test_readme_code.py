"""The Python of every package's README runs as written, block after block."""

import re
import subprocess
import sys

import pytest
from workspace import ROOT

READMES = sorted(ROOT.glob("packages/*/README.md"))


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_blocks_run(readme, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)
    assert blocks
    program = "\n".join(blocks)  # one session, as a reader runs them
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
