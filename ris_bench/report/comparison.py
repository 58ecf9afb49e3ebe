"""The rows of an experiment's table against one of them, with what is known of each difference."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from tabulate import tabulate

from ris_bench import metrics as definitions
from ris_bench.errors import UserError
from ris_bench.layout import METRICS
from ris_bench.protocols import RIS_BENCH
from ris_bench.records import Result
from ris_bench.report import statistics
from ris_bench.report.statistics import Difference, Sums
from ris_bench.report.tables import DEFINITIONS, MARKS, caveats, corner, escaped
from ris_bench.results import Store

if TYPE_CHECKING:  # it imports torch, with the methods that it names
    from ris_bench.experiment import Experiment, Run

LEVEL = 0.05
"""Of significance, once corrected."""

NUMBERS = ("Difference", "95% interval", "p", "p (Holm)", "Seed SD", "Seed noise")
"""Headers of what is printed of a comparison."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One metric of one row against that of another. Scores are fractions, as in results, and so are differences."""

    axes: Mapping[str, str]
    """Labels of the row, and of what the column is limited to."""
    split: str
    metric: str
    scores: Mapping[int, float]
    """By seed."""
    scores_against: Mapping[int, float]
    difference: Difference
    """Between the means over seeds."""
    p_holm: float
    seed_noise: float | None
    """`statistics.seed_noise`."""
    images: int
    expressions: int
    marks: str
    """Of tables.MARKS."""

    @property
    def earned(self) -> bool:
        """Whether there is a difference beyond what other images, and other seeds, would explain."""
        return self.p_holm < LEVEL and self.seed_noise is not None and abs(self.difference.value) > self.seed_noise


@dataclass(frozen=True, kw_only=True)
class Comparisons:
    """All of one experiment against one label, as data and as a table."""

    experiment: Experiment
    axis: str
    """That the rows differ in."""
    against: str
    """Its label, as printed."""
    rows: tuple[Comparison, ...]
    absent: tuple[str, ...]
    """Rows, as printed, that could not be compared for want of results."""
    resamples: int
    seed: int

    def records(self) -> list[dict[str, Any]]:
        """As JSON takes them."""
        return [
            {
                **{key: value for key, value in vars(row).items() if key != "difference"},
                "against": self.against,
                "difference": row.difference.value,
                "interval": [row.difference.low, row.difference.high],
                "p": row.difference.p,
                "earned": row.earned,
            }
            for row in self.rows
        ]

    def markdown(self) -> str:
        """The table and its notes; differences in percentage points."""
        headers, lines, above = self.headers(), [], []
        for labels, cells in self.lines():
            shared = len(os.path.commonprefix([labels[:-1], above]))
            lines.append([*[""] * shared, *map(escaped, labels[shared:]), *cells])
            above = labels[:-1]
        table = tabulate(
            lines,
            headers=[*map(escaped, headers), *NUMBERS],
            tablefmt="pipe",
            colalign=(*("left" for _ in headers), *("right" for _ in NUMBERS)),
            disable_numparse=True,
        )
        title = escaped(f"{self.experiment.title}: against {self.against}")
        return f"**{title}**\n\n{table}\n\n" + "".join(f"- {escaped(note)}\n" for note in self.notes())

    def headers(self) -> list[str]:
        """Of the labels of every line; those of the numbers are NUMBERS."""
        return [*corner(self._around), "Split", "Metric", *corner([self.axis])]

    def lines(self) -> Iterator[tuple[list[str], list[str]]]:
        """Labels and numbers of every row, as printed."""
        for row in self.rows:
            around = (self._printed(row.axes.get(axis, "")) for axis in self._around)
            yield [*around, row.split, METRICS[row.metric], self._printed(row.axes[self.axis])], _cells(row)

    @property
    def _around(self) -> list[str]:
        return list(dict.fromkeys(axis for row in self.rows for axis in row.axes if axis != self.axis))

    def _printed(self, label: str) -> str:
        return self.experiment.table.labels.get(label, label)

    def notes(self) -> Iterator[str]:
        """What a reader of the table must know."""
        number = len(self.rows)
        yield (
            f"Difference: the row minus {self.against}, in percentage points; ▲ better, ▼ worse, both only where p "
            f"(Holm) is below {LEVEL} and the difference exceeds the seed noise."
        )
        yield f"{'; '.join(dict.fromkeys(DEFINITIONS[row.metric.partition('@')[0]] for row in self.rows))}."
        sizes = dict.fromkeys(f"{row.expressions:,} expressions of {row.images:,} images" for row in self.rows)
        yield (
            "95% interval and two-sided p, as to other images: percentiles of a paired bootstrap over images, each "
            f"with all its expressions ({' or '.join(sizes)}); {self.resamples:,} resamples, seed {self.seed}, in each "
            f"of which a metric is averaged over the seeds. Holm: over the {number} comparisons of this table."
        )
        yield (
            "Seed SD: sample standard deviation over seeds, of the row / of what it is compared with. Seed noise: what "
            "the difference would stay below in 95% of repetitions with other seeds if the two were equal (Welch); "
            "unknown where one has a single seed."
        )
        least = number * statistics.smallest_p(self.resamples)
        if least >= LEVEL:
            yield (
                f"Nothing can be marked: of {number} comparisons with {self.resamples:,} resamples no p (Holm) is "
                f"below {min(least, 1.0):.2g}; --resamples {int(2 * number / LEVEL)} would do."
            )
        selected = {run.trial.eval.select_on for run in self.experiment.runs}
        if on := dict.fromkeys(row.split for row in self.rows if row.split in selected):
            what = " and ".join(["the checkpoints", *self.experiment.selected])
            yield f"Scores on {' and '.join(on)}, where {what} were selected, are optimistic."
        if self.absent:
            yield f"Not compared, for want of results of the row or of {self.against}: {', '.join(self.absent)}."
        marks = {mark for row in self.rows for mark in row.marks}
        yield from (f"{mark} {meaning}" for mark, meaning in MARKS.items() if mark in marks)


