"""The figures of an experiment, as functions of its results: what a paper plots, with the spread over seeds."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, MaxNLocator

from ris_bench import published, search
from ris_bench.errors import UserError
from ris_bench.layout import METRICS
from ris_bench.plan import Experiment, Run
from ris_bench.protocols import RIS_BENCH
from ris_bench.records import Result
from ris_bench.report import breakdowns
from ris_bench.report.drawing import (
    FORMATS,
    PROTOCOL,
    Drawing,
    Look,
    appearance,
    clean,
    legend_below,
    log_axis,
    make_panels,
    named,
    round_ticks,
    save,
    styled,
)
from ris_bench.report.tables import MARKS, caveats
from ris_bench.results import Store

NO_RESULT = "no trial of it has a result"
FEWEST_TRIALS = 10
"""Of which an importance is computed: of fewer a tenth is none."""
MOST_CATEGORIES = 12
"""That bars are drawn for: the most frequent."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table, limited as a column is."""

    label: str
    """The last one, as printed."""
    labels: tuple[str, ...]
    look: Look
    runs: tuple[Run, ...]
    results: tuple[Result, ...]
    """Of those that are done."""

    @property
    def dataset(self) -> str:
        """Its name; empty while no value is chosen."""
        return self.runs[0].trial.dataset.name if self.runs else ""

    @property
    def marks(self) -> str:
        """Of tables.MARKS."""
        return caveats([run.trial for run in self.runs], lacking=0 < len(self.results) < len(self.runs))


