"""The tables of the papers, typed, and how a count is compared with a printed one; the facts are in published.yaml."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import ROUND_DOWN, ROUND_HALF_UP, Decimal
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

from ris_bench.located import Located, read

FILE = Path(__file__).with_name("published.yaml")

Agreement = Literal["both", "rounding", "truncation", "no"]


class Cell(NamedTuple):
    """A value as the paper prints it."""

    text: str
    """Without the dagger; "-" where the paper has a dash."""
    uncertain: bool
    """Whether reading or place could not be confirmed: to be shown with a dagger."""

    @property
    def unit(self) -> int:
        """What stands for K or M at the end of a count."""
        return {"K": 10**3, "M": 10**6}.get(self.text[-1], 1)

    @property
    def number(self) -> float | None:
        """In ones, or in percent; None of a dash. "150.21+M" is its lower bound."""
        return None if self.text == "-" else float(self.text.rstrip("KM").rstrip("+")) * self.unit


class Score(NamedTuple):
    """What a column of scores measures here."""

    dataset: str
    split: str
    metric: str

    @classmethod
    def of(cls, dataset: str, split: str, metric: str) -> Score:
        """That of a trial; where its data set is a mixture, a split is that of a part: "testA/refcoco"."""
        own, _, part = split.partition("/")
        return cls(part or dataset, own, metric)


class Average(NamedTuple):
    """What a column shows that is the mean over the others."""

    metric: str


@dataclass(frozen=True, kw_only=True)
class Paper:
    title: str
    authors: str
    venue: str
    arxiv: str


@dataclass(frozen=True, kw_only=True)
class Ours:
    """What stands for a row here: options that are not named are the defaults."""

    backbone: str
    method: str
    head: str = "etris"
    options: dict = field(default_factory=dict)
    """Of the method."""


@dataclass(frozen=True, kw_only=True)
class Row:
    name: str
    cells: Mapping[str, Cell]
    """By column."""
    about: Mapping[str, str]
    """What the paper says of the row beside its numbers: venue, backbone, group."""
    ours: Ours | None
    cited: bool
    """Whether the scores are as another paper printed them, so that their metric may be another one."""


@dataclass(frozen=True, kw_only=True)
class Table:
    paper: str
    """Key of `Published.papers`."""
    caption: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    prints: str | None
    """The metric as the paper names it; None in a table without scores."""
    computes: str | None
    """The metric of layout.METRICS that the released code computes for the paper's own rows."""

    def score(self, column: str) -> Score | None:
        """What a column measures; None where it shows a count or something else."""
        place, _, metric = column.partition(":")
        dataset, slash, split = place.partition("/")
        return Score(dataset, split, metric or self.computes or "") if slash else None

    def shows(self, column: str) -> Score | Average | str:
        """The same, an average, or the name of a count."""
        return self.score(column) or (Average(self.computes or "") if column == "avg" else column)


@dataclass(frozen=True, kw_only=True)
class Published:
    papers: Mapping[str, Paper]
    tables: Mapping[str, Table]


class Cited(NamedTuple):
    """A row of one published table, or of several that have a row of this name."""

    name: str
    about: Mapping[str, str]
    ours: Ours | None
    cells: Mapping[Score | Average | str, Cell]
    """By what their columns show."""
    cited: bool


def rows(tables: Sequence[str]) -> list[Cited]:
    """The rows of published tables, by name: those of a name are one row."""
    merged: dict[str, Cited] = {}
    for table in (load().tables[name] for name in tables):
        for row in table.rows:
            about, ours, cells, cited = merged.get(row.name, Cited(row.name, {}, None, {}, False))[1:]
            own = {table.shows(column): cell for column, cell in row.cells.items()}
            merged[row.name] = Cited(
                row.name, {**about, **row.about}, ours or row.ours, {**cells, **own}, cited or row.cited
            )
    return list(merged.values())


@cache
def load() -> Published:
    """All published tables. Raises UserError with file and line where the file is not what its head says."""
    top = read(FILE.read_text(encoding="utf-8"), lambda line: f"{FILE}:{line}")
    sections = top.keys("the file", ("papers", "tables"), ("papers", "tables"))
    papers = {key: item.record(Paper, key) for key, item in sections["papers"].mapping("papers").items()}
    tables = {key: _table(key, item) for key, item in sections["tables"].mapping("tables").items()}
    return Published(papers=papers, tables=tables)


def _table(name: str, item: Located) -> Table:
    required = ("paper", "caption", "columns", "rows")
    items = item.keys(name, (*required, "prints", "computes", "notes", "cited"), required)
    columns = items["columns"].typed(tuple[str, ...], "columns")
    written = items["rows"].mapping("rows")
    cited = items["cited"].typed(tuple[str, ...], "cited") if "cited" in items else ()
    if unknown := set(cited) - set(written):
        raise items["cited"].error(f"{name} has no row {unknown.pop()!r}")
    return Table(
        columns=columns,
        rows=tuple(_row(key, row, columns, key in cited) for key, row in written.items()),
        notes=items["notes"].typed(tuple[str, ...], "notes") if "notes" in items else (),
        **{key: items[key].typed(str, key) for key in ("paper", "caption")},
        **{key: items[key].typed(str, key) if key in items else None for key in ("prints", "computes")},
    )


def _row(name: str, item: Located, columns: tuple[str, ...], cited: bool) -> Row:
    items = item.keys(name, ("values", "about", "ours"), ("values",))
    values = items["values"].typed(str, "values").split()
    if len(values) != len(columns):
        raise items["values"].error(f"{name} has {len(values)} values for {len(columns)} columns; write - for a dash")
    return Row(
        name=name,
        cells={
            column: Cell(value.rstrip("†"), value.endswith("†")) for column, value in zip(columns, values, strict=True)
        },
        about=items["about"].plain() if "about" in items else {},
        ours=items["ours"].record(Ours, "ours") if "ours" in items else None,
        cited=cited,
    )


def agreement(count: int, printed: str) -> Agreement:
    """Whether a count printed like `printed` ("120.74M", "4.10K") is that: rounded (half up), truncated, or either."""
    number, decimals, unit = re.fullmatch(r"(\d+\.(\d+))([KM])", printed).groups()
    exact = Decimal(count) / {"K": 10**3, "M": 10**6}[unit]
    last = Decimal(1).scaleb(-len(decimals))
    rounded, truncated = (exact.quantize(last, mode) == Decimal(number) for mode in (ROUND_HALF_UP, ROUND_DOWN))
    if rounded and truncated:
        return "both"
    return "rounding" if rounded else "truncation" if truncated else "no"
