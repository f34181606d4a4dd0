"""Linear programs from MPS files: free format, and fixed format where names hold no blanks.

What readers differ in is decided as HiGHS and CPLEX do: an upper bound below zero on a variable without a lower bound
frees it below; a range on an equation lies on the side of its sign; a right-hand side of the objective is its constant
with the opposite sign; sizes of 1e20 and more are infinite; an integer variable without any bound is at most 1. Where
they guess (an unknown name, an entry that appears twice, an integer variable) this one refuses, with the number of the
line.
"""

import gzip
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
from core_tensor.app.files import reading
from numpy.typing import NDArray

from polytope_lp.general.block_lp import BlockLP

INFINITE = 1e20
_SECTIONS = ("NAME", "OBJSENSE", "ROWS", "COLUMNS", "RHS", "RANGES", "BOUNDS", "ENDATA")
_SENSES = {"MAX": True, "MAXIMIZE": True, "MIN": False, "MINIMIZE": False}
_SEMI = ("SC", "SI")
_VALUED, _PLAIN, _INTEGER = ("UP", "LO", "FX"), ("FR", "MI", "PL"), ("BV", "LI", "UI", *_SEMI)


@dataclass(frozen=True, eq=False)
class MpsModel:
    """An LP with the names of its file.

    Attributes:
        name: What the file calls it.
        lp: The LP, minimized; a row with a range is two of its rows.
        columns: Names of the variables.
        rows: Names of the LP's rows, inequalities first.
        signs: 1.0 for rows as the file has them, -1.0 for those that a `>=` became, shape (rows,), float64.
        constant: What the objective holds beside $c'x$.
        maximize: Whether the file maximizes; `lp` then holds the negative costs.
    """

    name: str
    lp: BlockLP
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    signs: NDArray[np.float64]
    constant: float
    maximize: bool

    def value(self, objective: float) -> float:
        """An objective or bound of `lp` as the file means it.

        Args:
            objective: Value of $c'x$ in `lp`.

        Returns:
            With the file's sense and constant.
        """
        return (-objective if self.maximize else objective) + self.constant

    def duals(self, lam: NDArray[np.float64]) -> NDArray[np.float64]:
        """What one more unit of each row's right-hand side adds to the objective, as the file means both.

        Args:
            lam: Multipliers of `lp`, shape (rows,).

        Returns:
            Dual values, shape (rows,); adding 0.0 leaves no negative zeros.
        """
        return (self.signs if self.maximize else -self.signs) * lam + 0.0

    def multipliers(self, duals: NDArray[np.float64]) -> NDArray[np.float64]:
        """The inverse of `duals`.

        Args:
            duals: Dual values, shape (rows,).

        Returns:
            Multipliers of `lp`, shape (rows,).
        """
        return self.duals(duals)


def read_mps(path: str | Path, *, relax: bool = False) -> MpsModel:
    """Read an MPS file, also compressed (`.gz`).

    Args:
        path: The file.
        relax: Whether integer variables are taken as continuous; refused if not.

    Returns:
        The LP and its names.

    Raises:
        ValueError: If the file is missing, damaged, ambiguous, or no linear program.
    """
    file = Path(path)
    if not file.exists():
        raise ValueError(f"{file}: no such file")
    parser = _Parser(relax)
    with (
        reading(file, "an MPS file"),
        gzip.open(file, "rt") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines,
    ):
        for number, line in enumerate(lines, 1):
            try:
                parser.take(line)
            except (ValueError, KeyError) as error:
                raise ValueError(f"line {number}: {error.args[0]}") from error
        return parser.model()


