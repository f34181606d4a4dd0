"""MPS files: what the format means where readers differ, what is refused, and Netlib written and read again."""

import gzip

import numpy as np
import pytest
import scipy.sparse
from core_tensor.dev.testing import shared_data
from polytope_lp import read_mps, solve

RANGES = """* a comment
NAME          ranges in free format
OBJSENSE
    MAX
ROWS
 N cost
 N another
 L limit
 G least
 E up
 E down
COLUMNS
 x cost 1 limit 1
 x least 1 another 5
 y cost 2. limit 1 $ a comment
 y up 1
 z cost 1D-1 down 1
RHS
 RHS limit 4 least 1
 RHS up 1 down 1
 RHS cost -10
RANGES
 limit 2
 least 3
 up 0.5
 down -0.5
BOUNDS
 UP BND x 3
 FR BND z
ENDATA
"""


def _write(path, text):
    path.write_text(text)
    return path


def test_ranges_senses_and_constants_mean_what_the_format_says(tmp_path):
    model = read_mps(_write(tmp_path / "m.mps", RANGES))
    assert model.columns == ("x", "y", "z")
    assert model.rows == ("limit", "limit", "least", "least", "up", "up", "down", "down")
    sides = {}
    for row, a, b in zip(model.rows, model.lp.A.toarray(), model.lp.b, strict=True):
        sides.setdefault(row, []).append(b * np.sign(a[a != 0][0]))
    ends = {row: (min(ends), max(ends)) for row, ends in sides.items()}
    assert ends == {"limit": (2, 4), "least": (1, 4), "up": (1, 1.5), "down": (0.5, 1)}
    found = solve(model.lp, 1e-9)
    # x <= 3, x + y <= 4, y in [1, 1.5], z <= 1
    assert model.value(found.objective) == pytest.approx(2.5 + 2 * 1.5 + 0.1 + 10)
    with gzip.open(tmp_path / "m.mps.gz", "wt") as file:
        file.write(RANGES)
    assert read_mps(tmp_path / "m.mps.gz").name == model.name


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ([], (0, np.inf)),
        (["UP B x -2"], (-np.inf, -2)),
        (["LO B x -5", "UP B x -2"], (-5, -2)),
        (["UP x 4"], (0, 4)),
        (["FX B x 3"], (3, 3)),
        (["FR B x"], (-np.inf, np.inf)),
        (["MI B x", "UP B x 1"], (-np.inf, 1)),
        (["UP B x 1e30"], (0, np.inf)),
        (["LO B x -1e20"], (-np.inf, np.inf)),
        (["PL x"], (0, np.inf)),
    ],
)
def test_bounds(tmp_path, bounds, expected):
    lines = ["NAME", "ROWS", " N c", " L r", "COLUMNS", " x c 1 r 1", "RHS", " r 1", "BOUNDS"]
    text = "\n".join([*lines, *(f" {line}" for line in bounds), "ENDATA", ""])
    lower, upper = read_mps(_write(tmp_path / "b.mps", text)).lp.box()
    assert (lower[0], upper[0]) == expected


@pytest.mark.parametrize(
    ("lines", "value"),
    [
        (["RHS", " R low 3 high 4", "RANGES", " G low 1e20"], 3.0),  # cuOpt 1806: a range without an end
        (["RHS", " R low 3 high 4", "RANGES", " G low inf high 1e30"], 3.0),
        (["RHS", " R low 3 high 1e20"], 3.0),
        (["RHS", " R low -inf high 4"], 0.0),
    ],
)
def test_a_side_without_an_end_is_none(tmp_path, lines, value):
    head = ["NAME", "ROWS", " N c", " G low", " L high", "COLUMNS", " x c 1 low 1", " x high 1"]
    model = read_mps(_write(tmp_path / "o.mps", "\n".join([*head, *lines, "ENDATA", ""])))
    found = solve(model.lp, 1e-9)
    assert model.value(found.objective) == pytest.approx(value, abs=1e-9)
    assert found.verify()["ok"]


@pytest.mark.parametrize(
    ("bounds", "upper"), [([], 1.0), (["LO B x 0"], np.inf), (["UP B x 9"], 9.0), (["PL x"], np.inf)]
)
def test_relaxed_integers_without_a_bound_are_at_most_one(tmp_path, bounds, upper):
    lines = ["NAME", "ROWS", " N c", " L r", "COLUMNS", " M 'MARKER' 'INTORG'", " x c 1 r 1", " M 'MARKER' 'INTEND'"]
    lines += [
        " y c 1 r 1",
        "RHS",
        " r 1",
        *(["BOUNDS"] if bounds else []),
        *(f" {line}" for line in bounds),
        "ENDATA",
        "",
    ]
    box = read_mps(_write(tmp_path / "i.mps", "\n".join(lines)), relax=True).lp.box()
    assert box[1].tolist() == [upper, np.inf]


