"""The page of an experiment: tables, audit, statistics, figures, pictures and provenance, offline in one file.

The template, its style and its script lie beside this module. Whatever comes from a file of results is text in the page
and never markup: Jinja escapes it, the script only moves elements, and a Content-Security-Policy lets nothing else run.
"""

from __future__ import annotations

import base64
import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Literal, NamedTuple

import jinja2
import yaml
from markupsafe import Markup  # of jinja2

from ris_bench.files import write_whole
from ris_bench.layout import COSTS, COUNTS, METRICS
from ris_bench.records import Result, plain
from ris_bench.report import tables
from ris_bench.report.gallery import KINDS, LIMIT, gallery
from ris_bench.results import Store

if TYPE_CHECKING:  # the last imports matplotlib
    from ris_bench.plan import Experiment
    from ris_bench.report.comparison import Comparisons
    from ris_bench.report.drawing import Drawing
    from ris_bench.report.speeds import Speeds

FILE = Path(__file__)


class _Cell(NamedTuple):
    text: str
    number: float | None = None
    """By which it is sorted."""
    spread: str = ""
    marks: str = ""
    best: bool = False
    second: bool = False
    interval: Mapping[str, float] | None = None


class _Column(NamedTuple):
    title: str
    kind: Literal["label", "text", "number"]
    group: str = ""
    """The header above it."""
    first: Literal["ascending", "descending"] = "ascending"
    """How a first click sorts."""


class _Row(NamedTuple):
    cells: Sequence[_Cell]
    kind: str = ""
    """`starts` (a group), `earned` (its mark), or nothing: a class."""


