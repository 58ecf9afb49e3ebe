"""The folder of an experiment: everything in it is made of results, and can be made anew from them at any time."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ris_bench import plan
from ris_bench.files import write_whole
from ris_bench.records import Result
from ris_bench.report import best, tables
from ris_bench.results import Store

if TYPE_CHECKING:
    from ris_bench.plan import Experiment
    from ris_bench.report.comparison import Comparisons
    from ris_bench.report.speeds import Speeds
    from ris_bench.rescored import Rescored

FORMATS = {
    "md": "table.md, and comparison.md and speed.md where there is one",
    "tex": "table.tex, which needs booktabs and, where it is wide, graphicx, and speed.tex",
    "csv": "table.csv, for pandas",
    "svg": "figures/*.svg",
    "png": "figures/*.png",
    "html": "report.html, which holds all the others",
}


TABLES = ("md", "tex", "csv")
"""Of FORMATS, those that hold scores and nothing else, so that there are some by every protocol."""


def keep(experiment: Experiment, results: Mapping[str, Result], folder: Path) -> tables.Table:
    """Write the table, and the plan from which `write` can make everything else; returns the table.

    Of a search the best trial so far is written too, as an experiment.
    """
    table = tables.render(experiment, results)
    tables.write(table, folder)
    plan.write(experiment, folder)
    if text := best.text(experiment, results):
        write_whole(folder / best.FILE, text)
    return table


def write(
    experiment: Experiment,
    results: Mapping[str, Result],
    store: Store,
    folder: Path,
    formats: Collection[str] = tuple(FORMATS),
    *,
    compared: Comparisons | None = None,
    skipped: Sequence[str] = (),
    by: Rescored | None = None,
    speeds: Speeds | None = None,
) -> tuple[tables.Table, list[Path], list[str]]:
    """Write an experiment's report; each file appears whole or not at all.

    Args:
        results: by trial id; some may be missing.
        store: where the folders of the trials lie.
        formats: of FORMATS.
        compared: the rows of the table against one of them, which marks the table.
        skipped: what was left out of `results`, in sentences.
        by: what put other scores in the place of their own; then `formats` are of TABLES.
        speeds: what was measured of the computation, which is the same for all experiments.

    Returns the table, the files, and why figures are not there.
    """
    table = tables.render(experiment, results, compared, by)
    texts = {"md": table.markdown, "tex": table.latex, "csv": table.csv}
    files = {folder / f"table.{kind}": text for kind, text in texts.items() if kind in formats}
    if compared and "md" in formats:
        files[folder / "comparison.md"] = compared.markdown()
    if speeds:
        texts = {"md": speeds.markdown(), "tex": speeds.latex()}
        files |= {folder / f"speed.{kind}": text for kind, text in texts.items() if kind in formats}
    for path, text in files.items():
        write_whole(path, text)
    if by is None:
        plan.write(experiment, folder)
    written, drawings, absent = [*files], [], []
    if drawn := [kind for kind in ("svg", "png", "html") if kind in formats]:
        from ris_bench.report import drawing, figures  # only now: they import matplotlib

        drawings, absent = figures.draw(experiment, results, store)
        if kinds := [kind for kind in drawn if kind != "html"]:
            written += [path for each in drawings for path in drawing.save(each, folder / "figures", kinds)]
    if "html" in formats:
        from ris_bench.report import page  # only now: it imports jinja2

        path = folder / "report.html"
        page.write(
            path,
            experiment,
            store,
            results,
            compared=compared,
            drawings=drawings,
            absent=absent,
            skipped=skipped,
            speeds=speeds,
        )
        written.append(path)
    return table, written, absent