def _cells(row: Comparison) -> list[str]:
    value, low, high, p = row.difference
    arrow = ("▲" if value > 0 else "▼") if row.earned else ""
    both = (row.scores, row.scores_against)
    spreads = [f"{100 * stdev(scores.values()):.2f}" if len(scores) > 1 else "–" for scores in both]
    return [
        " ".join(filter(None, [f"{100 * value:+.2f}", arrow, row.marks])),
        f"[{100 * low:+.2f}, {100 * high:+.2f}]",
        *(f"{p:.4f}" if p >= 0.0001 else f"{p:.1g}" for p in (p, row.p_holm)),
        " / ".join(spreads),
        "–" if row.seed_noise is None else f"{100 * row.seed_noise:.2f}",
    ]


def compare(
    experiment: Experiment,
    store: Store,
    against: str,
    *,
    splits: Sequence[str] = (),
    metrics: Sequence[str] = (),
    resamples: int = 10_000,
    seed: int = 0,
) -> Comparisons:
    """Every row of an experiment's table against the one that differs from it by having the label `against`.

    Args:
        against: a label of an axis of the rows, or what is printed for it.
        splits: those to compare on; none named means those of the table's columns, without the shuffled ones.
        metrics: keys of METRICS; none named means that each split is compared by what its columns show.
        resamples, seed: of the bootstrap. Every split of every group of rows is resampled afresh from this seed, so
            that no number but p_holm depends on what else is compared.

    Reads result.json and expressions.parquet of the trials that the table reports. A parquet file that is absent, or is
    not what result.json was computed from, is named in a warning and left out, and its row is marked.

    Raises UserError where there is nothing to compare, or where two trials were evaluated on different expressions.
    """
    axis, label = _find(experiment, against)
    results = {run.trial.id: result for run in experiment.runs if (result := store.read(run.trial))}
    reported = {run.trial.id: results.get(run.trial.id) for run in experiment.reported(results)}
    done = {key: result for key, result in reported.items() if result and result.status == "done"}
    found: list[Comparison] = []
    absent: dict[str, None] = {}
    for where, wanted in _wanted(experiment, splits, metrics):
        shown = (*where, *experiment.table.rows)
        # Rows by label of the axis, in groups that differ in nothing else.
        groups: dict[tuple[str, ...], dict[str, list[Run]]] = {}
        for run in (run for run in experiment.runs if where.items() <= run.axes.items()):
            others = tuple(run.axes[name] for name in shown if name != axis)
            groups.setdefault(others, {}).setdefault(run.axes[axis], []).append(run)
        for group in groups.values():
            rows = _read_rows(group, label, shown, done, store, wanted)
            found += _compare_rows(rows, label, wanted, resamples, seed)
            lacking = (runs[0].axes for key, runs in group.items() if key != label and key not in rows)
            printed = ([experiment.table.labels.get(axes[name], axes[name]) for name in shown] for axes in lacking)
            absent |= dict.fromkeys(map(" / ".join, printed))
    if not found:
        raise UserError(
            f"nothing in {experiment.path} can be compared with {against}: there must be results of it and of another "
            f"row, on a split that is asked for, in {store.root}"
        )
    corrected = statistics.holm([row.difference.p for row in found])
    return Comparisons(
        experiment=experiment,
        axis=axis,
        against=experiment.table.labels.get(label, label),
        rows=tuple(replace(row, p_holm=p) for row, p in zip(found, corrected, strict=True)),
        absent=tuple(absent),
        resamples=resamples,
        seed=seed,
    )