GOOD = "NAME t\nROWS\n N c\n L r\nCOLUMNS\n x c 1 r 1\nRHS\n B r 1\nBOUNDS\n UP B x 1\nENDATA\n"


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        (" x c 1 r 1", " x c 1 s 1", "line 6: row 's' is not in ROWS"),
        (" x c 1 r 1", " x c 1 c 2", "names row 'c' twice"),
        (" x c 1 r 1", " x c 1 r", "one or two names with a number each"),
        (" x c 1 r 1", " x c 1 r one", "expected a number, got 'one'"),
        (" x c 1 r 1", " x c 1 r nan", "got NaN"),
        (" x c 1 r 1", " x c inf", "expected a finite number"),
        (" x c 1 r 1", " M1 'MARKER' 'INTORG'\n x c 1 r 1", "integer variables"),
        (" B r 1", " B r -1e20", "RHS of row 'r': expected a finite number"),
        (" B r 1", " B r inf\nRANGES\n G r 1", "finite right-hand side for its range"),
        (" UP B x", " BV B x", "relax takes integers"),
        (" L r", " X r", "row's type"),
        (" L r", " L r\n L r", "appears twice"),
        (" N c\n", "", "is not in ROWS"),
        ("UP B x", "UP B y", "bound of a column"),
        ("UP B x", "SC B x", "bound SC"),
        (" UP B x 1", " UP B x 1\n LO C x 0", "expected one set"),
        (" UP B x 1", " LO B x 2\n UP B x 1", "above its upper bound"),
        (" B r 1", " B r 1\n B r 2", "names row 'r' twice"),
        ("BOUNDS", "QUADOBJ", "section 'QUADOBJ'"),
        ("ENDATA", "", "no ENDATA"),
        ("NAME t", "not a model", "section 'not'"),
    ],
)
def test_what_is_no_linear_program_is_refused_with_its_line(tmp_path, old, new, match):
    assert solve(read_mps(_write(tmp_path / "g.mps", GOOD)).lp).status == "optimal"
    with pytest.raises(ValueError, match=match):
        read_mps(_write(tmp_path / "w.mps", GOOD.replace(old, new)))


def test_binary_and_missing_files_are_refused(tmp_path):
    (tmp_path / "b.mps").write_bytes(bytes(range(256)))
    with pytest.raises(ValueError, match="an MPS file"):
        read_mps(tmp_path / "b.mps")
    with pytest.raises(ValueError, match="no such file"):
        read_mps(tmp_path / "none.mps")


@pytest.mark.parametrize("name", ["AFIRO", "ADLITTLE", "SHARE2B", "KB2", "RECIPE", "CAPRI"])
def test_netlib_written_as_mps_reaches_the_published_optimum(tmp_path, read_netlib, name):
    z, optimum = read_netlib(shared_data("netlib_lp", f"{name}.npz"))
    c = z["c"]
    rows = [(kind, z[f"A_{side}"], z[f"b_{side}"]) for kind, side in (("L", "ub"), ("E", "eq")) if f"b_{side}" in z]
    lines = [f"NAME {name}", "ROWS", " N cost"]
    entries, right = [(j, "cost", v) for j, v in enumerate(c) if v], []
    for kind, A, b in rows:
        A = scipy.sparse.coo_array(A)
        lines += [f" {kind} {kind}{i}" for i in range(b.size)]
        entries += [(j, f"{kind}{i}", v) for i, j, v in zip(A.row, A.col, A.data, strict=True)]
        right += [f" B {kind}{i} {float(v)!r}" for i, v in enumerate(b) if v]
    entries.sort(key=lambda entry: entry[0])
    lines += ["COLUMNS", *(f" x{j} {row} {float(v)!r}" for j, row, v in entries), "RHS", *right, "BOUNDS"]
    for j, (low, high) in enumerate(z["bounds"] or [(0, None)] * c.size):
        lines += [f" MI b x{j}" if low is None or np.isinf(low) else f" LO b x{j} {float(low)!r}"]
        lines += [] if high is None or np.isinf(high) else [f" UP b x{j} {float(high)!r}"]
    model = read_mps(_write(tmp_path / "n.mps", "\n".join([*lines, "ENDATA", ""])))
    found = solve(model.lp, 1e-7)
    assert found.verify()["ok"]
    assert model.value(found.objective) == pytest.approx(optimum, rel=1e-6)
