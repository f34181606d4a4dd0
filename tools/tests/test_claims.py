import json

import pytest
from claims import Results, main

CLAIMS = """
[[claim]]
text = "New is faster than old."
source = "1234.56789, abstract"
measured = "{times#rows.method=new.s:.1f} s"
peer = "old {times#rows.method=old.s:.1f} s"
seeds = "{times#seeds}"
holds = "times#rows.method=new.s < 0.5 * times#rows.method=old.s"
in_part = "times#rows.method=new.s < times#rows.method=old.s"
note = "by {times#rows.method=new.s:.0f} s | more"
"""

SCRIPT = """
import json, pathlib, sys

assert "--quick" in sys.argv
print("at work")
rows = [{"method": "new", "s": 1}, {"method": "old", "s": 9}]
out = pathlib.Path(sys.argv[sys.argv.index("-o") + 1])
(out / "times.json").write_text(json.dumps({"rows": rows, "seeds": 1}))
"""


@pytest.fixture
def root(repository):
    def write(new, old):
        rows = [{"method": "new", "s": new}, {"method": "old", "s": old}]
        repository.write("packages/core/reproduce/results/times.json", json.dumps({"rows": rows, "seeds": 5}))
        return repository.root

    repository.write("packages/core/reproduce/claims.toml", CLAIMS)
    return write


@pytest.mark.parametrize(
    ("new", "verdict"), [(1.0, "holds"), (3.0, "holds in part"), (4.0, "does not show at this scale")]
)
def test_the_figures_decide_the_verdict(root, new, verdict):
    assert main([], root(new, 4.0)) == 0
    page = (root(new, 4.0) / "docs" / "claims.md").read_text()
    row = f"| New is faster than old. (1234.56789, abstract) | {new} s | old 4.0 s | 5 | **{verdict}**: by {new:.0f} s"
    assert f"{row} \\| more |" in page
    assert f">{verdict}</b>" in (root(new, 4.0) / "out" / "claims.html").read_text()


def test_check_finds_a_page_whose_figures_have_moved(root, capsys):
    assert main([], root(1.0, 4.0)) == 0
    assert main(["--check"], root(1.0, 4.0)) == 0
    assert main(["--check"], root(3.0, 4.0)) == 1
    assert "stale" in capsys.readouterr().out


def test_quick_runs_every_script_once(root, repository, capfd):
    repository.write("packages/core/reproduce/times.py", SCRIPT)
    repository.write("packages/core/reproduce/_shared.py", "raise SystemExit(1)")
    repository.write("packages/lonely/reproduce/hours.py", "raise SystemExit(1)")  # has no quick form
    repository.write("packages/lonely/reproduce/claims.toml", CLAIMS.replace("times#", "hours#"))
    assert main(["--quick"], root(9.0, 4.0)) == 0
    assert main(["--quick"], repository.root) == 0
    assert capfd.readouterr().out.count("at work") == 1
    page = (repository.root / "out" / "reproduce-quick" / "claims.md").read_text()
    assert "**holds**" in page
    assert "lonely" not in page
    assert not (repository.root / "docs" / "claims.md").exists()


def test_a_script_that_fails_is_named_and_the_others_run(root, repository):
    repository.write("packages/alpha/reproduce/broken.py", 'raise SystemExit("--quick needs data")  # "--quick"')
    repository.write("packages/core/reproduce/times.py", SCRIPT)
    assert main(["--quick"], root(9.0, 4.0)) == 1
    page = (repository.root / "out" / "reproduce-quick" / "claims.md").read_text()
    assert "Failed, their claims left out: alpha broken.py." in page
    assert "**holds**" in page


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("absent#rows < 1", "absent.json"),
        ("times#none < 1", "none"),
        ("__import__('os')", "expected a comparison"),
        ("times#rows.method=new.s < 'x'", "expected a comparison"),
    ],
)
def test_a_rule_is_arithmetic_on_figures_that_exist(root, rule, message):
    results = Results(root(1.0, 4.0) / "packages" / "core" / "reproduce" / "results")
    with pytest.raises(ValueError, match=message):
        results.true(rule)