@dataclass(frozen=True, kw_only=True)
class Group:
    """Rows that share all labels but the last: a panel of their own."""

    title: str
    rows: tuple[Row, ...]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What the columns of a table that have one limit are about, such as one data set."""

    header: str
    """Of the first such column."""
    groups: tuple[Group, ...]
    metrics: Mapping[str, tuple[str, ...]]
    """The splits that are shown by each key of METRICS; none is shuffled."""

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9+]+", "-", self.header.lower()).strip("-") or "scores"

    @property
    def rows(self) -> Iterator[Row]:
        for group in self.groups:
            yield from group.rows

    @property
    def panels(self) -> tuple[Group, ...]:
        """The groups that have a result; all where none has."""
        return tuple(group for group in self.groups if any(row.results for row in group.rows)) or self.groups

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(split for splits in self.metrics.values() for split in splits))

    def unbiased(self, splits: Sequence[str]) -> str:
        """The first of some splits on which no checkpoint was selected; else the first."""
        selected = {run.trial.eval.select_on for row in self.rows for run in row.runs}
        return next((split for split in splits if split not in selected), splits[0])


class Point(NamedTuple):
    """A mean over seeds."""

    value: float
    spread: float
    """Sample standard deviation; 0 of a single seed."""

    @classmethod
    def of(cls, numbers: Iterable[float | None]) -> Point | None:
        known = [number for number in numbers if number is not None]
        return cls(fmean(known), stdev(known) if len(known) > 1 else 0.0) if known else None


Cited = Mapping[tuple[str, ...], published.Cited]
"""Published rows, by the labels of the rows that stand for them."""


def citations(experiment: Experiment) -> Cited:
    layout = experiment.table
    by_name = {row.name: row for row in published.rows(layout.published)}
    return {labels: by_name[name] for name, labels in layout.stands_for.items()}


def subjects(experiment: Experiment, results: Mapping[str, Result]) -> list[Subject]:
    """What there is to draw: limits in the order of the columns, rows in the order of the table."""
    layout = experiment.table
    reported = experiment.reported(results)
    looks = {label: appearance(place) for place, label in enumerate(experiment.axes[layout.rows[-1]])}
    limits: dict[tuple[tuple[str, str], ...], dict[str, list[str]]] = {}
    headers: dict[tuple[tuple[str, str], ...], str] = {}
    for column in layout.columns:
        splits = [split for split in column.splits if not split.endswith("/shuffled")]
        if column.value in METRICS and splits:
            limit = tuple(sorted(column.where.items()))
            headers.setdefault(limit, column.header)
            limits.setdefault(limit, {}).setdefault(column.value, []).extend(splits)
    found = []
    for limit, metrics in limits.items():
        # Of the product of the axes only what the experiment has.
        had = [run for run in experiment.runs if dict(limit).items() <= run.axes.items()]
        groups: dict[tuple[str, ...], list[Row]] = {}
        for labels in product(*(experiment.axes[axis] for axis in layout.rows)):
            wanted = dict(zip(layout.rows, labels, strict=True)).items()
            if not any(wanted <= run.axes.items() for run in had):
                continue
            runs = [run for run in reported if run in had and wanted <= run.axes.items()]
            known = (results[run.trial.id] for run in runs if run.trial.id in results)
            row = Row(
                label=clean(layout.labels.get(labels[-1], labels[-1])),
                labels=labels,
                look=looks[labels[-1]],
                runs=tuple(runs),
                results=tuple(result for result in known if result.status == "done"),
            )
            groups.setdefault(labels[:-1], []).append(row)
        titles = {key: clean(" / ".join(layout.labels.get(label, label) for label in key)) for key in groups}
        found.append(
            Subject(
                header=clean(headers[limit]),
                groups=tuple(Group(title=titles[key], rows=tuple(rows)) for key, rows in groups.items()),
                metrics={metric: tuple(dict.fromkeys(splits)) for metric, splits in metrics.items()},
            )
        )
    return found


def draw(
    experiment: Experiment,
    results: Mapping[str, Result],
    store: Store | None = None,
) -> tuple[list[Drawing], list[str]]:
    """Every figure for which there are results, and for each of the others a line that says what it lacks.

    Args:
        results: by trial id; some may be missing, and there may be others.
        store: where the expressions.parquet of the trials lie; without it there are no breakdowns.
    """
    cited = citations(experiment)
    drawn: list[Drawing] = []
    absent: list[str] = []

    def add(name: str, make: Callable[[str], Drawing]) -> None:
        names = {drawing.name for drawing in drawn}
        name = next(one for one in (name, *(f"{name}-{k}" for k in range(2, len(names) + 3))) if one not in names)
        try:
            drawn.append(make(name))
        except UserError as error:
            absent.append(f"no figure {name}: {error}")

    if experiment.search:
        # Rows are trials, too many to be told apart.
        add("history", partial(history, experiment, results))
        add("importances", partial(importances, experiment, results))
        return drawn, absent
    for subject in subjects(experiment, results):
        for metric in subject.metrics:
            tail = f"{subject.slug}-{metric}"
            add(f"parameters-{tail}", partial(parameters, subject, metric, cited=cited))
            add(f"cost-{tail}", partial(cost, subject, metric))
        add(f"precision-{subject.slug}", partial(precision, subject))
        add(f"thresholds-{subject.slug}", partial(thresholds, subject))
        add(f"learning-{subject.slug}", partial(learning, subject))
        frames = _Frames(store)
        for by in (by for by in breakdowns.BY if by != "all"):
            add(f"breakdown-{subject.slug}-{by}", partial(breakdown, subject, by, frames))
    return drawn, absent


def write(
    experiment: Experiment,
    results: Mapping[str, Result],
    folder: Path,
    store: Store | None = None,
    formats: Sequence[str] = FORMATS,
) -> list[Path]:
    """Write what `draw` draws; each file appears whole or not at all. Warns of what it does not draw."""
    drawn, absent = draw(experiment, results, store)
    for line in absent:
        warnings.warn(line, stacklevel=2)
    return [path for drawing in drawn for path in save(drawing, folder, formats)]


@styled()
def parameters(subject: Subject, metric: str, name: str = "", *, cited: Cited = MappingProxyType({})) -> Drawing:
    """A metric against the tunable parameters of the backbone, with the Pareto front of what was measured."""
    splits = subject.metrics[metric]

    def count(result: Result) -> float | None:
        return result.params and result.params.tunable_backbone

    figure, panels = make_panels(len(subject.panels), len(splits), sharey="row")
    shown, counts, hollow = [], [], []
    for axes_row, group in zip(panels, subject.panels, strict=True):
        for axes, split in zip(axes_row, splits, strict=True):
            for row in (row for row in group.rows if row.labels in cited):
                score = published.Score.of(row.dataset, split, metric)
                printed = [cited[row.labels].cells.get(key) for key in ("params.backbone", score)]
                if all(cell and cell.number is not None and not cell.uncertain for cell in printed):
                    look = {"marker": row.look.marker, "ms": row.look.size, "mfc": "white", "mec": row.look.colour}
                    axes.plot(*(cell.number for cell in printed), zorder=3, **look)
                    counts.append(printed[0].number)
                    hollow.append(row)
            shown += _scatter(axes, group.rows, count, partial(_score, metric=metric, split=split))
            counts += [point.value for row in group.rows if (point := _mean(row, count))]
            _title(axes, group.title, subject.header, split)
            axes.set_ylabel(named(metric, split))
            axes.set_xlabel("Tunable parameters of the backbone")
    for axes in panels.flat:
        log_axis(axes, counts)
    extra = [(Line2D([], [], color="0.55", linewidth=1, drawstyle="steps-post"), "Pareto front")]
    if hollow:
        extra.append((Line2D([], [], linestyle="", marker="o", mfc="white", mec="0.3"), "hollow: as published"))
    _finish(figure, subject, shown, _markers, extra, beside=hollow)
    caption = (
        f"{METRICS[metric]} against the tunable parameters of the backbone. The line is the Pareto front: what no "
        "other row exceeds with as few parameters."
    )
    caption += " Rows that tune none stand left of the break of the axis." if 0 in counts else ""
    caption += " Hollow: as the paper prints it." if hollow else ""
    return Drawing(name=name, figure=figure, caption=_caption(caption, subject, shown, spread="Bars"))


@styled()
def cost(subject: Subject, metric: str, name: str = "") -> Drawing:
    """A metric against the time and the peak memory of training, on one split."""
    split = subject.unbiased(subject.metrics[metric])
    known = [result.cost for row in subject.rows for result in row.results if result.cost]
    slowest = max((each.train_seconds for each in known), default=0.0)
    unit, seconds = next((unit for unit in (("h", 3600), ("min", 60)) if slowest > 2 * unit[1]), ("s", 1))
    measures: dict[str, Callable[[Result], float | None]] = {
        f"Training time ({unit})": lambda result: result.cost and result.cost.train_seconds / seconds,
        "Peak memory of training (GiB)": lambda result: result.cost and result.cost.peak_memory_bytes / 2**30,
    }
    figure, panels = make_panels(len(subject.panels), len(measures), sharey="row")
    shown = []
    for axes_row, group in zip(panels, subject.panels, strict=True):
        for axes, (label, measure) in zip(axes_row, measures.items(), strict=True):
            shown += _scatter(axes, group.rows, measure, partial(_score, metric=metric, split=split))
            _title(axes, group.title, subject.header, split)
            axes.set_ylabel(named(metric, split))
            axes.set_xlabel(label)
            axes.xaxis.set_major_locator(round_ticks())
    front = (Line2D([], [], color="0.55", linewidth=1, drawstyle="steps-post"), "Pareto front")
    _finish(figure, subject, shown, _markers, [front])
    devices = " or ".join(clean(device) for device in dict.fromkeys(each.device for each in known))
    caption = (
        f"{METRICS[metric]} on {split} against the time and the peak memory of training, on {devices}; memory is that "
        "of the device on a GPU, that of the process on a CPU. The line is the Pareto front: what no other row exceeds "
        "at as low a cost."
    )
    return Drawing(name=name, figure=figure, caption=_caption(caption, subject, shown, spread="Bars"))


@styled()
def precision(subject: Subject, name: str = "") -> Drawing:
    """Pr@K against K."""
    splits = subject.splits
    figure, panels = make_panels(len(subject.panels), len(splits), sharey="row")
    shown = []
    for axes_row, group in zip(panels, subject.panels, strict=True):
        for axes, split in zip(axes_row, splits, strict=True):
            for row in group.rows:
                scores = [result.scores[split].precision_at for result in row.results if split in result.scores]
                points = {k: Point.of(100 * at[k] for at in scores) for k in (scores[0] if scores else ())}
                if points:
                    shown.append(row)
                    _curve(axes, row.look, {float(k): point for k, point in points.items()})
            _title(axes, group.title, subject.header, split)
            axes.set_xlabel("K, a threshold of the IoU")
            axes.set_ylabel(f"Pr@K (%), {clean(split)}\n{PROTOCOL}")
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_locator(FixedLocator(RIS_BENCH.precision_at))
            _or_said(axes)
    _finish(figure, subject, shown, _lines)
    caption = "Pr@K, the share of expressions with an IoU greater than K."
    return Drawing(name=name, figure=figure, caption=_caption(caption, subject, shown, spread="Bands"))


@styled()
def thresholds(subject: Subject, name: str = "") -> Drawing:
    """A metric against the probability above which a pixel is predicted, on one split, with the best of an oracle."""
    metric = next((metric for metric in subject.metrics if metric in ("miou", "oiou")), "miou")
    split = subject.unbiased(subject.metrics.get(metric, subject.splits))
    figure, panels = make_panels(len(subject.panels), 1, width=4.5)
    shown = []
    for (axes,), group in zip(panels, subject.panels, strict=True):
        for row in group.rows:
            swept = [found for result in row.results if (found := _swept(result, split, metric))]
            curve = {float(one): Point.of(each[one] for each in swept) for one in (swept[0] if swept else ())}
            if curve:
                shown.append(row)
                _curve(axes, row.look, curve)
                best = max(curve, key=lambda one: curve[one].value)
                axes.plot(best, curve[best].value, marker="o", ms=9, mfc="none", mec=row.look.colour, mew=1.2, zorder=5)
        if shown:
            for used in dict.fromkeys(run.trial.eval.threshold for row in group.rows for run in row.runs):
                axes.axvline(used, color="0.5", linewidth=0.8, linestyle=":", zorder=1)
        _title(axes, group.title, subject.header, split)
        axes.set_xlabel("Threshold of the probability")
        axes.set_ylabel(named(metric, split))
        axes.set_xlim(0, 1)
        axes.yaxis.set_major_locator(round_ticks())
        _or_said(axes)
    ring = (Line2D([], [], linestyle="", marker="o", ms=9, mfc="none", mec="0.3"), "oracle")
    used = (Line2D([], [], color="0.5", linewidth=0.8, linestyle=":"), "used")
    reason = NO_RESULT if not any(row.results for row in subject.rows) else "no other threshold was tried"
    _finish(figure, subject, shown, _lines, [ring, used], reason=reason)
    caption = (
        f"{METRICS[metric]} on {split} against the probability above which a pixel is predicted. Rings: the best, "
        "which an oracle would choose on the split itself; dotted: the one that the table uses."
    )
    return Drawing(name=name, figure=figure, caption=_caption(caption, subject, shown, spread="Bands"))


@styled()
def learning(subject: Subject, name: str = "") -> Drawing:
    """The training loss and the validation score by epoch."""
    figure, panels = make_panels(len(subject.panels), 2, width=3.0)
    shown = []
    for (losses, scores), group in zip(panels, subject.panels, strict=True):
        evaluations = [run.trial.eval for row in group.rows for run in row.runs]
        last = max(
            (result.history[-1].epoch for row in group.rows for result in row.results if result.history), default=1
        )
        for row in group.rows:
            epochs = [epoch for result in row.results for epoch in result.history]
            metric = row.runs[0].trial.eval.metric if row.runs else "miou"
            loss = _by_epoch((epoch.epoch, epoch.loss) for epoch in epochs)
            score = _by_epoch((epoch.epoch, getattr(epoch, metric)) for epoch in epochs)
            if loss:
                shown.append(row)
                _curve(losses, row.look, loss)
                _curve(scores, row.look, {k: Point(100 * p.value, 100 * p.spread) for k, p in score.items()})
        trained = " or ".join(dict.fromkeys(run.trial.train.split for row in group.rows for run in row.runs))
        losses.set_ylabel(f"Training loss, {trained}")
        names = dict.fromkeys(named(each.metric, each.select_on) for each in evaluations)
        scores.set_ylabel(" or ".join(names))
        for axes in (losses, scores):
            _title(axes, group.title, subject.header)
            axes.set_xlabel("Epoch")
            axes.set_xlim(0.8 - 0.03 * last, 1.03 * last + 0.2)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            axes.yaxis.set_major_locator(round_ticks())
            _or_said(axes)
    _finish(figure, subject, shown, _lines)
    caption = "The mean loss of every epoch of training, and the validation score, by which the checkpoint is selected."
    return Drawing(name=name, figure=figure, caption=_caption(caption, subject, shown, spread="Bands"))


@styled()
def breakdown(subject: Subject, by: str, frames: Callable[[Result], pd.DataFrame], name: str = "") -> Drawing:
    """A metric of groups of expressions, on one split; `by` is one of breakdowns.BY."""
    metric = next((metric for metric in subject.metrics if metric in ("miou", "oiou")), "miou")
    split = subject.unbiased(subject.metrics.get(metric, subject.splits))
    figure, panels = make_panels(len(subject.panels), 1, width=7.0, height=1.9)
    shown, read, unread = [], [], []
    for (axes,), group in zip(panels, subject.panels, strict=True):
        found: dict[str, list[tuple[Row, Point]]] = {}
        sizes: dict[str, int] = {}
        for row in group.rows:
            try:
                tables = [frame[frame["split"] == split] for frame in map(frames, row.results)]
            except UserError as error:
                unread.append(str(error))
                continue
            read += tables
            each = [{part.group: part for part in breakdowns.breakdown("", table, by)} for table in tables]
            for part in each[0].values() if each else ():
                sizes.setdefault(part.group, part.num_expressions)
                numbers = [100 * getattr(parts[part.group], metric) for parts in each if part.group in parts]
                found.setdefault(part.group, []).append((row, Point.of(numbers)))
        found.pop(breakdowns.NOT_RECORDED, None)
        few = sorted(found, key=lambda part: -sizes[part])[:MOST_CATEGORIES]
        dropped = len(found) - len(few)
        found = {part: bars for part, bars in found.items() if part in few}
        if len(found) > 1:
            width = 0.84 / len(group.rows)
            place = {row.label: k for k, row in enumerate(group.rows)}
            for x, bars in enumerate(found.values()):
                for row, point in bars:
                    shown.append(row)
                    left = x - 0.42 + width * (place[row.label] + 0.5)
                    error = {"ecolor": "0.2", "elinewidth": 0.6}
                    yerr = point.spread or None
                    look = {"facecolor": row.look.colour, "hatch": row.look.hatch, "edgecolor": "white"}
                    axes.bar(left, point.value, width * 0.92, yerr=yerr, error_kw=error, linewidth=0.3, **look)
            labels = [f"{clean(part, 16)}\nn = {sizes[part]:,}" for part in found]
            axes.set_xticks(range(len(found)), labels)
            axes.set_xlim(-0.5, len(found) - 0.5)
            axes.grid(visible=False, axis="x")
        _title(axes, group.title, subject.header, split)
        axes.set_ylabel(named(metric, split))
        most = f" (the {len(few)} most frequent of {len(few) + dropped})" if dropped else ""
        axes.set_xlabel(f"{breakdowns.TITLES[by]}{most}")
        _or_said(axes, "no two groups are recorded")
    if read:
        reason = f"of the expressions of {split} no two groups by {by} are recorded"
    else:
        reason = unread[0] if unread else NO_RESULT
    _finish(figure, subject, shown, _patches, reason=reason)
    caption = f"{METRICS[metric]} on {split} by group of expressions: {breakdowns.TITLES[by].lower()}; n: expressions."
    caption += "".join(f" Left out: {clean(line, 400)}." for line in unread)
    return Drawing(name=name, figure=figure, caption=_caption(caption, subject, shown, spread="Lines"))


@styled()
def history(experiment: Experiment, results: Mapping[str, Result], name: str = "") -> Drawing:
    """The score of every trial of a search in the order in which they were suggested, and the best so far."""
    evaluation = experiment.search.base.eval
    known = {int(run.axes[search.NUMBER]): results[run.trial.id] for run in experiment.runs if run.trial.id in results}
    scores = {number: 100 * value for number, result in known.items() if (value := search.score(result)) is not None}
    if not scores:
        raise UserError(NO_RESULT)
    figure, [[axes]] = make_panels(1, 1, width=4.5)
    best = [max(value for other, value in scores.items() if other <= number) for number in scores]
    axes.step([*scores], best, where="post", color="0.55", lw=1, zorder=1.5)
    kinds = {
        "trained to its end": (appearance(0), lambda result: not result.stopped, True),
        "stopped early": (appearance(1), lambda result: result.stopped, False),
    }
    pairs = []
    for label, (look, holds, filled) in kinds.items():
        if numbers := [number for number in scores if holds(known[number])]:
            style = {"linestyle": "", "marker": look.marker, "color": look.colour, "ms": look.size}
            style["mfc"] = look.colour if filled else "white"
            axes.plot(numbers, [scores[number] for number in numbers], zorder=4, **style)
            pairs.append((Line2D([], [], **style), label))
    pairs.append((Line2D([], [], color="0.55", linewidth=1, drawstyle="steps-post"), "best so far"))
    failed = [number for number, result in known.items() if result.status == "failed"]
    if failed:
        style = {"linestyle": "", "marker": "x", "color": "0.3", "ms": 5, "clip_on": False}
        axes.plot(failed, [0] * len(failed), transform=axes.get_xaxis_transform(), zorder=4, **style)
        pairs.append((Line2D([], [], **style), "failed"))
    axes.set_xlabel("Suggestion")
    axes.set_ylabel(named(evaluation.metric, evaluation.select_on))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(round_ticks())
    legend_below(figure, pairs)
    caption = (
        f"{METRICS[evaluation.metric]} on {clean(evaluation.select_on)} of the trials of the search, in the order "
        "in which they were suggested. What was suggested twice was run once, and is shown once."
    )
    return Drawing(name=name, figure=figure, caption=caption)


@styled()
def importances(experiment: Experiment, results: Mapping[str, Result], name: str = "") -> Drawing:
    """How much of a good score goes back to each value that was searched."""
    values = ((run.axes, search.score(results.get(run.trial.id))) for run in experiment.runs)
    scored = [(labels, value) for labels, value in values if value is not None]
    if len(scored) < FEWEST_TRIALS:
        raise UserError(f"fewer than {FEWEST_TRIALS} trials have a score")
    shares = sorted(experiment.search.importances(scored).items(), key=lambda pair: pair[1])
    figure, [[axes]] = make_panels(1, 1, width=4.5, height=0.25 * len(shares) + 0.7)
    axes.barh([clean(key) for key, _ in shares], [share for _, share in shares], 0.7, color=appearance(0).colour)
    for place, (_, share) in enumerate(shares):
        axes.annotate(f"{share:.2f}", (share, place), (3, 0), textcoords="offset points", va="center", fontsize=7)
    axes.set_xlabel("Importance (PED-ANOVA)")
    axes.set_xlim(0, max(0.1, 1.15 * shares[-1][1]))
    axes.grid(visible=False, axis="y")
    caption = (
        "How much of whether a trial is among the best tenth goes back to each value that was searched, 1 in all "
        f"(PED-ANOVA, Watanabe et al., IJCAI 2023), out of {len(scored)} trials; those stopped early count with what "
        "they had reached. Of few trials it is no more than a hint."
    )
    return Drawing(name=name, figure=figure, caption=caption)


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Positions of the (cost, score) that no other point beats, by rising cost: none costs as little and scores as
    much, one of them strictly. Equal points stand or fall together."""

    def beaten(cost: float, score: float) -> bool:
        return any(c <= cost and s >= score and (c, s) != (cost, score) for c, s in points)

    kept = [place for place, point in enumerate(points) if not beaten(*point)]
    return sorted(kept, key=lambda place: points[place])


