"""How figures look, and how they are saved.

They are made for print: 8 points, the colours of Okabe and Ito, which are told apart with any colour sense, and for
each row of a table a marker, a dash and a hatch of its own, which are told apart without any. Text stays text in an
SVG, and the same results give the same bytes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter

from ris_bench.files import whole
from ris_bench.layout import METRICS
from ris_bench.protocols import RIS_BENCH

_STYLE = {
    "text.parse_math": False,  # a label may be called $x_1$
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 7.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.1,
    "lines.markersize": 5.5,
    "legend.handlelength": 2.8,
    "hatch.linewidth": 0.4,
    "svg.fonttype": "none",
    "svg.hashsalt": "ris-bench",
    "savefig.dpi": 200,
}

# Of Okabe and Ito, without their yellow, which is lost on paper. The lengths of these lists have no common divisor, so
# that all combinations come before one is used again.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX<>*hp"
_DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (3, 1, 1, 1, 1, 1)))
_HATCHES = ("", "/////", ".....", "xxxxx", "\\\\\\\\\\", "-----", "+++++", "|||||")

LETTERS = 40
"""Of a label that is printed."""
PROTOCOL = f"({RIS_BENCH.name} protocol)"
FORMATS = ("svg", "png")


class Look(NamedTuple):
    """By which a row of the table is known in every figure of an experiment."""

    colour: str
    marker: str
    dash: str | tuple
    hatch: str

    @property
    def size(self) -> float:
        """Of the marker, in points: a star of the same size as a square looks half as large."""
        return 8.5 if self.marker == "*" else 5.5


def appearance(place: int) -> Look:
    """Of the row at a place in the table."""
    return Look(*(kind[place % len(kind)] for kind in (_COLOURS, _MARKERS, _DASHES, _HATCHES)))


def styled() -> AbstractContextManager:
    """How everything is drawn and saved, whatever the reader's own matplotlibrc says; also a decorator."""
    return style.context(["default", _STYLE])


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A figure, and what a reader must know of it."""

    name: str
    """Of its files, without their suffix."""
    figure: Figure
    caption: str
    """Plain text in one line."""


@styled()
def save(drawing: Drawing, folder: Path, formats: Sequence[str] = FORMATS) -> list[Path]:
    """NAME.svg and NAME.png, with the caption among their metadata and without a date."""
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {
        "svg": {"Title": drawing.name, "Description": drawing.caption, "Creator": "ris-bench", "Date": None},
        "png": {"Title": drawing.name, "Description": drawing.caption, "Software": None},
    }
    written = []
    for suffix in formats:
        path = folder / f"{drawing.name}.{suffix}"
        with warnings.catch_warnings(), whole(path) as temporary:
            # No font has every letter: a box stands for it in the PNG, and the SVG has the letter itself.
            warnings.filterwarnings("ignore", "Glyph .* missing from")
            drawing.figure.savefig(temporary, format=suffix, metadata=metadata[suffix])
        written.append(path)
    return written


def clean(text: str, letters: int = LETTERS) -> str:
    """One line that is safe to draw: no control characters, no command to bidirectional text, of so many letters."""
    line = " ".join(text.split())
    line = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in line)
    return line if len(line) <= letters else f"{line[: letters - 1]}…"


def named(metric: str, split: str) -> str:
    """The label of an axis of scores."""
    return f"{METRICS[metric]} (%), {clean(split)}\n{PROTOCOL}"


def make_panels(
    rows: int, columns: int, *, width: float = 2.35, height: float = 2.15, sharey: str = "none"
) -> tuple[Figure, np.ndarray]:
    """A figure and its axes (rows, columns), each of so many inches."""
    # A single panel has the width of a column of text.
    figure = Figure(figsize=(max(3.5, width * columns), height * rows + 0.5), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06)
    return figure, figure.subplots(rows, columns, squeeze=False, sharey=sharey)


def legend_below(figure: Figure, pairs: Sequence[tuple[Line2D | Patch, str]], notes: Sequence[str] = ()) -> None:
    """A legend outside the panels, in as many columns as the figure has room for, under lines that explain marks."""
    inches = 0.065 * max(len(label) for _, label in pairs) + 0.5
    columns = min(len(pairs), max(1, int(figure.get_figwidth() / inches)))
    legend = figure.legend(
        [handle for handle, _ in pairs],
        [" "] * len(pairs),
        loc="outside lower center",
        ncols=columns,
        columnspacing=1.2,
        title="\n".join(notes) or None,
        title_fontsize=6.5,
        alignment="left",
    )
    # Only now, since a label that begins with "_" would be left out.
    for text, (_, label) in zip(legend.get_texts(), pairs, strict=True):
        text.set_text(label)


def round_ticks() -> MaxNLocator:
    return MaxNLocator(6, steps=[1, 2, 5, 10], min_n_ticks=3)


def log_axis(axes: Axes, numbers: Iterable[float]) -> None:
    """A logarithmic axis, with a place for 0 left of a break where there is one."""
    numbers = list(numbers)
    positive = [number for number in numbers if number > 0]
    low, high = (min(positive), max(positive)) if positive else (1.0, 10.0)
    low, high = low / 1.8, high * 1.8
    if 0 in numbers:
        axes.set_xscale("symlog", linthresh=low, linscale=0.5)
        axes.set_xlim(-0.35 * low, high)
        # The two strokes of a break, halfway between 0 and the first number that has a place on the scale.
        at = axes.get_xaxis_transform()
        for x in (0.55, 0.68):
            axes.plot(x * low, 0, marker=[(-1, -2), (1, 2)], color="0.2", ms=6, mew=0.7, transform=at, clip_on=False)
    else:
        axes.set_xscale("log")
        axes.set_xlim(low, high)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)

    def ticks(digits: Iterable[int]) -> list[float]:
        every = (digit * 10.0**decade for decade in decades for digit in digits)
        return [tick for tick in every if low <= tick <= high]

    major = next((found for digits in ((1,), (1, 2, 5)) if len(found := ticks(digits)) > 2), ticks(range(1, 10)))
    axes.xaxis.set_major_locator(FixedLocator([0.0] * (0 in numbers) + major))
    axes.xaxis.set_minor_locator(FixedLocator([tick for tick in ticks(range(1, 10)) if tick not in major]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda number, _: _count(number)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _count(number: float) -> str:
    """As the papers print it: 20K, 1M."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= unit:
            return f"{number / unit:g}{letter}"
    return f"{number:g}"
