"""What `python -m benchmarks.speed --out speed.json` has measured, as a table: Markdown, LaTeX, and the rows of a page.

The record is anyone's: it is checked before it is shown.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate

from ris_bench.errors import UserError
from ris_bench.registry import record
from ris_bench.report.tables import escaped, in_latex

FILE = "speed.json"
"""In the results folder."""
TITLE = "Speed"
LABELS = ("Case", "Measured", "Compared")
NUMBERS = ("Ratio", "Time (ms)", "GFLOP", "Ceiling (%)", "Memory (MB)")
"""Headers of what is printed of a row."""
WAYS = {
    "released": "the modules of the paper's released code",
    "plain": "the same function as fast, computed as the papers' code computes it, an image anew for every expression",
    "fast": "what trials do",
    "compiled": "the same with its blocks compiled by PyTorch",
    "cached": "the same with frozen features from disk",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way of computing against another, `slow` against `quick`. None is what was not measured."""

    case: str
    what: str
    slow: str
    quick: str
    slow_ms: float
    quick_ms: float
    ratio: float
    """Slow over quick: the median of neighbouring runs; `least` and `most` are their range."""
    least: float
    most: float
    slow_gflop: float | None
    quick_gflop: float | None
    ceiling: float | None
    """Of `Speeds.ceiling_gflops`, what the quicker way reaches: a share."""
    slow_peak: int | None
    """Bytes, over those held before."""
    quick_peak: int | None


_MOST = 1e18
"""Beyond all that is measured here: bytes, milliseconds, operations."""


class Cell(NamedTuple):
    text: str
    number: float | None
    """By which it is sorted."""


@dataclass(frozen=True, kw_only=True)
class Speeds:
    device: str
    torch: str
    precision: str
    ceiling_gflops: float
    """That one large product of matrices runs at, per second."""
    rows: tuple[Row, ...]

    def lines(self) -> Iterator[tuple[tuple[str, ...], tuple[Cell, ...]]]:
        """LABELS and NUMBERS of every row, as printed."""
        for row in self.rows:
            share = None if row.ceiling is None else 100 * row.ceiling
            yield (
                (row.case, row.what, f"{row.quick} over {row.slow}"),
                (
                    Cell(f"{_short(row.ratio)} [{_short(row.least)}, {_short(row.most)}]", row.ratio),
                    _pair(row.slow_ms, row.quick_ms),
                    _pair(row.slow_gflop, row.quick_gflop),
                    Cell("–" if share is None else f"{share:.0f}", share),
                    _pair(*(None if peak is None else peak / 1e6 for peak in (row.slow_peak, row.quick_peak))),
                ),
            )

    def notes(self) -> Iterator[str]:
        """What a reader of the table must know."""
        yield (
            f"Measured on {self.device}, {self.precision}, torch {self.torch}, by python -m benchmarks.speed, the ways "
            "taking turns, every model in a process of its own."
        )
        yield (
            "Ratio: how many times faster, the median of neighbouring runs, with the least and the most of them. Time, "
            "GFLOP and memory: of the slower way, then of the quicker; memory is the peak over what was held before."
        )
        if any(row.ceiling is not None for row in self.rows):
            yield (
                f"Ceiling: the quicker way's GFLOP a second, of {self.ceiling_gflops:,.0f} that one large product "
                "of matrices reaches."
            )
        used = {way for row in self.rows for way in (row.slow, row.quick)}
        yield from (f"{way}: {meaning}." for way, meaning in WAYS.items() if way in used)

    def markdown(self) -> str:
        table = tabulate(
            [[*map(escaped, labels), *(escaped(cell.text) for cell in cells)] for labels, cells in self.lines()],
            headers=[*LABELS, *NUMBERS],
            tablefmt="pipe",
            colalign=(*("left" for _ in LABELS), *("right" for _ in NUMBERS)),
            disable_numparse=True,
        )
        return f"**{TITLE}**\n\n{table}\n\n" + "".join(f"- {escaped(note)}\n" for note in self.notes())

    def latex(self) -> str:
        """A table that needs booktabs and graphicx."""
        printed = [(*labels, *(cell.text for cell in cells)) for labels, cells in self.lines()]
        head, *body = (rf"{' & '.join(map(in_latex, line))} \\" for line in [(*LABELS, *NUMBERS), *printed])
        return "\n".join(
            [
                r"\begin{table*}[t]",
                r"\centering",
                rf"\caption{{{TITLE}}}",
                r"\label{tab:speed}",
                r"\resizebox{\linewidth}{!}{%",
                rf"\begin{{tabular}}{{{'l' * len(LABELS)}{'r' * len(NUMBERS)}}}",
                r"\toprule",
                head,
                r"\midrule",
                *body,
                r"\bottomrule",
                r"\end{tabular}}",
                "",
                r"\smallskip",
                r"\parbox{\linewidth}{\footnotesize",
                *(rf"{in_latex(note)}\par" for note in self.notes()),
                "}",
                r"\end{table*}",
                "",
            ]
        )


def read(root: Path) -> tuple[Speeds | None, list[str]]:
    """The record among the results, if there is one, and a sentence on why one that is there is left out."""
    path = root / FILE
    try:
        return _speeds(json.loads(path.read_text(encoding="utf-8"))), []
    except (FileNotFoundError, NotADirectoryError):
        return None, []
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, UserError) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        return None, [f"{path} is left out: it is no record of benchmarks.speed ({why})"]


def _speeds(found: Any) -> Speeds:
    # What later versions may have measured too is not shown.
    rows = tuple(record(Row, {each.name: row[each.name] for each in fields(Row)}) for row in found["rows"])
    if not rows:
        raise ValueError("it has no rows")
    about = {each.name: found[each.name] for each in fields(Speeds) if each.name != "rows"}
    speeds = record(Speeds, {**about, "rows": rows})
    amounts = [item for found in (speeds, *rows) for item in vars(found).items()]
    for name, amount in amounts:
        if isinstance(amount, int | float) and not 0 <= amount < _MOST:
            raise ValueError(f"{name} is a number that cannot be")
    return speeds


def _pair(slow: float | None, quick: float | None) -> Cell:
    texts = dict.fromkeys("–" if number is None else _short(number) for number in (slow, quick))
    return Cell(" → ".join(texts), quick)


def _short(number: float) -> str:
    """With three digits at least."""
    return f"{number:,.{0 if number >= 100 else 1 if number >= 10 else 2}f}"