class _Frames:
    """The expressions of trials, each read once."""

    def __init__(self, store: Store | None) -> None:
        self.store = store
        self._read: dict[str, pd.DataFrame | UserError] = {}

    def __call__(self, result: Result) -> pd.DataFrame:
        if self.store is None:
            raise UserError("the expressions of the trials are not at hand")
        key = result.trial.id
        if key not in self._read:
            try:
                self._read[key] = breakdowns.read(self.store.folder(result.trial))
            except UserError as error:
                self._read[key] = error
        if isinstance(self._read[key], UserError):
            raise self._read[key]
        return self._read[key]


def _score(result: Result, metric: str, split: str) -> float | None:
    """In percent."""
    scores = result.scores.get(split)
    if scores is None:
        return None
    kind, _, threshold = metric.partition("@")
    return 100 * (scores.precision_at[threshold] if threshold else getattr(scores, kind))


def _swept(result: Result, split: str, metric: str) -> dict[str, float]:
    """In percent, by threshold; empty where none was tried but the one."""
    found = result.scores[split].by_threshold if split in result.scores else {}
    return {threshold: 100 * scores[metric] for threshold, scores in found.items()}


def _mean(row: Row, measure: Callable[[Result], float | None]) -> Point | None:
    """Over the seeds that have the number."""
    return Point.of(map(measure, row.results))


