import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_example_runs(capsys):
    main = runpy.run_path(str(ROOT / "examples" / "rank_a_log.py"))["main"]
    found = main(6_000)
    assert set(found) == {"base rate", "logistic regression", "LightGBM", "lirank"}
    assert "scores of a request" in capsys.readouterr().out


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL))
def test_the_readme_runs(block):
    exec(compile(block, "README.md", "exec"), {})


def test_the_schema_of_the_readme_is_one():
    from lirank.schema.features import parse_schema

    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(parse_schema(text).features) == 6
