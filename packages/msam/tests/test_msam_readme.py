"""The Python of the README and of the how-to page runs as it stands."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
HOW_TO = Path(__file__).parents[3] / "docs" / "how-to" / "train-flatter.md"


@pytest.mark.parametrize(("page", "blocks", "said"), [(README, 4, "sharpness_gap"), (HOW_TO, 4, "0.4 ")])
def test_every_block_runs_in_order(capsys, page, blocks, said):
    if not page.exists():
        pytest.skip("the page is not beside the tests of an installed wheel")
    found = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert len(found) >= blocks
    scope: dict[str, object] = {}
    for block in found:
        exec(compile(block, str(page), "exec"), scope)
    assert said in capsys.readouterr().out