def _by_epoch(pairs: Iterable[tuple[int, float | None]]) -> dict[float, Point]:
    numbers: dict[int, list[float]] = {}
    for epoch, number in pairs:
        if number is not None:
            numbers.setdefault(epoch, []).append(number)
    return {epoch: Point.of(each) for epoch, each in sorted(numbers.items())}


def _scatter(
    axes: Axes, rows: Sequence[Row], x: Callable[[Result], float | None], y: Callable[[Result], float | None]
) -> list[Row]:
    """A point for each row that has both numbers, and the front; returns these rows."""
    known = [(row, *pair) for row in rows if None not in (pair := (_mean(row, x), _mean(row, y)))]
    front = [known[place][1:] for place in pareto([(cost.value, score.value) for _, cost, score in known])]
    if len(front) > 1:
        axes.step(
            [c.value for c, _ in front], [s.value for _, s in front], where="post", color="0.55", lw=1, zorder=1.5
        )
    for row, cost, score in known:
        axes.errorbar(
            cost.value,
            score.value,
            xerr=cost.spread or None,
            yerr=score.spread or None,
            fmt=row.look.marker,
            color=row.look.colour,
            elinewidth=0.7,
            markersize=row.look.size,
            markeredgecolor="white",
            markeredgewidth=0.5,
            zorder=4,
        )
    axes.margins(0.09)
    axes.yaxis.set_major_locator(round_ticks())
    _or_said(axes)
    return [row for row, _, _ in known]


