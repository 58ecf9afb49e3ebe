"""What an experiment is, once read: its runs, which of them are to be made next, and its table.

It is kept beside the tables, so that they can be made anew from files alone: an experiment file names backbones,
methods and data sets, and to read it takes all of these, PyTorch included.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ris_bench import code, located, published, search
from ris_bench.errors import UserError
from ris_bench.files import write_whole
from ris_bench.layout import COSTS, COUNTS, METRICS, Column, Layout
from ris_bench.records import Result, Trial, plain
from ris_bench.registry import checked, record
from ris_bench.remote import is_url, store_at
from ris_bench.results import PLAN, Store
from ris_bench.search import Find, Search

if TYPE_CHECKING:  # it imports torch
    from ris_bench.plugins import Plugin

FILE = PLAN
"""In the folder of an experiment: a line for what all runs share, then a line for each of them."""
NAME = re.compile(r"(?!trials$)[A-Za-z0-9_][A-Za-z0-9_.+-]*")
"""Of an experiment, and so of its folder; what experiments share lies in `trials`."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A trial and its place in the experiment."""

    trial: Trial
    axes: Mapping[str, str]
    """The label of its value on every axis."""
    splits: tuple[str, ...]
    """What it reports, in order."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A named set of trials and their table; what is to be run next is a function of the results that are known."""

    name: str
    """Of the folder that its table is written to."""
    title: str
    notes: tuple[str, ...]
    path: Path
    source: str
    """The text of the file."""
    axes: Mapping[str, tuple[str, ...]]
    """Labels by axis, of all grids, in the order of the file."""
    choose: tuple[str, ...]
    """Axes of which each cell uses one value: the one that scores best on the validation split with the first seed."""
    runs: tuple[Run, ...]
    """The whole product of the axes, grid by grid; of a search those that are known to be wanted."""
    table: Layout
    assignments: tuple[str, ...]
    """What was set on the command line."""
    plugins: tuple[Plugin, ...]
    """To be loaded by every process that runs one of its trials; this one has them."""
    search: Search | None = None
    code: str = ""
    """`code.digest` of what has read the file; empty where nobody kept it."""

    @property
    def selected(self) -> tuple[str, ...]:
        """The keys whose values follow from scores."""
        return (*self.choose, *(axis.key for axis in self.search.space)) if self.search else self.choose

    @property
    def may_be_another(self) -> bool:
        """Whether the same file, read now, might mean other trials: by other code of this package or of plug-ins."""
        choices = (getattr(run.trial, kind) for run in self.runs for kind in ("dataset", "backbone", "method", "head"))
        return self.code != code.digest() or any(choice.code for choice in choices)

    def after(self, find: Find) -> Experiment:
        """With all runs that a search asks for once these results are known; a grid has its own."""
        if self.search is None:
            return self
        made = [one for one in self.search.replay(find) if one.first]
        labels = [{search.NUMBER: str(one.number), **one.labels} for one in made]
        axes = {axis: tuple(dict.fromkeys(each[axis] for each in labels)) for axis in labels[0]}
        runs = [
            Run(trial=one.trial, axes=own, splits=one.trial.eval.splits) for one, own in zip(made, labels, strict=True)
        ]
        return replace(self, axes=axes, runs=tuple(runs))

    def trials(self, results: Mapping[str, Result] = MappingProxyType({})) -> list[Trial]:
        """Every trial that has to be run as far as `results`, by trial id, can tell; those with a result included.

        Where values are to be chosen, a cell asks for all of them with the first seed, and for the other seeds of the
        best one as soon as it is known.
        """
        wanted = {run.trial.id for cell in self.cells() for run in self._stages(cell, results)[0]}
        return [run.trial for run in self.runs if run.trial.id in wanted]

    def reported(self, results: Mapping[str, Result]) -> list[Run]:
        """The runs that the table shows: with the chosen values, or all values of a cell in which every one failed."""
        return [run for cell in self.cells() for run in self._stages(cell, results)[1]]

    @cached_property
    def text(self) -> str:
        """What `FILE` holds; a long sweep writes it again with every table."""
        shared = {key: getattr(self, key) for key in _SHARED}
        shared |= {"file": self.path.name, "table": asdict(self.table), "runs": len(self.runs)}
        shared |= {"code": self.code} if self.code else {}
        shared |= {"search": plain(self.search)} if self.search else {}
        runs = ({"axes": dict(run.axes), "splits": run.splits, "trial": plain(run.trial)} for run in self.runs)
        return "".join(f"{json.dumps(line)}\n" for line in (shared, *runs))

    def cells(self) -> list[list[Run]]:
        """Runs that differ in nothing but the seed and what is chosen."""
        cells: dict[tuple[str, ...], list[Run]] = {}
        for run in self.runs:
            key = tuple(label for axis, label in run.axes.items() if axis not in ("seed", *self.choose))
            cells.setdefault(key, []).append(run)
        return list(cells.values())

    def _stages(self, cell: list[Run], results: Mapping[str, Result]) -> tuple[list[Run], list[Run]]:
        # What to run, and what to report of it.
        first = [run for run in cell if run.trial.seed == cell[0].trial.seed]
        if len(first) == 1:
            return cell, cell
        if any(run.trial.id not in results for run in first):
            return first, []
        done = [run for run in first if results[run.trial.id].status == "done"]
        if not done:
            return first, first
        best = max(done, key=lambda run: _selection_score(results[run.trial.id]))
        chosen = [run for run in cell if all(run.axes[axis] == best.axes[axis] for axis in self.choose)]
        return first + chosen, chosen


def _selection_score(result: Result) -> float:
    evaluation = result.trial.eval
    return getattr(result.scores[evaluation.select_on], evaluation.metric)