def _find(experiment: Experiment, against: str) -> tuple[str, str]:
    """The axis of the rows that has the label, and the label."""
    layout = experiment.table
    labels = [(axis, label) for axis in reversed(layout.rows) for label in experiment.axes[axis]]
    for axis, label in labels:
        if against in (label, layout.labels.get(label)):
            return axis, label
    known = ", ".join(label for _, label in labels)
    raise UserError(f"{against!r} is no row of {experiment.path}; compare against one of {known}")


def _wanted(
    experiment: Experiment, splits: Sequence[str], metrics: Sequence[str]
) -> list[tuple[dict[str, str], dict[str, list[str]]]]:
    """What the columns of scores are limited to and, for each such limit, the metrics to compare by split."""
    wanted: dict[tuple[tuple[str, str], ...], dict[str, list[str]]] = {}
    known: dict[str, None] = {}
    for column in (column for column in experiment.table.columns if column.value in METRICS and not column.average):
        runs = [run for run in experiment.runs if column.where.items() <= run.axes.items()]
        common = [split for split in runs[0].splits if all(split in run.splits for run in runs)]
        known |= dict.fromkeys(common)
        by_split = wanted.setdefault(tuple(sorted(column.where.items())), {})
        for split in splits or (split for split in column.splits if not split.endswith("/shuffled")):
            if split in common:
                each = by_split.setdefault(split, [])
                each += [metric for metric in metrics or [column.value] if metric not in each]
    if unknown := [split for split in splits if split not in known]:
        raise UserError(
            f"no run of {experiment.path} with a column of scores reports {', '.join(unknown)}; these splits are "
            f"reported: {', '.join(known)}"
        )
    return [(dict(where), by_split) for where, by_split in wanted.items()]


@dataclass(frozen=True)
class _Row:
    axes: Mapping[str, str]
    sums: Mapping[int, Mapping[str, Sums]]
    """By seed and split."""
    marks: str