def _curve(axes: Axes, look: Look, points: Mapping[float, Point]) -> None:
    x = list(points)
    value, spread = (np.array([point[part] for point in points.values()]) for part in (0, 1))
    if spread.any():
        axes.fill_between(x, value - spread, value + spread, color=look.colour, alpha=0.1, linewidth=0)
    axes.plot(
        x, value, linestyle=look.dash, marker=look.marker, color=look.colour, ms=0.75 * look.size, mec="white", mew=0.3
    )


def _title(axes: Axes, *parts: str) -> None:
    axes.set_title(", ".join(filter(None, parts)))


def _or_said(axes: Axes, text: str = "no result yet") -> None:
    """An empty panel says so."""
    if not (axes.lines or axes.containers or axes.collections):
        axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="0.4")
        axes.tick_params(
            left=False, labelleft=False, bottom=False, labelbottom=False, which="both"
        )  # its ticks may be those of a whole row


def _markers(row: Row) -> Line2D:
    look = row.look
    return Line2D([], [], linestyle="", marker=look.marker, color=look.colour, ms=look.size, mec="white", mew=0.5)


def _lines(row: Row) -> Line2D:
    look = row.look
    return Line2D(
        [], [], linestyle=look.dash, marker=look.marker, color=look.colour, ms=0.75 * look.size, mec="white", mew=0.3
    )


