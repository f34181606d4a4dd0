import pytest
from paper_map import Entry, entries, has_function, has_test, main, problems

PAGE = """\
# A package

| Equation | Function | Test |
| --- | --- | --- |
| Eq. 3: $|x|$ | `workspace.packages` | `test_a.py::test_first`, `test_second` |
| `not a name` | {function} | {test} |

| Other | Table |
| --- | --- |
| `nothing` | `checks this` |
"""


@pytest.fixture
def page(repository):
    code = "def test_first(): ...\nclass TestB:\n    def test_second(): ..."
    repository.write("packages/alpha/tests/deep/test_a.py", code)

    def write(function="`workspace.Package.version`", test="`tests/deep/test_a.py`"):
        repository.write("docs/packages/alpha.md", PAGE.format(function=function, test=test))
        return problems(repository.root)

    return write


def test_only_the_two_columns_are_read():
    found = list(entries(PAGE.format(function="`f()` and `g`", test="–")))
    assert found == [
        Entry(5, "function", "workspace.packages"),
        Entry(5, "test", "test_a.py::test_first"),
        Entry(5, "test", "test_second"),
        Entry(6, "function", "f"),
        Entry(6, "function", "g"),
    ]


def test_a_page_whose_names_exist_is_silent(page):
    assert page() == []


@pytest.mark.parametrize(
    ("column", "name"),
    [
        ("function", "workspace.nothing"),
        ("function", "no_such_module.function"),
        ("function", "two words"),
        ("test", "test_third"),
        ("test", "test_b.py"),
        ("test", "test_a.py::test_third"),
    ],
)
def test_a_name_that_does_not_exist_is_reported_with_its_line(page, column, name):
    assert page(**{column: f"`{name}`"}) == [f"docs/packages/alpha.md:6: no {column} {name}"]


def test_a_page_without_a_map_is_reported(repository):
    repository.write("docs/packages/alpha.md", "# alpha\n")
    assert problems(repository.root) == ["docs/packages/alpha.md: expected a table with the columns Function and Test"]


def test_functions_are_found_with_and_without_the_package():
    assert has_function("core_tensor.pack_bits", "quantease")
    assert has_function("pack_bits", "core-tensor")
    assert has_function("ops.bit_packing.reference.pack_bits", "core-tensor")
    assert not has_function("pack_bits", "quantease")


def test_parametrised_and_nested_tests_are_found(repository):
    repository.write("packages/alpha/tests/test_a.py", "class TestB:\n    def test_c(self): ...")
    tests = repository.root / "packages" / "alpha" / "tests"
    assert has_test("test_a.py::TestB::test_c[3]", tests)
    assert not has_test("test_a.py::test_d", tests)


def test_this_repository():
    assert main() == 0