@dataclass
class _Parser:
    """The state between two lines."""

    relax: bool
    name: str = ""
    section: str = ""
    maximize: bool = False
    integer: bool = False
    integers: set[int] = field(default_factory=set)
    objective: str | None = None
    ignored: set[str] = field(default_factory=set)
    kinds: dict[str, str] = field(default_factory=dict)
    columns: dict[str, int] = field(default_factory=dict)
    entries: dict[tuple[str, int], float] = field(default_factory=dict)
    right: dict[str, float] = field(default_factory=dict)
    ranges: dict[str, float] = field(default_factory=dict)
    lower: dict[int, float] = field(default_factory=dict)
    upper: dict[int, float] = field(default_factory=dict)
    sets: dict[str, str] = field(default_factory=dict)

    def take(self, line: str) -> None:
        # One line: a section's title starts in the first column, everything else behind it.
        fields = line.split()
        fields = fields[: next((at for at, text in enumerate(fields) if text.startswith("$")), None)]  # a comment
        if not fields or line.startswith("*") or self.section == "ENDATA":
            return
        if not line[0].isspace():
            self._begin(fields)
            return
        handlers: dict[str, Callable[[list[str]], None]] = {
            "OBJSENSE": lambda f: self._sense(f[0]),
            "ROWS": self._row,
            "COLUMNS": self._column,
            "RHS": lambda f: self._amounts(f, self.right),
            "RANGES": lambda f: self._amounts(f, self.ranges),
            "BOUNDS": self._bound,
        }
        if self.section not in handlers:
            raise ValueError(f"expected a section, got {line.strip()!r}")
        handlers[self.section](fields)

    def _begin(self, fields: list[str]) -> None:
        title = fields[0].upper()
        if title not in _SECTIONS:
            raise ValueError(f"section {fields[0]!r} is none of a linear program: {', '.join(_SECTIONS)}")
        self.section = title
        if title == "NAME":
            self.name = " ".join(fields[1:])
        elif title == "OBJSENSE" and len(fields) > 1:
            self._sense(fields[1])

    def _sense(self, word: str) -> None:
        if word.upper() not in _SENSES:
            raise ValueError(f"OBJSENSE: expected MAX or MIN, got {word!r}")
        self.maximize = _SENSES[word.upper()]

    def _row(self, fields: list[str]) -> None:
        if len(fields) != 2 or fields[0].upper() not in "NLGE":
            raise ValueError(f"expected a row's type (N, L, G, E) and name, got {' '.join(fields)!r}")
        kind, name = fields[0].upper(), fields[1]
        if name in self.kinds or name in self.ignored or name == self.objective:
            raise ValueError(f"row {name!r} appears twice")
        if kind != "N":
            self.kinds[name] = kind
        elif self.objective is None:
            self.objective = name
        else:
            self.ignored.add(name)  # a free row restricts nothing

    def _column(self, fields: list[str]) -> None:
        if len(fields) == 3 and fields[1] == "'MARKER'":
            self.integer = fields[2] == "'INTORG'"
            if self.integer and not self.relax:
                raise ValueError("integer variables: expected a linear program (relax takes them as continuous)")
            return
        column = self.columns.setdefault(fields[0], len(self.columns))
        if self.integer:
            self.integers.add(column)
        for row, value in _pairs(fields[1:]):
            if row in self.ignored:
                continue
            self._known(row)
            if (row, column) in self.entries:
                raise ValueError(f"column {fields[0]!r} names row {row!r} twice")
            self.entries[row, column] = value

    def _known(self, row: str) -> None:
        if row not in self.kinds and row != self.objective:
            raise ValueError(f"row {row!r} is not in ROWS")

    def _one_set(self, name: str) -> None:
        # A file may hold several right-hand sides, ranges or bounds to choose from.
        if self.sets.setdefault(self.section, name) != name:
            raise ValueError(f"{self.section}: expected one set, got {self.sets[self.section]!r} and {name!r}")

    def _amounts(self, fields: list[str], into: dict[str, float]) -> None:
        if len(fields) % 2:
            self._one_set(fields[0])
        for row, value in _pairs(fields[len(fields) % 2 :], infinite=True):
            if row in self.ignored:
                continue
            self._known(row)
            open_side = into is self.ranges or (self.kinds.get(row), value) in {("L", math.inf), ("G", -math.inf)}
            if math.isinf(value) and not open_side:
                raise ValueError(f"{self.section} of row {row!r}: expected a finite number, got {value:g}")
            if row in into:
                raise ValueError(f"{self.section} names row {row!r} twice")
            if row == self.objective and into is self.ranges:
                raise ValueError("RANGES: the objective has none")
            into[row] = value

    def _bound(self, fields: list[str]) -> None:
        kind, rest = fields[0].upper(), fields[1:]
        if kind in _INTEGER and (not self.relax or kind in _SEMI):
            hint = "" if kind in _SEMI else " (relax takes integers as continuous)"
            raise ValueError(f"bound {kind}: expected a linear program{hint}")
        valued = kind in (*_VALUED, "LI", "UI")
        if not valued and kind not in (*_PLAIN, "BV"):
            raise ValueError(f"bound {fields[0]!r}: expected one of {', '.join((*_VALUED, *_PLAIN))}")
        if not valued and len(rest) == 3:  # some writers put a number behind FR, MI and PL
            _number(rest.pop())
        if len(rest) == 2 + valued:
            self._one_set(rest.pop(0))
        if len(rest) != 1 + valued or rest[0] not in self.columns:
            raise ValueError(f"expected a bound of a column of COLUMNS, got {' '.join(fields)!r}")
        self._limit(kind, self.columns[rest[0]], _number(rest[1]) if valued else math.nan)

    def _limit(self, kind: str, column: int, value: float) -> None:
        if kind in {"UP", "UI"}:
            self.upper[column] = value
            if value < 0 and column not in self.lower:
                self.lower[column] = -math.inf
        elif kind in {"LO", "LI"}:
            self.lower[column] = value
        elif kind == "FX":
            self.lower[column] = self.upper[column] = value
        elif kind == "BV":
            self.lower[column], self.upper[column] = 0.0, 1.0
        else:
            if kind in {"FR", "MI"}:
                self.lower[column] = -math.inf
            if kind in {"FR", "PL"}:
                self.upper[column] = math.inf

    def model(self) -> MpsModel:
        # The sections put together.
        if self.section != "ENDATA" or not self.columns or self.objective is None:
            lacks = "ENDATA" if self.section != "ENDATA" else "columns" if not self.columns else "a row of type N"
            raise ValueError(f"no {lacks}: the file is cut off or empty")
        n, numbers = len(self.columns), {name: at for at, name in enumerate(self.kinds)}
        sign = -1.0 if self.maximize else 1.0
        c, kept = np.zeros(n), [(key, value) for key, value in self.entries.items() if key[0] != self.objective]
        for (row, column), value in self.entries.items():
            if row == self.objective:
                c[column] = sign * value
        at = ([numbers[row] for (row, _), _ in kept], [column for (_, column), _ in kept])
        A = scipy.sparse.csr_array(([value for _, value in kept], at), shape=(len(numbers), n))
        sides = list(self._sides())
        ub = [(numbers[row], s, b, row) for row, s, b, equal in sides if not equal]
        eq = [(numbers[row], s, b, row) for row, s, b, equal in sides if equal]
        bounds = np.stack([np.zeros(n), np.full(n, np.inf)], 1)
        bounds[sorted(self.integers), 1] = 1.0
        bounds[sorted(self.integers & (self.lower.keys() | self.upper.keys())), 1] = np.inf
        for side, found in enumerate((self.lower, self.upper)):
            for column, value in found.items():
                bounds[column, side] = value
        below = np.flatnonzero(bounds[:, 0] > bounds[:, 1])
        if below.size:
            name = list(self.columns)[int(below[0])]
            raise ValueError(f"column {name!r}: its lower bound is above its upper bound")
        lp = BlockLP.build(c, *_signed(A, ub), *_signed(A, eq), bounds=bounds)
        names, signs = tuple(row for *_, row in (*ub, *eq)), np.array([sign for _, sign, _, _ in (*ub, *eq)])
        constant = -self.right.get(self.objective, 0.0)
        return MpsModel(self.name, lp, tuple(self.columns), names, signs, constant, self.maximize)

    def _sides(self) -> Iterator[tuple[str, float, float, bool]]:
        # Row, sign, right-hand side and whether it is an equation; two for a range.
        for row, kind in self.kinds.items():
            b, r = self.right.get(row, 0.0), self.ranges.get(row)
            low, high = (b if kind != "L" else -math.inf), (b if kind != "G" else math.inf)
            if r is not None and math.isinf(b):
                raise ValueError(f"row {row!r}: expected a finite right-hand side for its range")
            if r is not None:
                low = b - abs(r) if kind == "L" or (kind == "E" and r < 0) else low
                high = b + abs(r) if kind == "G" or (kind == "E" and r > 0) else high
            if low == high:
                yield row, 1.0, b, True
                continue
            if math.isfinite(high):
                yield row, 1.0, high, False
            if math.isfinite(low):
                yield row, -1.0, low, False


