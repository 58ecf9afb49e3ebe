"""What a table shows: its rows, its columns, and which of them an experiment can fill."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Literal

from ris_bench.located import Located
from ris_bench.records import Cost, Params

if TYPE_CHECKING:
    from ris_bench.experiment import Run

METRICS = {"miou": "mIoU", "oiou": "oIoU", **{f"pr@0.{k}": f"Pr@0.{k}" for k in range(5, 10)}}
"""Scores that a column can show, and the name that its header carries."""

COUNTS = tuple(f"params.{f.name}" for f in fields(Params))
COSTS = tuple(f"cost.{f.name}" for f in fields(Cost) if f.name != "device")


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of the table, or one for each of its splits."""

    header: str
    value: str
    """A key of METRICS, one of COUNTS or COSTS, or an axis, of which it shows the value that was used."""
    where: dict = field(default_factory=dict)
    """Labels, by axis, of the runs that the column is limited to."""
    splits: tuple[str, ...] = ()
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


def read_layout(
    item: Located, grid: Mapping[str, Collection[str]], choose: Collection[str], runs: Sequence[Run]
) -> Layout:
    """The `table` of an experiment file; UserError where the runs could not fill it, or not without ambiguity.

    Args:
        item: the section.
        grid: labels by axis, without the axes of `choose`.
        choose: the axes of which each cell uses one value.
        runs: all runs.
    """
    items = item.keys("table", ("rows", "labels", "columns"), ("rows", "columns"))
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
    return Layout(
        rows=rows,
        labels={label: text.typed(str, f"table.labels.{label}") for label, text in labels.items()},
        columns=tuple(_column(column, rows, grid, choose, runs) for column in items["columns"].items("table.columns")),
    )


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
        require(bool(column.splits), "splits", f"{value} is measured on a split; name some: splits: [val]")
        for run in (run for run in runs if column.where.items() <= run.axes.items()):
            absent = ", ".join(split for split in column.splits if split not in run.splits)
            reported = f"{run.trial.dataset.name} reports {', '.join(run.splits)}"
            require(not absent, "splits", f"splits names {absent}, but {reported}; correct splits or eval.splits")
    else:
        require(not column.splits, "splits", f"{value} does not depend on a split; remove splits")

    if value in METRICS or value in COSTS:
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