def _read_rows(
    group: Mapping[str, Sequence[Run]],
    label: str,
    shown: Sequence[str],
    done: Mapping[str, Result],
    store: Store,
    wanted: Mapping[str, Sequence[str]],
) -> dict[str, _Row]:
    """Rows that have results, by label; none if the row of `label` has none. UserError where expressions differ."""
    first: dict[str, tuple[str, pd.DataFrame]] = {}
    rows: dict[str, _Row] = {}
    for key in sorted(group, key=lambda key: key != label):  # that one first, the others as they are
        trials = [run.trial for run in group[key]]
        sums = {
            trial.seed: read
            for trial in trials
            if trial.id in done and (read := _read_trial(done[trial.id], store, wanted, first))
        }
        if sums:
            marks = caveats(trials, lacking=len(sums) < len({trial.seed for trial in trials}))
            rows[key] = _Row({name: group[key][0].axes[name] for name in shown}, sums, marks)
        if label not in rows:
            break
    return rows


def _read_trial(
    result: Result, store: Store, wanted: Mapping[str, Sequence[str]], first: dict[str, tuple[str, pd.DataFrame]]
) -> dict[str, Sums] | None:
    """Sums by split; None, with a warning, where the file is no good. `first` has what to agree with, by split."""
    path = store.folder(result.trial) / "expressions.parquet"
    try:
        whole = pd.read_parquet(path, columns=["split", *statistics.COLUMNS])
        frames = {split: statistics.ordered(whole[whole["split"] == split]) for split in wanted}
        for split, frame in frames.items():
            scores = definitions.scores(frame["intersection"].to_numpy(), frame["union"].to_numpy(), RIS_BENCH)
            told = result.scores[split]
            if (scores.num_expressions, scores.miou, scores.oiou) != (told.num_expressions, told.miou, told.oiou):
                raise ValueError(f"the scores of {split} are not those of result.json")
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        warnings.warn(f"{path} is left out ({why})", stacklevel=2)
        return None
    for split, frame in frames.items():
        name, other = first.setdefault(split, (result.trial.id, frame))
        statistics.check_same(other, frame, (f"{split} of {name}", f"{split} of {result.trial.id}"))
    return {split: statistics.sums(frame, wanted[split]) for split, frame in frames.items()}


def _compare_rows(
    rows: Mapping[str, _Row], label: str, wanted: Mapping[str, Sequence[str]], resamples: int, seed: int
) -> Iterator[Comparison]:
    """The others against that of `label`; p_holm is of a family of one."""
    others = {key: row for key, row in rows.items() if key != label}
    trials = [(key, number) for key, row in rows.items() for number in row.sums]
    for split, metrics in wanted.items() if others else ():
        sums = [rows[key].sums[number][split] for key, number in trials]
        numerator_ITM = np.stack([each.numerator_IM for each in sums], axis=1)
        denominator_ITM = np.stack([each.denominator_IM for each in sums], axis=1)
        images = len(numerator_ITM)
        measured_TM = statistics.ratios(np.ones((1, images)), numerator_ITM, denominator_ITM)[0]
        resampled_RTM = statistics.bootstrap(numerator_ITM, denominator_ITM, resamples=resamples, seed=seed)
        places = {key: [place for place, trial in enumerate(trials) if trial[0] == key] for key in rows}
        for column, metric in enumerate(metrics):
            scores = {
                key: {trials[place][1]: measured_TM[place, column].item() for place in at} for key, at in places.items()
            }
            means_R = {key: resampled_RTM[:, at, column].mean(axis=1) for key, at in places.items()}
            for key, row in others.items():
                value = fmean(scores[key].values()) - fmean(scores[label].values())
                difference = statistics.difference(value, means_R[key] - means_R[label])
                yield Comparison(
                    axes=row.axes,
                    split=split,
                    metric=metric,
                    scores=scores[key],
                    scores_against=scores[label],
                    difference=difference,
                    p_holm=difference.p,
                    seed_noise=statistics.seed_noise([*scores[key].values()], [*scores[label].values()]),
                    images=images,
                    expressions=sums[0].expressions,
                    marks="".join(mark for mark in MARKS if mark in row.marks + rows[label].marks),
                )
