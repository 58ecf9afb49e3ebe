"""What a table shows: its rows, its columns, and which of them an experiment can fill."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

from ris_bench import published
from ris_bench.located import Located
from ris_bench.records import Choice, Cost, Params
from ris_bench.search import NUMBER

if TYPE_CHECKING:
    from ris_bench.experiment import Run
    from ris_bench.search import Search

METRICS = {"miou": "mIoU", "oiou": "oIoU", **{f"pr@0.{k}": f"Pr@0.{k}" for k in range(5, 10)}}
"""Scores that a column can show, and the name that its header carries."""

COUNTS = (*(f"params.{f.name}" for f in fields(Params)), "params.tunable")
_NOT_LISTED = ("device", "micro_batches", "processes")
COSTS = (*(f"cost.{f.name}" for f in fields(Cost) if f.name not in _NOT_LISTED), "cost.epochs")


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of the table, or one for each of its splits."""

    header: str
    value: str
    """A key of METRICS, one of COUNTS or COSTS, or an axis, of which it shows the value that was used."""
    where: dict = field(default_factory=dict)
    """Labels, by axis, of the runs that the column is limited to."""
    splits: tuple[str, ...] = ()
    average: bool = False
    """Instead of the score of a split, the mean over all other columns of the table that show this metric."""
    best: Literal["max", "min"] | None = None
    scale: float | None = None
    """What a count or a cost is multiplied by; a score is always printed in percent."""
    digits: int | None = None


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A row for each label of the axis `rows`; of several axes, for each combination that the experiment has."""

    rows: tuple[str, ...]
    labels: Mapping[str, str]
    """What is printed instead of a label of these axes."""
    columns: tuple[Column, ...]
    published: tuple[str, ...] = ()
    """Names of published tables, of which every row is shown beside what was measured."""
    stands_for: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By the name of a published row, the labels of the row of this table that stands for it."""


Resolve = Callable[[str, str, Mapping[str, Any]], Choice]
"""The choice of a kind, such as "method", with this name and these options, the others being the defaults."""


def read_layout(
    item: Located, grid: Mapping[str, Collection[str]], choose: Collection[str], runs: Sequence[Run], resolve: Resolve
) -> Layout:
    """The `table` of an experiment file; UserError where the runs could not fill it, or not without ambiguity.

    Instead of rows and columns it may be the name of a published table, which then has these.

    Args:
        item: the section.
        grid: labels by axis, without the axes of `choose`.
        choose: the axes of which each cell uses one value.
        runs: all runs.
    """
    if isinstance(item.value, str):
        return _as_published(item, grid, runs, resolve)
    items = item.keys("table", ("rows", "labels", "columns", "published"), ("rows", "columns"))
    written = items["rows"]
    rows = written.typed(tuple[str, ...] if isinstance(written.value, list) else str, "table.rows")
    rows = (rows,) if isinstance(rows, str) else rows
    if not rows or len(set(rows)) < len(rows) or not set(rows) <= set(grid):
        axes = ", ".join(grid) or "it has none"
        raise written.error(
            f"table.rows is {written.plain()!r}; it must be an axis of the grid, or a list of some, each once: {axes}"
        )
    labels = items["labels"].mapping("table.labels") if "labels" in items else {}
    known = [label for axis in rows for label in grid[axis]]
    for label, text in labels.items():
        if label not in known:
            raise text.error(
                f"table.labels has {label!r}, which is no value of {' or '.join(rows)}: {', '.join(known)}"
            )
    names: tuple[str, ...] = ()
    if "published" in items:
        several = isinstance(items["published"].value, list)
        names = _known(items["published"].items("table.published") if several else [items["published"]])
    return Layout(
        rows=rows,
        labels={label: text.typed(str, f"table.labels.{label}") for label, text in labels.items()},
        columns=tuple(_column(column, rows, grid, choose, runs) for column in items["columns"].items("table.columns")),
        published=names,
        stands_for=standing(names, rows, runs, resolve),
    )