def _patches(row: Row) -> Patch:
    return Patch(facecolor=row.look.colour, hatch=row.look.hatch, edgecolor="white", linewidth=0.3)


def _finish(
    figure: Figure,
    subject: Subject,
    shown: Sequence[Row],
    handle: Callable[[Row], Line2D | Patch],
    extra: Sequence[tuple[Line2D, str]] = (),
    reason: str = NO_RESULT,
    beside: Sequence[Row] = (),
) -> None:
    """The legend below, of the rows that are shown, in their order, and of those `beside`; UserError where none is."""
    if not shown:
        raise UserError(reason)
    entries: dict[str, tuple[Row, str]] = {}
    for row in (row for row in subject.rows if row in shown or row in beside):
        entries[row.label] = (row, "".join(dict.fromkeys(entries.get(row.label, (row, ""))[1] + row.marks)))
    pairs = [(handle(row), f"{label} {marks}".rstrip()) for label, (row, marks) in entries.items()]
    used = {mark for _, marks in entries.values() for mark in marks}
    legend_below(figure, [*pairs, *extra], [f"{mark} {meaning}" for mark, meaning in MARKS.items() if mark in used])


def _caption(what: str, subject: Subject, shown: Sequence[Row], *, spread: str) -> str:
    seeds = sorted({result.trial.seed for row in shown for result in row.results})
    several = any(len(row.results) > 1 for row in shown)
    mean = f"Means over seeds ({', '.join(map(str, seeds))}); {spread.lower()}: sample standard deviation."
    thresholds = " or ".join(dict.fromkeys(f"{run.trial.eval.threshold:g}" for row in shown for run in row.runs))
    protocol = (
        f"Protocol {RIS_BENCH.name}: every expression, in the frame of the original image, at a probability greater "
        f"than {thresholds}."
    )
    lacking = [f"all of {group.title}" for group in subject.groups if group not in subject.panels]
    lacking += [
        ", ".join(filter(None, [group.title, row.label]))
        for group in subject.panels
        for row in group.rows
        if not row.results
    ]
    absent = f"Without a result: {'; '.join(lacking)}." if lacking else ""
    return " ".join(filter(None, [what, mean if several else "One seed.", protocol, absent]))
