"""The table of an experiment, as a function of its results: Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, product
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from tabulate import tabulate

from ris_bench import published, search
from ris_bench.files import write_whole
from ris_bench.layout import COSTS, COUNTS, METRICS, PUBLISHED_COUNTS, Column
from ris_bench.protocols import MARKS as MANNERS
from ris_bench.protocols import RIS_BENCH
from ris_bench.records import Result, Trial

if TYPE_CHECKING:  # it imports torch, with the methods that it names
    from ris_bench.experiment import Experiment, Run
    from ris_bench.report.comparison import Comparisons
    from ris_bench.rescored import Rescored

DEFINITIONS = {
    "miou": "mIoU: mean over expressions of intersection / union",
    "oiou": "oIoU: sum of intersections / sum of unions",
    "pr": "Pr@K: share of expressions with IoU > K",
}


MARKS = {
    "∗": "Some of the seeds have no result.",
    "‡": "The checkpoint was selected on a test split.",
    "◦": "The training was stopped early.",
    "§": "Images of evaluated splits were left in the training split.",
    "†": "Published, but not confirmed in its source.",
    "¶": "Published as another paper has it: mIoU or oIoU, whatever the column is.",
}
SOURCES = ("published", "measured")


@dataclass(frozen=True)
class Table:
    """One table in three formats.

    The CSV has a row for each cell, as pandas likes it, and neither title nor notes: the labels of the row under the
    names of their axes; `column` (its header), `value` (what it shows, such as miou) and `split`; `mean` and `std`
    (the sample standard deviation) in the unit of the table, unrounded, and empty where there is none; `seeds` that
    these are of, out of `wanted`; `marks` of MARKS; and the `text` that the other formats print.
    """

    markdown: str
    latex: str
    csv: str


@dataclass(frozen=True)
class _Leaf:
    """What one printed column shows: a column of the layout, or one of its splits."""

    column: Column
    split: str = ""

    @property
    def group(self) -> str:
        """The header with the name of the metric, so that a mIoU is never taken for an oIoU."""
        header, metric = self.column.header, METRICS.get(self.column.value, "")
        return header if metric.lower() in header.lower() else f"{header} {metric}".strip()

    @property
    def title(self) -> str:
        return f"{self.group} {self.split}".strip()

    @property
    def digits(self) -> int:
        whole = self.column.value in COUNTS or self.column.value.endswith(("_bytes", ".epochs"))
        default = 0 if whole and self.column.scale is None else 2
        return default if self.column.digits is None else self.column.digits

    def format(self, number: float) -> str:
        return f"{number:,.{self.digits}f}"

    def measure(self, result: Result) -> float | None:
        """The number that is printed of a result; None where it has none, as a score or cost of a failed trial."""
        kind, _, name = self.column.value.partition(".")
        if result.status != "done" and kind != "params":
            return None
        if self.column.value == "cost.epochs":
            return result.history[-1].epoch * (self.column.scale or 1) if result.history else None
        if kind in ("params", "cost"):
            record = getattr(result, kind)
            return None if record is None else getattr(record, name) * (self.column.scale or 1)
        scores = result.scores.get(self.split)
        if scores is None:
            return None
        metric, _, threshold = self.column.value.partition("@")
        share = scores.precision_at.get(threshold) if threshold else getattr(scores, metric)
        return None if share is None else 100 * share

    def shows(self, experiment: Experiment) -> published.Score | published.Average | str | None:
        """What a published column would have to show to stand beside it; None where none could."""
        value = self.column.value
        if self.column.average:
            return published.Average(value)
        if value not in METRICS:
            return next((name for name, own in PUBLISHED_COUNTS.items() if own == value), None)
        runs = [run for run in experiment.runs if self.column.where.items() <= run.axes.items()]
        scores = {published.Score.of(run.trial.dataset.name, self.split, value) for run in runs}
        return scores.pop() if len(scores) == 1 else None

    def cite(self, cited: published.Cited, experiment: Experiment) -> _Cell:
        """The cell of a published row, in the unit of the column."""
        shown = self.shows(experiment)
        cell = cited.cells.get(shown)
        if cell is None or cell.number is None:
            return _Cell("–")
        scale = self.column.scale or 1
        marks = ("†" if cell.uncertain else "") + ("¶" if cited.cited and not isinstance(shown, str) else "")
        # Without its unit where the column has the same: "120.74M" in millions is 120.74.
        text = cell.text.rstrip("KM") if math.isclose(cell.unit * scale, 1) else cell.text
        return _Cell(text, cell.number * scale, marks=marks)


@dataclass(frozen=True)
class _Cell:
    text: str
    number: float | None = None
    spread: float | None = None
    """Sample standard deviation over the seeds."""
    marks: str = ""
    """Of MARKS, for what a reader must know before comparing it."""
    best: bool = False
    second: bool = False
    seeds: int = 0
    """That the number is of."""
    wanted: int = 0
    """That it would be of if nothing were missing."""


@dataclass(frozen=True)
class _Body:
    axes: tuple[str, ...]
    """Of the labels."""
    corner: tuple[str, ...]
    """Headers of the labels."""
    leaves: tuple[_Leaf, ...]
    rows: tuple[tuple[tuple[str, ...], tuple[_Cell, ...]], ...]
    """Labels and cells."""
    outer: int
    """So many labels are shared by the rows of a group."""

    def groups(self) -> Iterator[list[tuple[list[str], tuple[_Cell, ...]]]]:
        """The rows of every group; a label is blank where the row above it has the same."""
        above: tuple[str, ...] = ()
        for _, rows in groupby(self.rows, key=lambda row: row[0][: self.outer]):
            group = []
            for labels, cells in rows:
                shared = len(os.path.commonprefix([labels[:-1], above]))
                group.append(([*[""] * shared, *labels[shared:]], cells))
                above = labels
            yield group


def render(
    experiment: Experiment,
    results: Mapping[str, Result],
    compared: Comparisons | None = None,
    by: Rescored | None = None,
) -> Table:
    """The table of what is known; `results`, by trial id, may lack some and hold others.

    A cell is the mean over its seeds, with the sample standard deviation where there are several. Without a result it
    is "–", or "failed"; MARKS say what else there is to know of it, and `compared` which differences are earned. Scores
    are those of ris-bench, unless `by` has others.
    """
    body, notes = lay_out(experiment, results, compared, by)
    return Table(
        markdown=_markdown(body, experiment.title, notes),
        latex=_latex(body, experiment.title, notes, label=experiment.name),
        csv=_csv(body),
    )


def lay_out(
    experiment: Experiment,
    results: Mapping[str, Result],
    compared: Comparisons | None = None,
    by: Rescored | None = None,
) -> tuple[_Body, list[str]]:
    """What `render` prints: the cells, and the notes below them."""
    layout = experiment.table
    leaves = tuple(_Leaf(column, split) for column in layout.columns for split in column.splits or ("",))
    reported, shown = experiment.reported(results), by.results if by else results
    # Of the product of the axes only what the experiment has.
    had = {tuple(run.axes[axis] for axis in layout.rows) for run in experiment.runs}
    keys = [labels for labels in product(*(experiment.axes[axis] for axis in layout.rows)) if labels in had]
    if experiment.search:  # the best first
        scores = {run.axes[search.NUMBER]: search.score(shown.get(run.trial.id)) for run in experiment.runs}
        keys.sort(key=lambda labels: -math.inf if (known := scores[labels[0]]) is None else known, reverse=True)
    by_leaf = []
    for leaf in leaves:
        parts = [other for other in leaves if leaf.column.average and _averaged(other, leaf)]
        runs = [run for run in reported if leaf.column.where.items() <= run.axes.items()]
        cells = []
        for _, group in groupby(keys, key=lambda labels: labels[:-1]):
            wanted = [dict(zip(layout.rows, labels, strict=True)) for labels in group]
            found = [
                _cell(leaf, [run for run in runs if row.items() <= run.axes.items()], shown, parts) for row in wanted
            ]
            if compared:
                earned = [_earned(leaf, row, compared) for row in wanted]
                found = [replace(cell, marks=mark + cell.marks) for cell, mark in zip(found, earned, strict=True)]
            cells += _with_best(leaf, found)
        by_leaf.append(cells)
    measured = dict(zip(keys, zip(*by_leaf, strict=True), strict=True))
    body = (_beside if layout.published else _alone)(experiment, leaves, measured)
    return body, list(_notes(experiment, results, body, compared, by))


Measured = Mapping[tuple[str, ...], tuple[_Cell, ...]]
"""Cells of the rows of an experiment, by their labels on the axes."""


def _alone(experiment: Experiment, leaves: tuple[_Leaf, ...], measured: Measured) -> _Body:
    layout = experiment.table
    rows = tuple((_printed(layout.labels, labels), cells) for labels, cells in measured.items())
    return _Body(layout.rows, corner(layout.rows), leaves, rows, len(layout.rows) - 1)


def _beside(experiment: Experiment, leaves: tuple[_Leaf, ...], measured: Measured) -> _Body:
    """The rows of the published tables, in their order, each above what stands for it here; then what is only here."""
    layout, rows, left = experiment.table, [], dict(measured)
    cited = published.rows(layout.published)
    about = sorted(dict.fromkeys(key for row in cited for key in row.about), key=lambda key: key != "group")
    outer = about[:1] if about[:1] == ["group"] else []
    inner = [key for key in about if key not in outer]

    def described(facts: Mapping[str, str], names: Sequence[str], source: str) -> tuple[str, ...]:
        return (*(facts.get(key, "") for key in outer), *names, *(facts.get(key, "") for key in inner), source)

    for row in cited:
        labels = layout.stands_for.get(row.name)
        blanks = [""] * (len(layout.rows) - 1)
        names = _printed(layout.labels, labels) if labels in left else [row.name, *blanks]
        rows.append((described(row.about, names, SOURCES[0]), tuple(leaf.cite(row, experiment) for leaf in leaves)))
        if labels in left:
            rows.append((described(row.about, names, SOURCES[1]), left.pop(labels)))
    last = {key: rows[-1][0][0] for key in outer}
    for labels, cells in left.items():
        rows.append((described(last, _printed(layout.labels, labels), SOURCES[1]), cells))
    axes = (*(f"about.{key}" for key in outer), *layout.rows, *(f"about.{key}" for key in inner), "numbers")
    named = ["Method"] if len(layout.rows) == 1 else corner(layout.rows)
    titles = (*map(str.capitalize, outer), *named, *map(str.capitalize, inner), "Numbers")
    return _Body(axes, titles, leaves, tuple(rows), len(outer))


def _printed(texts: Mapping[str, str], labels: Iterable[str]) -> tuple[str, ...]:
    return tuple(texts.get(label, label) for label in labels)


def write(table: Table, folder: Path) -> None:
    """Write table.md, table.tex and table.csv into a folder; each appears whole or not at all."""
    for suffix, text in (("md", table.markdown), ("tex", table.latex), ("csv", table.csv)):
        write_whole(folder / f"table.{suffix}", text)


def _averaged(part: _Leaf, average: _Leaf) -> bool:
    """Whether a column is one of those that an average is of."""
    column = part.column
    return column.value == average.column.value and not column.average and not part.split.endswith("/shuffled")


def _cell(leaf: _Leaf, runs: Sequence[Run], results: Mapping[str, Result], parts: Sequence[_Leaf]) -> _Cell:
    value = leaf.column.value
    if value not in (*METRICS, *COUNTS, *COSTS):
        return _Cell(" / ".join(_distinct(run.axes[value] for run in runs)) or "–")
    wanted = len({run.trial.seed for run in runs})
    known = [results[run.trial.id] for run in runs if run.trial.id in results]
    measured = [(result.trial.seed, number) for result in known if (number := leaf.measure(result)) is not None]
    expected = len(runs)
    if leaf.column.average:
        measured, expected = list(_averages(parts, runs, results)), wanted
    if not measured:
        return _Cell("failed" if any(result.status == "failed" for result in known) else "–", wanted=wanted)
    seeds, numbers = zip(*measured, strict=True)
    cell = _Cell(leaf.format(numbers[0]), numbers[0], seeds=len(set(seeds)), wanted=wanted)
    if value in COUNTS:
        # No seed changes a count; where another axis does, their mean would be the count of no model.
        texts = _distinct(map(leaf.format, numbers))
        return cell if len(texts) == 1 else replace(cell, text=" / ".join(texts), number=None)
    mean = fmean(numbers)
    scored = [run.trial for run in runs] if value in METRICS else []
    return replace(
        cell,
        text=leaf.format(mean),
        number=mean,
        spread=stdev(numbers) if len(numbers) > 1 else None,
        marks=caveats(scored, lacking=len(numbers) < expected)
        + ("◦" if value in METRICS and any(result.stopped for result in known) else ""),
    )


def _averages(
    parts: Sequence[_Leaf], runs: Sequence[Run], results: Mapping[str, Result]
) -> Iterator[tuple[int, float]]:
    """Every seed that has a result for all of the columns, and the mean over these."""
    for seed in dict.fromkeys(run.trial.seed for run in runs):
        own = [run for run in runs if run.trial.seed == seed and run.trial.id in results]
        numbers = [
            next((part.measure(results[r.trial.id]) for r in own if part.column.where.items() <= r.axes.items()), None)
            for part in parts
        ]
        if numbers and None not in numbers:
            yield seed, fmean(numbers)


def caveats(trials: Collection[Trial], *, lacking: bool) -> str:
    """What of MARKS holds for a mean over the scores of these trials, of which it may lack some."""
    marks = "∗" if lacking else ""
    marks += "‡" if any(trial.eval.select_on.startswith("test") for trial in trials) else ""
    return marks + ("§" if any(trial.dataset.options.get("leakage") == "allow" for trial in trials) else "")


def corner(axes: Iterable[str]) -> tuple[str, ...]:
    """Headers of the labels of axes."""
    return tuple(axis if "." in axis else axis.capitalize() for axis in axes)


def _with_best(leaf: _Leaf, cells: list[_Cell]) -> list[_Cell]:
    numbers = sorted({cell.number for cell in cells if cell.number is not None}, reverse=leaf.column.best == "max")
    if leaf.column.best is None or not numbers:
        return cells
    # What is printed alike is equally good. That of two cells one is the second tells nothing.
    best, *others = _distinct(map(leaf.format, numbers))
    second = others[0] if sum(cell.number is not None for cell in cells) > 2 and others else None
    known = [(cell, cell.text if cell.number is not None else "") for cell in cells]
    return [replace(cell, best=text == best, second=text == second) for cell, text in known]


def _distinct(values: Iterable[object]) -> list[str]:
    return list(dict.fromkeys(map(str, values)))


def _earned(leaf: _Leaf, row: Mapping[str, str], compared: Comparisons) -> str:
    """▲ or ▼ where the row differs from what it is compared with beyond chance."""
    key = ({**leaf.column.where, **row}, leaf.split, leaf.column.value)
    values = (r.difference.value for r in compared.rows if r.earned and (dict(r.axes), r.split, r.metric) == key)
    return "".join("▲" if value > 0 else "▼" for value in values)


def _notes(
    experiment: Experiment,
    results: Mapping[str, Result],
    body: _Body,
    compared: Comparisons | None,
    by: Rescored | None,
) -> Iterator[str]:
    trials = [run.trial for run in experiment.runs]
    metrics = _distinct(leaf.column.value.partition("@")[0] for leaf in body.leaves if leaf.column.value in METRICS)
    if metrics and by:
        yield f"{'; '.join(DEFINITIONS[metric] for metric in metrics)}. In percent."
        yield f"By the protocol {by.protocol.name}: {by.protocol.describe('test')}."
        for ours, theirs in (("oIoU", by.protocol.overall), ("mIoU", by.protocol.mean)):
            if theirs != ours:
                yield f"What stands here as {ours} is called {theirs} there."
        yield from (f"Of some scores, {MANNERS[mark]}." for mark in by.marks)
    elif metrics:
        thresholds = " or ".join(_distinct(trial.eval.threshold for trial in trials))
        yield (
            f"{'; '.join(DEFINITIONS[metric] for metric in metrics)}. In percent, by the protocol {RIS_BENCH.name}: "
            "over every expression, in the frame of the original image; a pixel is in the mask where its probability "
            f"is greater than {thresholds}."
        )
    if any(leaf.split.endswith("/shuffled") for leaf in body.leaves):
        yield "SPLIT/shuffled: the expressions of the split are dealt out to other referents."
    seeds = _distinct(", ".join(_distinct(run.trial.seed for run in cell)) for cell in experiment.cells())
    several = " or ".join(f"{len(each.split(', '))} seeds ({each})" for each in seeds if "," in each)
    single = " or ".join(f"one seed ({each})" for each in seeds if "," not in each)
    alone = f", {single} where there is no ±" if single else ""
    yield f"Mean ± sample standard deviation over {several}{alone}." if several else f"{single.capitalize()}."
    selected = " or ".join(_distinct(f"{t.eval.select_on} by {METRICS[t.eval.metric]}" for t in trials))
    trained = " or ".join(_distinct(trial.train.split for trial in trials))
    yield f"Trained on {trained}; checkpoint selected on {selected}."
    together = _distinct(trial.train.expressions_per_image for trial in trials)
    if together != ["1"]:
        yield (
            f"Up to {' or '.join(together)} expressions of an image are trained on side by side "
            "(train.expressions_per_image); in the papers each comes when it is its own turn."
        )
    for axis in experiment.choose:
        cells = [cell for cell in experiment.cells() if len({run.axes[axis] for run in cell}) > 1]
        values = " or ".join(_distinct(", ".join(_distinct(run.axes[axis] for run in cell)) for cell in cells))
        first = " or ".join(_distinct(cell[0].trial.seed for cell in cells))
        where = "per cell" if len(cells) == len(experiment.cells()) else "where there are several"
        yield f"{axis} is chosen {where} out of {values}, on {selected}, with seed {first}."
    if experiment.search:
        yield from experiment.search.notes()
    if experiment.assignments:
        yield f"Set on the command line: {', '.join(experiment.assignments)}."
    yield from experiment.notes
    yield from _citations(experiment.table.published)

    wanted, shown = experiment.trials(results), by.results if by else results
    known = [shown[trial.id] for trial in wanted if trial.id in shown]
    splits = {leaf.split.removesuffix("/shuffled") for leaf in body.leaves}
    if sizes := ", ".join(_sizes((result for result in known if result.status == "done"), splits)):
        yield f"Expressions: {sizes}."
    if known:
        made = [result.provenance for result in known]
        versions = Counter(f"{p.commit or 'unknown'}{' with uncommitted changes' if p.dirty else ''}" for p in made)
        code = "Commit " + ", ".join(versions)
        if len(versions) > 1:  # a number may be another by another code
            code = "Different code: commit " + ", ".join(f"{v} ({n})" for v, n in versions.items())
        how = ", ".join(_distinct(f"{r.provenance.precision} on {r.cost.device}" for r in known if r.cost))
        days = sorted({p.started[:10] for p in made})
        yield "; ".join(filter(None, [code, how, " to ".join(_distinct((days[0], days[-1])))])) + "."
    failed = sum(result.status == "failed" for result in known)
    counts = [f"{len(known) - failed} of {len(wanted)} trials done"]
    counts += [f"{failed} failed"] if failed else []
    counts += [f"{len(wanted) - len(known)} not run"] if len(wanted) > len(known) else []
    yield f"{', '.join(counts)}."
    used = {mark for _, cells in body.rows for cell in cells for mark in cell.marks}
    yield from (f"{mark} {meaning}" for mark, meaning in MARKS.items() if mark in used)
    if compared:
        yield (
            f"▲ better, ▼ worse than {compared.against}, beyond what other images (paired bootstrap, corrected after "
            f"Holm for {len(compared.rows)} comparisons) and other seeds would explain."
        )


def _citations(names: Sequence[str]) -> Iterator[str]:
    """Where published numbers come from, and what they are."""
    found = published.load()
    for table in (found.tables[name] for name in names):
        paper = found.papers[table.paper]
        metric = ""
        if table.prints:
            same = table.prints == METRICS[table.computes]
            but = f"its code computes {METRICS[table.computes]}"
            metric = f"; it prints {table.prints}" + ("" if same else f", {but}")
        yield f"Published: {paper.authors}, {paper.venue}, arXiv:{paper.arxiv}, {table.caption!r}{metric}."
        yield from table.notes
    if names:
        yield "Best and second are of what was measured."


def _sizes(results: Iterable[Result], splits: Collection[str]) -> Iterator[str]:
    """How many expressions each of these splits has: one number, unless trials were evaluated on different files."""
    sizes: dict[str, list[int]] = {}
    for result in results:
        for split in (split for split in result.scores if split in splits):
            name = f"{result.trial.dataset.name} {split}"
            sizes.setdefault(name, []).append(result.scores[split].num_expressions)
    for name, numbers in sizes.items():
        yield f"{name} {' or '.join(_distinct(f'{number:,}' for number in numbers))}"


def line(text: str) -> str:
    """One line without control characters, and without commands that would reorder what stands around it."""
    return "".join("\N{REPLACEMENT CHARACTER}" if _is_command(letter) else letter for letter in " ".join(text.split()))


def _is_command(letter: str) -> bool:
    # Joiners, which emoji are made of, are harmless. Half of a surrogate pair is no letter.
    return unicodedata.category(letter) in ("Cc", "Cs") or unicodedata.bidirectional(letter) in _REORDERING


_REORDERING = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
_MARKUP = re.compile(
    r"""[\\|<*`~$\[]        # escapes, cells, HTML, emphasis, code, mathematics, links and images
    | (?<![^\W_])_ | _(?![^\W_])  # emphasis, but for what is within a word
    | &(?=\#?\w+;)             # entities
    """,
    re.VERBOSE,
)


def escaped(text: str) -> str:
    """One line of text for a cell of a Markdown table, which reads as what it is: nothing in it is markup."""
    return _MARKUP.sub(lambda found: {"<": "&lt;", "&": "&amp;"}.get(found[0], f"\\{found[0]}"), line(text))


def _markdown(body: _Body, title: str, notes: Iterable[str]) -> str:
    def printed(leaf: _Leaf, cell: _Cell) -> str:
        text = f"**{cell.text}**" if cell.best else escaped(cell.text)
        spread = "" if cell.spread is None else f" ± {leaf.format(cell.spread)}"
        return f"{text}{spread} {cell.marks}".rstrip()

    lines = tabulate(
        [
            [*map(escaped, labels), *map(printed, body.leaves, cells)]
            for group in body.groups()
            for labels, cells in group
        ],
        headers=[*map(escaped, body.corner), *(escaped(leaf.title) for leaf in body.leaves)],
        tablefmt="pipe",
        colalign=(*("left" for _ in body.corner), *("right" for _ in body.leaves)),
        disable_numparse=True,
    )
    return f"**{escaped(title)}**\n\n{lines}\n\n" + "".join(f"- {escaped(note)}\n" for note in notes)


_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    # At the start of a row these two would belong to the command that ended the row before.
    "[": "{[}",
    "*": "{*}",
    "`": "{`}",
    "–": "--",
    "—": "---",
    "…": r"\ldots{}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "→": r"$\to$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "▲": r"$^\uparrow$",
    "▼": r"$^\downarrow$",
    "−": "$-$",
    "∗": r"$^\ast$",
    "¶": r"$^\P$",
    "†": r"$^\dagger$",
    "‡": r"$^\ddagger$",
    "§": r"$^\S$",
    "◦": r"$^\circ$",
    **{
        letter: rf"$\{name}$"
        for letters, names in (
            ("αβγδεζηθικλμ", "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu"),
            ("νξπρστυφχψω", "nu xi pi rho sigma tau upsilon phi chi psi omega"),
            ("ΓΔΘΛΞΠΣΥΦΨΩ", "Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega"),
        )
        for letter, name in zip(letters, names.split(), strict=True)
    },
}


_LETTERS = frozenset(map(chr, range(0xA1, 0x17F))) - {*"«»ÐÞðþĄąĐđĘęĦħĮįĸĿŀŉŊŋŦŧŲų\xad"} | {*"‘’“”•"}
"""Beyond ASCII, that pdflatex prints with the fonts that it begins with."""


def in_latex(text: str) -> str:
    """Text as LaTeX prints it without any package: a letter that its own fonts lack is named by its number."""

    def printed(letter: str, following: str) -> str:
        known = letter.isascii() or letter in _LETTERS
        text = _LATEX.get(letter, letter if known else f"{{[}}U+{ord(letter):04X}]")
        return text + "{}" if letter == following and letter in "-'" else text  # else these two would make another

    text = unicodedata.normalize("NFC", line(text))
    return "".join(map(printed, text, f"{text[1:]} "))


def _latex(body: _Body, title: str, notes: Iterable[str], label: str) -> str:
    def printed(leaf: _Leaf, cell: _Cell) -> str:
        text = in_latex(cell.text)
        if cell.best or cell.second:
            text = rf"\{'textbf' if cell.best else 'underline'}{{{text}}}"
        spread = "" if cell.spread is None else rf" $\pm$ {leaf.format(cell.spread)}"
        return f"{text}{spread}{in_latex(cell.marks)}"

    def row(cells: Iterable[str]) -> str:
        return rf"{' & '.join(cells)} \\"

    header = [row([*map(in_latex, body.corner), *(in_latex(leaf.split or leaf.group) for leaf in body.leaves)])]
    above, rules, end = [""] * len(body.corner), [], len(body.corner)
    for _, group in groupby(body.leaves, key=lambda leaf: id(leaf.column)):
        leaves = list(group)
        start, end = end + 1, end + len(leaves)
        if leaves[0].split:
            above.append(rf"\multicolumn{{{len(leaves)}}}{{c}}{{{in_latex(leaves[0].group)}}}")
            rules.append(rf"\cmidrule(lr){{{start}-{end}}}")
        else:
            above.append("")
    if rules:
        header = [row(above), " ".join(rules), *header]
    lines = []
    for group in body.groups():
        lines += [
            r"\midrule",
            *(row([*map(in_latex, labels), *map(printed, body.leaves, cells)]) for labels, cells in group),
        ]
    columns = len(body.corner) + len(body.leaves)
    environment = "table*" if columns > 6 else "table"  # over both columns of a page
    fitted = columns > 8
    return "\n".join(
        [
            rf"\begin{{{environment}}}[t]",
            r"\centering",
            rf"\caption{{{in_latex(title)}}}",
            rf"\label{{tab:{label}}}",
            *([r"\resizebox{\linewidth}{!}{%"] if fitted else []),
            rf"\begin{{tabular}}{{{'l' * len(body.corner)}{'r' * len(body.leaves)}}}",
            r"\toprule",
            *header,
            *lines,
            r"\bottomrule",
            r"\end{tabular}" + "}" * fitted,
            "",
            r"\smallskip",
            r"\parbox{\linewidth}{\footnotesize",
            *(rf"{in_latex(note)}\par" for note in notes),
            "}",
            rf"\end{{{environment}}}",
            "",
        ]
    )


def _csv(body: _Body) -> str:
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.12g}"

    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    about = ("column", "value", "split", "mean", "std", "seeds", "wanted", "marks", "text")
    writer.writerow([*body.axes, *about])
    for labels, cells in body.rows:
        for leaf, cell in zip(body.leaves, cells, strict=True):
            shown = (leaf.column.header, leaf.column.value, leaf.split, number(cell.number), number(cell.spread))
            writer.writerow([*labels, *shown, cell.seeds, cell.wanted, cell.marks, cell.text])
    return file.getvalue()