def searched_layout(search: Search) -> Layout:
    """A row for every trial of a search: what was suggested, what it came to, and after how many epochs."""
    base = search.base
    score = Column(
        header=TITLES.get(base.dataset.name, base.dataset.name.capitalize()),
        value=base.eval.metric,
        splits=(base.eval.select_on,),
        best="max",
    )
    return Layout(
        rows=(NUMBER,),
        labels={},
        columns=(
            *(Column(header=axis.key, value=axis.key) for axis in search.space),
            score,
            Column(header="Params (K)", value="params.tunable_backbone", scale=1e-3),
            Column(header="Epochs", value="cost.epochs"),
        ),
    )


def standing(
    names: Sequence[str], rows: Sequence[str], runs: Sequence[Run], resolve: Resolve
) -> dict[str, tuple[str, ...]]:
    """`Layout.stands_for`: a row stands for a published one whose backbone, method and head all its runs have."""
    trials: dict[tuple[str, ...], list] = {}
    for run in runs:
        trials.setdefault(tuple(run.axes[axis] for axis in rows), []).append(run.trial)
    found = {}
    for cited in published.rows(names):
        if ours := cited.ours:
            wanted = (resolve("method", ours.method, ours.options), resolve("head", ours.head, {}))
            for labels, group in trials.items():
                if all((t.backbone.name, t.method, t.head) == (ours.backbone, *wanted) for t in group):
                    found.setdefault(cited.name, labels)
    return found


def _known(items: Sequence[Located]) -> tuple[str, ...]:
    tables = published.load().tables
    for item in items:
        if item.value not in tables:
            raise item.error(f"{item.plain()!r} is no published table; there are {', '.join(tables)}; name one of them")
    return tuple(item.value for item in items)


def _as_published(item: Located, grid: Mapping[str, Collection[str]], runs: Sequence[Run], resolve: Resolve) -> Layout:
    names = _known([item])
    table = published.load().tables[names[0]]
    rows = [axis for axis in grid if axis not in ("dataset", "seed")]
    if not rows:
        raise item.error(f"table is {item.value!r}, but no axis of the grid is for its rows; add one, such as method")
    for axis in reversed(rows):
        # An axis that follows from the others tells no rows apart.
        fewer = [other for other in rows if other != axis]
        if fewer and len(_distinct(runs, fewer)) == len(_distinct(runs, rows)):
            rows = fewer
    stands_for = standing(names, rows, runs, resolve)
    return Layout(
        rows=tuple(rows),
        labels={labels[0]: name for name, labels in stands_for.items()} if len(rows) == 1 else {},
        columns=tuple(_columns_of(item, table, grid, runs)),
        published=names,
        stands_for=stands_for,
    )


def _distinct(runs: Sequence[Run], axes: Sequence[str]) -> set[tuple[str, ...]]:
    return {tuple(run.axes[axis] for axis in axes) for run in runs}


def _columns_of(
    item: Located, table: published.Table, grid: Mapping[str, Collection[str]], runs: Sequence[Run]
) -> Iterator[Column]:
    """The columns of a published table, as far as a trial measures what they show."""
    scale = {"params.prompt": 1e3}

    def place(column: str) -> tuple:
        score = table.score(column)
        return ("", "", column) if score is None else (score.dataset, score.metric, "")

    for (dataset, metric, other), group in groupby(table.columns, key=place):
        if other == "avg":
            yield Column(header="Average", value=table.computes, average=True, best="max")
        elif other:
            by = scale.get(other, 1e6)
            header = f"{other.partition('.')[2].capitalize()} ({'K' if by == 1e3 else 'M'})"
            yield Column(header=header, value=PUBLISHED_COUNTS[other], scale=1 / by)
        else:
            splits = [table.score(column).split for column in group]
            where, splits = _where(item, dataset, splits, grid, runs)
            yield Column(header=TITLES[dataset], value=metric, where=where, splits=splits, best="max")