def _signed(A: scipy.sparse.csr_array, rows: list[tuple[int, float, float, str]]) -> tuple[Any, Any]:
    # Rows of A, each with its sign, and their right-hand sides.
    if not rows:
        return None, None
    signs = np.array([sign for _, sign, _, _ in rows])
    picked = scipy.sparse.diags_array(signs) @ A[[at for at, _, _, _ in rows]]
    return picked, signs * np.array([b for _, _, b, _ in rows])


def _pairs(fields: list[str], *, infinite: bool = False) -> Iterator[tuple[str, float]]:
    if len(fields) not in {2, 4}:
        raise ValueError(f"expected one or two names with a number each, got {' '.join(fields)!r}")
    for at in range(0, len(fields), 2):
        value = _number(fields[at + 1])
        if math.isinf(value) and not infinite:
            raise ValueError(f"expected a finite number, got {fields[at + 1]!r}")
        yield fields[at], value


def _number(text: str) -> float:
    try:
        value = float(text.upper().replace("D", "E")) if text[-1].isdigit() or text[-1] == "." else float(text)
    except ValueError:
        raise ValueError(f"expected a number, got {text!r}") from None
    if math.isnan(value):
        raise ValueError("expected a number, got NaN")
    return math.copysign(math.inf, value) if abs(value) >= INFINITE else value