def find(named: Path, root: Path | None = None) -> tuple[Experiment, Path, Path]:
    """An experiment by its file or by its folder of tables; that folder; and the results folder.

    Args:
        named: a folder that holds an experiment as it was last run; or an experiment file. Of the latter the folder's
            plan is taken where it was made of the very same text, and only else the file is read, with PyTorch.
        root: the results folder; None means that around the folder named, or `results`.

    Raises UserError where there is no such thing, or no whole one.
    """
    if named.is_dir():
        return read(named), named, (named.absolute().parent if root is None else root)
    root = Path("results") if root is None else root
    experiment = last_run(named, (), root)
    if experiment is not None:
        return experiment, root / experiment.name, root
    try:
        from ris_bench.experiment import load  # only now: it imports torch
    except ModuleNotFoundError as error:
        raise UserError(
            f"{named} has not been run as it stands, and to read it takes {error.name}, which is not installed; name a "
            f"folder that holds a {FILE}"
        ) from None
    experiment = load(named).after(Store(root.absolute()).read)
    return experiment, root / experiment.name, root


def last_run(path: Path, assignments: Sequence[str], root: Path) -> Experiment | None:
    """The experiment of a file, if it was run last with the very same text and assignments; without its plug-ins."""
    text = read_text(path)
    written = located.read(text, lambda line: f"{path}:{line}").mapping("the experiment").get("name")
    name = written and written.value
    if not (isinstance(name, str) and NAME.fullmatch(name) and (root / name / FILE).is_file()):
        return None
    with suppress(UserError):  # it is not whole
        experiment = read(root / name)
        if (experiment.source, experiment.assignments) == (text, tuple(assignments)):
            return experiment
    return None


def opened(place: str | Path) -> tuple[Store, Path]:
    """The results at a URL or in a folder, as they are now, where the folder of an experiment may be named too; and the
    folder that was named: of a URL, in the mirror."""
    if not is_url(place):
        folder = Path(place)
        return (Store(folder.absolute().parent) if (folder / FILE).is_file() else store_at(folder)), folder
    store = store_at(place)
    store.refresh()
    if (store.root / FILE).is_file():
        url, name = str(place).rstrip("/").rsplit("/", 1)
        store = store_at(url)
        store.refresh()
        return store, store.root / name
    return store, store.root


def read_text(path: Path) -> str:
    """The text of an experiment file."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); name an experiment file") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: this is not UTF-8 text; save it as UTF-8") from None


def write(experiment: Experiment, folder: Path) -> None:
    """Keep an experiment, without the code of its plug-ins; the file appears whole or not at all."""
    write_whole(folder / FILE, experiment.text)


_SHARED = {
    "name": str,
    "title": str,
    "notes": tuple[str, ...],
    "source": str,
    "axes": dict[str, tuple[str, ...]],
    "choose": tuple[str, ...],
    "assignments": tuple[str, ...],
}


def read(folder: Path) -> Experiment:
    """The experiment that `write` has kept. UserError where there is none, or not the whole of one."""
    path = folder / FILE
    try:
        # Only a line feed ends a line: JSON may hold other characters that end one elsewhere.
        first, *lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        return _parse(json.loads(first), [json.loads(line) for line in lines])
    except FileNotFoundError:
        raise UserError(f"{folder} holds no {FILE}: no experiment was run into it; name an experiment file") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, UserError) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{path} is no whole plan of an experiment ({why}); name its experiment file") from None


def _parse(shared: Mapping[str, Any], lines: list[Mapping[str, Any]]) -> Experiment:
    values = {key: checked(shared[key], hint, key) for key, hint in _SHARED.items()}
    axes, table = values["axes"], shared["table"]
    columns = tuple(record(Column, column) for column in table["columns"])
    layout = Layout(
        rows=checked(table["rows"], tuple[str, ...], "rows"),
        labels=checked(table["labels"], dict[str, str], "labels"),
        columns=columns,
        published=checked(table["published"], tuple[str, ...], "published"),
        stands_for=checked(table["stands_for"], dict[str, tuple[str, ...]], "stands_for"),
    )
    runs = tuple(
        Run(
            trial=Trial.from_dict(line["trial"]),
            axes=checked(line["axes"], dict[str, str], "axes"),
            splits=checked(line["splits"], tuple[str, ...], "splits"),
        )
        for line in lines
    )
    if not runs or len(runs) != shared["runs"]:
        raise ValueError(f"{len(runs)} of {shared['runs']} runs")
    named = {*layout.rows, *values["choose"], *(axis for column in columns for axis in column.where)}
    if not (NAME.fullmatch(values["name"]) and layout.rows and named <= set(axes)):
        raise ValueError("a name or an axis that there is not")
    if unknown := set(layout.published) - set(published.load().tables):
        raise ValueError(f"no published table {unknown.pop()}")
    if any(list(run.axes) != list(axes) or any(run.axes[a] not in axes[a] for a in axes) for run in runs):
        raise ValueError("a run off the axes")
    if strange := {column.value for column in columns} - {*METRICS, *COUNTS, *COSTS, *axes}:
        raise ValueError(f"a column of {strange.pop()}")
    found = search.from_record(shared["search"]) if "search" in shared else None
    if found:
        own = list(axes) == [search.NUMBER, *(axis.key for axis in found.space)]
        known = own and all(all(map(axis.has, axes[axis.key])) for axis in found.space)
        if not (known and all(label.isdecimal() for label in axes[search.NUMBER])):
            raise ValueError("a run that is not of the search")
    return Experiment(
        **values,
        path=Path(checked(shared["file"], str, "file")),
        table=layout,
        runs=runs,
        plugins=(),
        search=found,
        code=checked(shared.get("code", ""), str, "code"),
    )