@dataclass(frozen=True, kw_only=True)
class _Table:
    id: str
    caption: str
    columns: Sequence[_Column]
    rows: Sequence[_Row]
    notes: Sequence[str]

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Headers of the upper line and how many columns they are of; none where no column has one."""
        spans: list[tuple[str, int]] = []
        for column in self.columns:
            if spans and column.group and spans[-1][0] == column.group:
                spans[-1] = (column.group, spans[-1][1] + 1)
            else:
                spans.append((column.group, 1))
        return spans if any(text for text, _ in spans) else []


class _Note(NamedTuple):
    text: str
    warn: bool = False


def write(
    path: Path,
    experiment: Experiment,
    store: Store,
    results: Mapping[str, Result],
    *,
    compared: Comparisons | None = None,
    drawings: Sequence[Drawing] = (),
    absent: Sequence[str] = (),
    skipped: Sequence[str] = (),
    speeds: Speeds | None = None,
    pictures: int = LIMIT,
) -> None:
    """Write the page; it appears whole or not at all.

    Args:
        store: where the trials' folders lie, with overlays/ and expressions.parquet for the gallery.
        results: by trial id; some may be missing, and there may be others.
        compared: the rows of the table against one of them; without it the page says how to have it.
        drawings, absent: what `figures.draw` returns.
        skipped: what `results` lacks, in sentences.
        speeds: without it the page has no section on speed.
        pictures: at most so many in the gallery.
    """
    wanted = experiment.trials(results)
    known = [results[trial.id] for trial in wanted if trial.id in results]
    shown, gallery_notes = gallery(experiment, store, results, pictures)
    css, js = (FILE.with_suffix(suffix).read_text(encoding="utf-8") for suffix in (".css", ".js"))
    failed = [
        (result.trial.id, result.error or "no reason is recorded") for result in known if result.status == "failed"
    ]
    text = _template().render(
        css=Markup(css),
        js=Markup(js),
        policy=_policy(css, js),
        name=experiment.name,
        title=experiment.title,
        summary=list(_summary(wanted, known)),
        sections=[
            (name, name.capitalize())
            for name in ("results", "audit", "statistics", "figures", "speed", "gallery", "failures", "configuration")
            if speeds or name != "speed"
        ],
        results_table=_results_table(experiment, results, compared),
        audit=list(_audit(experiment, results, known)),
        statistics=compared and _statistics_table(compared),
        no_statistics="No row was named that the others are to be compared with: ris-bench report --against METHOD.",
        figures=list(_figures(drawings)),
        no_figures=absent or ([] if drawings else ["There are none: they are drawn with ris-bench report."]),
        speed=speeds and _speed_table(speeds),
        pictures=shown,
        pictured=list(dict.fromkeys(picture.row for picture in shown)),
        datasets=list(dict.fromkeys(picture.key.dataset for picture in shown)),
        keys={key: place for place, key in enumerate(dict.fromkeys(picture.key for picture in shown))},
        kinds=[kind for kind in KINDS if any(kind in picture.kinds for picture in shown)],
        gallery_notes=gallery_notes,
        failures=failed,
        skipped=skipped,
        experiment_file=experiment.path.name,
        experiment_yaml=experiment.source,
        trials=[_provenance(result) for result in known],
    )
    write_whole(path, text)


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, cache_size=0
    )
    return environment.from_string(FILE.with_suffix(".html").read_text(encoding="utf-8"))


def _policy(css: str, js: str) -> str:
    """Only this style, this script, and pictures that the page holds itself."""
    style, script = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (css, js))
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{style}'; script-src 'sha256-{script}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _summary(wanted: Sequence, known: Sequence[Result]) -> Iterator[str]:
    done = [result for result in known if result.status == "done"]
    yield f"{len(done)} of {len(wanted)} trials done"
    if failed := len(known) - len(done):
        yield f"{failed} failed"
    if days := sorted({result.provenance.started[:10] for result in known}):
        yield " to ".join(dict.fromkeys((days[0], days[-1])))


def _results_table(experiment: Experiment, results: Mapping[str, Result], compared: Comparisons | None) -> _Table:
    """The table that `tables.render` prints."""
    body, notes = tables.lay_out(experiment, results, compared)
    columns = [_Column(title, "label") for title in body.corner]
    for leaf in body.leaves:
        numeric = leaf.column.value in (*METRICS, *COUNTS, *COSTS)
        columns.append(
            _Column(
                leaf.split or leaf.group,
                "number" if numeric else "text",
                group=leaf.group if leaf.split else "",
                first="descending" if leaf.column.value in METRICS else "ascending",
            )
        )
    rows, above = [], ()
    for labels, cells in body.rows:
        printed = [
            _Cell(
                cell.text,
                cell.number,
                "" if cell.spread is None else leaf.format(cell.spread),
                cell.marks,
                best=cell.best,
                second=cell.second,
            )
            for leaf, cell in zip(body.leaves, cells, strict=True)
        ]
        rows.append(_Row([*map(_Cell, labels), *printed], "starts" if labels[: body.outer] != above else ""))
        above = labels[: body.outer]
    return _Table(id="table", caption=experiment.title, columns=columns, rows=rows, notes=notes)


def _statistics_table(compared: Comparisons) -> _Table:
    """What `Comparisons.markdown` prints, with every interval drawn, all on one scale."""
    from ris_bench.report.comparison import NUMBERS

    ends = [0.0, *(end for row in compared.rows for end in row.difference[1:3])]
    start, span = min(ends), max(ends) - min(ends) or 1.0

    def place(number: float) -> float:
        return round(100 * (number - start) / span, 2)

    rows = []
    for (labels, texts), row in zip(compared.lines(), compared.rows, strict=True):
        value, low, high, p = row.difference
        noise = row.seed_noise
        cells = [_Cell(text, by) for text, by in zip(texts, (value, low, p, row.p_holm, None, noise), strict=True)]
        drawn = {"low": place(low), "high": place(high), "value": place(value), "zero": place(0.0)}
        cells[1] = cells[1]._replace(interval=drawn)
        rows.append(_Row([*map(_Cell, labels), *cells], "earned" if row.earned else ""))
    *around, own = compared.headers()
    columns = [*(_Column(title, "text") for title in around), _Column(own, "label")]
    columns += [
        _Column(title, "number", first="ascending" if title.startswith("p") else "descending") for title in NUMBERS
    ]
    caption = f"Against {compared.against}"
    return _Table(id="comparisons", caption=caption, columns=columns, rows=rows, notes=list(compared.notes()))


def _speed_table(speeds: Speeds) -> _Table:
    """What `Speeds.markdown` prints."""
    from ris_bench.report.speeds import LABELS, NUMBERS

    columns = [_Column(LABELS[0], "label"), *(_Column(title, "text") for title in LABELS[1:])]
    columns += [_Column(title, "number", first="descending" if title == "Ratio" else "ascending") for title in NUMBERS]
    rows, above = [], None
    for labels, cells in speeds.lines():
        printed = [*map(_Cell, labels), *(_Cell(cell.text, cell.number) for cell in cells)]
        rows.append(_Row(printed, "starts" if labels[0] != above else ""))
        above = labels[0]
    caption = f"On {speeds.device}, {speeds.precision}"
    return _Table(id="speeds", caption=caption, columns=columns, rows=rows, notes=list(speeds.notes()))


def _audit(experiment: Experiment, results: Mapping[str, Result], known: Sequence[Result]) -> Iterator[_Note]:
    """What can make a number mean less than it seems to."""
    trials = [run.trial for run in experiment.runs]
    for select_on, metric in dict.fromkeys((trial.eval.select_on, METRICS[trial.eval.metric]) for trial in trials):
        chosen = " and ".join(["checkpoints", *experiment.selected])
        if select_on.startswith("test"):
            yield _Note(
                f"Selected on {select_on}, a test split, by {metric}: {chosen}. Its scores are optimistic.", True
            )
        else:
            yield _Note(
                f"Selected on {select_on} by {metric}: {chosen}. Scores on {select_on} are optimistic; no other split "
                "was looked at."
            )
    for name, leakage in dict.fromkeys((t.dataset.name, t.dataset.options.get("leakage", "forbid")) for t in trials):
        yield _Note(
            f"{name}: "
            + {
                "forbid": "no image that is trained on is evaluated; the trial would have been refused.",
                "filter": "images of evaluated splits were taken out of the training split.",
                "allow": "images of evaluated splits were left in the training split, where it has any.",
            }.get(leakage, f"leakage is {leakage}."),
            leakage not in ("forbid", "filter"),
        )
    reported = experiment.reported(results)
    done = [results[run.trial.id] for run in reported if run.trial.id in results]
    done = [result for result in done if result.status == "done"]
    by_split: dict[str, list[float]] = {}
    for result in done:
        for split in (split for split in result.scores if split.endswith("/shuffled")):
            by_split.setdefault(split, []).append(100 * result.scores[split].miou)
    for split, scores in by_split.items():
        yield _Note(
            f"{split}: with expressions dealt out to other referents, models score {min(scores):.1f} to "
            f"{max(scores):.1f} mIoU ({fmean(scores):.1f} on average); so much they have without reading."
        )
    cells = experiment.cells()
    single = sum(len({run.trial.seed for run in cell}) == 1 for cell in cells)
    if single:
        yield _Note(f"{single} of {len(cells)} cells have a single seed: of these no spread is known.", True)
    else:
        yield _Note(f"Every cell has {' or '.join(_distinct(len({r.trial.seed for r in c}) for c in cells))} seeds.")
    if dirty := sum(result.provenance.dirty is not False for result in known):
        yield _Note(f"{dirty} of {len(known)} trials were run with code that no commit tells of.", True)
    for what, values in (
        ("commits", _distinct(result.provenance.commit[:10] for result in known if result.provenance.commit)),
        ("devices", _distinct(result.cost.device for result in known if result.cost)),
        ("precisions", _distinct(result.provenance.precision for result in known if result.status == "done")),
    ):
        if len(values) > 1:
            yield _Note(f"Trials were run with several {what}: {', '.join(values)}.", what != "commits")


def _distinct(values: Iterable[object]) -> list[str]:
    return list(dict.fromkeys(map(str, values)))


def _figures(drawings: Sequence[Drawing]) -> Iterator[Mapping[str, str]]:
    if not drawings:
        return
    from ris_bench.report.drawing import save  # only now: it imports matplotlib

    with tempfile.TemporaryDirectory() as folder:
        for drawing in drawings:
            [path] = save(drawing, Path(folder), ("svg",))
            uri = f"data:image/svg+xml;base64,{base64.b64encode(path.read_bytes()).decode()}"
            yield {"uri": uri, "caption": drawing.caption, "breakdown": drawing.name.startswith("breakdown-")}


def _provenance(result: Result) -> Mapping[str, object]:
    made, cost, params = result.provenance, result.cost, result.params
    scores = (f"{split} {100 * s.miou:.2f} mIoU, {100 * s.oiou:.2f} oIoU" for split, s in result.scores.items())
    facts = {
        "Error": result.error,
        "Scores": "; ".join(scores),
        "Selected epoch": result.selected_epoch,
        "Started": made.started,
        "Commit": made.commit or "unknown",
        "Uncommitted changes": {True: "yes", False: "no", None: "unknown"}[made.dirty],
        "Device": cost and f"{cost.device}, {made.precision}",
        "Time": cost and f"{cost.train_seconds:,.0f} s training, {cost.eval_seconds:,.0f} s evaluation",
        "Micro-batches": cost and cost.micro_batches,
        "Peak memory": cost and f"{cost.peak_memory_bytes / 2**20:,.0f} MiB",
        "Parameters": params
        and f"{params.tunable_backbone:,} tuned in the backbone, {params.tunable_head:,} in the head; {params.total:,}",
        "Versions": ", ".join(f"{name} {version}" for name, version in made.versions.items()),
        "Weights (sha256)": ", ".join(f"{name} {digest}" for name, digest in made.weights.items()),
        "Plug-ins (sha256)": ", ".join(f"{name} {digest}" for name, digest in made.plugins.items()),
    }
    return {
        "id": result.trial.id,
        "status": result.status,
        "facts": [(key, value) for key, value in facts.items() if value not in (None, "")],
        "yaml": yaml.safe_dump(_lists(plain(result.trial)), sort_keys=False, allow_unicode=True, width=100),
    }


def _lists(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, tuple | list) else value
