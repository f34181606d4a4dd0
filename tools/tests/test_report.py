import json

import pytest
import report
from report import rendered, table

RESULTS = {
    "runs": [
        {"method": "sam", "accuracy": 0.912345, "epochs": 3, "time": {"cpu_s": 12.5}, "better": True},
        {"method": "msam", "accuracy": None, "epochs": 3, "time": {"cpu_s": 9.25}, "better": False},
    ],
    "best": {"accuracy": 0.9},
}


@pytest.fixture
def root(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    return tmp_path


def test_table_with_chosen_columns(root):
    mark = '<!-- table results.json#runs columns="method, time.cpu_s:.1f as CPU s, accuracy:.2f" -->'
    text = f"before\n\n{mark}\n| stale |\n<!-- end -->\n\nafter"
    expected = "| method | CPU s | accuracy |\n| --- | --: | --: |\n| sam | 12.5 | 0.91 |\n| msam | 9.2 | – |"
    fresh = rendered(text, root, "page.md")
    assert fresh == f"before\n\n{mark}\n{expected}\n<!-- end -->\n\nafter"
    assert rendered(fresh, root, "page.md") == fresh


def test_values_with_and_without_format(root):
    marks = (
        "<!-- value results.json#best.accuracy:.1% --><!-- end -->",
        "<!-- value results.json#runs.0.accuracy -->x<!-- end -->",
        "<!-- value results.json#runs.method=msam.time.cpu_s:.2f -->x<!-- end -->",
    )
    fresh = rendered(", ".join(marks), root, "page.md")
    assert "-->90.0%<!-- end -->" in fresh
    assert "-->0.9123<!-- end -->" in fresh
    assert "-->9.25<!-- end -->" in fresh


def test_all_columns_of_an_object_of_objects():
    text = table({"a": {"x": 1}, "b": {"x": True}}, None, "here")
    assert text == "| name | x |\n| --- | --: |\n| a | 1 |\n| b | yes |"


@pytest.mark.parametrize(
    ("file", "name", "source"),
    [
        ("a.py", "f", "@cache\ndef f(x):\n    return x"),
        ("a.py", "F", "class F:\n    y = 1"),
        ("a.py", "g", "g = f(\n    1\n)"),
        ("a.cpp", "row", "CLONES void row(int x,\n    int y) {\n  if (x) {\n    y = 1;\n  }\n}"),
    ],
)
def test_code_is_the_definition(tmp_path, file, name, source):
    before = "import f" if file == "a.py" else "// row: a comment"
    (tmp_path / file).write_text(f"{before}\n\n{source}\n\nlast = 1;\n")
    text = f"<!-- code {file}#{name} -->old<!-- end -->"
    language = "python" if file == "a.py" else "cpp"
    expected = f"<!-- code {file}#{name} -->\n```{language}\n{source}\n```\n<!-- end -->"
    assert rendered(text, tmp_path, "page.md") == expected


def test_code_that_is_gone_is_named(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"page.md: a.py: no definition of 'y'"):
        rendered("<!-- code a.py#y --><!-- end -->", tmp_path, "page.md")


def test_text_without_marks_is_left_alone(root):
    assert rendered("no <!-- comment --> here", root, "page.md") == "no <!-- comment --> here"


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        ("value absent.json#x", "page.md: expected JSON in absent.json"),
        ("value results.json#best.speed", "page.md: results.json: no 'speed' on the path 'best.speed'"),
        ("value results.json#runs.7.method", "no '7' on the path"),
        ("table results.json#best.accuracy", "expected objects to make a table of"),
        ('table results.json#runs columns="method, :.2f"', "expected a column such as"),
    ],
)
def test_what_cannot_be_filled_in_is_named(root, mark, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        rendered(f"<!-- {mark} --><!-- end -->", root, "page.md")


def test_check_finds_the_stale_page_and_the_run_without_it_mends_it(root, monkeypatch, capsys):
    page = root / "README.md"
    page.write_text("<!-- value results.json#best.accuracy -->1.0<!-- end -->")
    monkeypatch.setattr(report, "ROOT", root)
    monkeypatch.setattr(report, "pages", lambda: [page])
    monkeypatch.setattr("sys.argv", ["report.py", "--check"])
    assert report.main() == 1
    assert "README.md: out of date" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["report.py"])
    assert report.main() == 0
    assert page.read_text() == "<!-- value results.json#best.accuracy -->0.9<!-- end -->"
    monkeypatch.setattr("sys.argv", ["report.py", "--check"])
    assert report.main() == 0