def _where(
    item: Located, dataset: str, splits: Sequence[str], grid: Mapping[str, Collection[str]], runs: Sequence[Run]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """What limits a column to a data set, and how its splits are called there."""
    for run in runs:
        for named in (tuple(splits), tuple(f"{split}/{dataset}" for split in splits)):
            if set(named) <= set(run.splits) and (run.trial.dataset.name == dataset or named != tuple(splits)):
                return {"dataset": run.axes["dataset"]} if "dataset" in grid else {}, named
    raise item.error(
        f"table {item.value!r} has scores of {dataset} {', '.join(splits)}, which no run reports; add the dataset, or "
        f"write rows and columns with published: {item.value}"
    )


PUBLISHED_COUNTS = {
    "params.backbone": "params.tunable_backbone",
    "params.prompt": "params.prompt",
    "params.head": "params.tunable_head",
    "params.total": "params.tunable",
}
"""What counts of published tables are called in results."""

TITLES = {
    "refcoco": "RefCOCO",
    "refcoco+": "RefCOCO+",
    "refcocog-umd": "G-Ref (umd)",
    "refcocog-google": "G-Ref (google)",
}
"""Data sets as tables of papers name them."""


def _column(
    item: Located,
    rows: Collection[str],
    grid: Mapping[str, Collection[str]],
    choose: Collection[str],
    runs: Sequence[Run],
) -> Column:
    column = item.record(Column, "column")
    column = replace(column, where={axis: str(label) for axis, label in column.where.items()})
    value = column.value

    def require(allowed: bool, key: str, message: str) -> None:
        if not allowed:
            raise item.value.get(key, item).error(f"column {column.header!r}: {message}")

    values = (*METRICS, *COUNTS, *COSTS, *grid, *choose)
    require(value in values, "value", f"value is {value!r}; it must be one of {', '.join(values)}")
    for axis, label in column.where.items():
        require(axis in grid, "where", f"where names {axis!r}, which is no axis of the grid: {', '.join(grid)}")
        known = ", ".join(grid[axis])
        require(label in grid[axis], "where", f"where wants the {axis} {label!r}; its values here are {known}")

    if value in METRICS:
        named = set(re.findall(r"\w?iou|pr@[\d.]+", column.header.lower())) - {value}
        require(not named, "header", f"the header names {', '.join(named)}, the value is {value}; correct one")
        measured = bool(column.splits) or column.average
        require(measured, "splits", f"{value} is measured on a split; name some: splits: [val]")
        require(
            not (column.average and (column.splits or column.where)), "average", "an average is of all; limit nothing"
        )
        for run in (run for run in runs if column.where.items() <= run.axes.items()):
            absent = ", ".join(split for split in column.splits if split not in run.splits)
            reported = f"{run.trial.dataset.name} reports {', '.join(run.splits)}"
            require(not absent, "splits", f"splits names {absent}, but {reported}; correct splits or eval.splits")
    else:
        require(not column.splits, "splits", f"{value} does not depend on a split; remove splits")
        require(not column.average, "average", f"{value} is no score; remove average")

    if (value in METRICS and not column.average) or value in COSTS:
        # What a cell averages must differ in nothing but the seed.
        fixed = (*rows, *column.where)
        cells: dict[tuple[str, ...], dict[str, set[str]]] = {}
        for run in (run for run in runs if column.where.items() <= run.axes.items()):
            cell = cells.setdefault(tuple(run.axes[axis] for axis in fixed), {})
            for axis in (axis for axis in grid if axis not in (*fixed, "seed")):
                cell.setdefault(axis, set()).add(run.axes[axis])
        mixed = [axis for axis in grid if any(len(cell.get(axis, ())) > 1 for cell in cells.values())]
        hint = f"where: {{{', '.join(f'{axis}: {next(iter(grid[axis]))}' for axis in mixed)}}}"
        require(not mixed, "where", f"it would average over every {' and '.join(mixed)}; limit it, as in {hint}")
    if value in METRICS:
        require(column.scale is None, "scale", "a score is printed in percent; remove scale")
    elif value not in (*COUNTS, *COSTS):
        for key in ("best", "scale", "digits"):
            require(getattr(column, key) is None, key, f"{value} is a setting, shown as it is written; remove {key}")
    require(column.scale is None or 0 < column.scale < math.inf, "scale", "scale must be greater than 0")
    require(column.digits is None or 0 <= column.digits <= 10, "digits", "digits must be from 0 to 10")
    return column
