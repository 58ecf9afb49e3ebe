"""Pictures of the same expressions for every row of an experiment's table, out of what its trials drew."""

from __future__ import annotations

import base64
import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ris_bench import metrics
from ris_bench.errors import UserError
from ris_bench.plan import Experiment, Run
from ris_bench.protocols import RIS_BENCH
from ris_bench.records import Result
from ris_bench.report import breakdowns
from ris_bench.results import Store

LIMIT = 200
"""Pictures of a gallery."""
BYTES = 80_000
"""Of a picture: 200 of them are 21 MB in base64."""
SIDES = (800, 640, 480, 320, 160)
"""Pixels of its longer side: the first with which it is small enough."""
MOST_SIDE = 4096
"""Of a picture that is read; `evaluation.picture` makes none so large."""
CAPTIONS = [24 * lines + 16 for lines in range(2, 6)]
"""Heights, in pixels, of what `evaluation.picture` writes below a photo."""
RIGHT = 0.5
"""An IoU above it is called right, as by Pr@0.5."""

KINDS = {
    "right": f"IoU > {RIGHT}",
    "imprecise": "none of the others",
    "wrong instance": "a larger IoU with another annotated object",
    "empty": "no pixel is predicted",
    "zero IoU": "the prediction touches the target nowhere",
    "no target": "the expression means nothing in the image",
}
"""Outcomes of an expression; it may have several."""


class Key(NamedTuple):
    """An expression, of whichever model."""

    dataset: str
    split: str
    ref_id: int
    sentence_index: int
    expression: str


class Outcome(NamedTuple):
    path: Path
    iou: float
    kinds: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Picture:
    row: str
    """Labels of the trial, as the table prints them."""
    key: Key
    iou: float
    """A fraction."""
    kinds: tuple[str, ...]
    """Of KINDS."""
    webp: bytes
    width: int
    height: int

    @property
    def uri(self) -> str:
        return f"data:image/webp;base64,{base64.b64encode(self.webp).decode()}"


def gallery(
    experiment: Experiment, store: Store, results: Mapping[str, Result], limit: int = LIMIT
) -> tuple[list[Picture], list[str]]:
    """At most `limit` pictures, expression by expression and there row by row; and what is to be said of them.

    Reads overlays/ and expressions.parquet of the first seed of every row that the table reports. A row without them,
    and a file that is no picture, is named among the sentences.
    """
    outcomes: dict[str, dict[Key, Outcome]] = {}
    lacking: dict[str, list[str]] = {}
    for row, runs in _rows(experiment, results).items():
        for run in runs:
            try:
                outcomes.setdefault(row, {}).update(_outcomes(run, store))
            except UserError as error:
                lacking.setdefault(str(error), []).append(row)
    if not any(outcomes.values()):
        return [], [
            "There are no pictures: a trial draws some into its folder overlays/, and those of these results are not "
            "there. The repository keeps only the numbers; run the experiment to have the pictures too."
        ]
    pictures = []
    for key in _spread(outcomes, limit):
        for row in (row for row, known in outcomes.items() if key in known):
            path, iou, kinds = outcomes[row][key]
            try:
                webp, size = _encoded(path)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
                lacking.setdefault(f"{path.name} is no picture that can be read", []).append(row)
                continue
            pictures.append(Picture(row=row, key=key, iou=iou, kinds=kinds, webp=webp, width=size[0], height=size[1]))
    notes = [*_notes(pictures[:limit], outcomes), *(f"{', '.join(rows)}: {why}." for why, rows in lacking.items())]
    return pictures[:limit], notes


def _rows(experiment: Experiment, results: Mapping[str, Result]) -> dict[str, list[Run]]:
    """Runs that are done, by the label of their row: of those that differ in nothing but the seed the first."""
    labels, axes = experiment.table.labels, experiment.table.rows
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in experiment.reported(results):
        if run.trial.id in results and results[run.trial.id].status == "done":
            groups.setdefault((*(run.axes[axis] for axis in axes), _dataset(run)), []).append(run)
    rows: dict[str, list[Run]] = {}
    for (*shown, _), runs in groups.items():
        # What else differs within a row, because columns are limited to it, belongs to the label.
        others = [axis for axis in runs[0].axes if axis not in (*axes, *experiment.choose, "seed")]
        others = [axis for axis in others if len({run.axes[axis] for run in runs}) > 1]
        first: dict[str, Run] = {}
        for run in runs:
            parts = [*(labels.get(label, label) for label in shown), *(f"{axis}={run.axes[axis]}" for axis in others)]
            first.setdefault(" / ".join(parts), run)
        for label, run in first.items():
            rows.setdefault(label, []).append(run)
    return rows


def _dataset(run: Run) -> str:
    return run.axes.get("dataset", run.trial.dataset.name)


def _outcomes(run: Run, store: Store) -> dict[Key, Outcome]:
    """What a trial drew. UserError where it has no pictures, or there is nothing to be said of them."""
    folder = store.folder(run.trial)
    paths = {}
    for path in sorted((folder / "overlays").glob("*.png")):
        if name := re.fullmatch(r"(\d+)-(\d+)", path.stem):
            paths[int(name[1]), int(name[2])] = path
    if not paths:
        raise UserError("the trial's folder has no overlays/")
    try:
        frame = breakdowns.read(folder)
    except UserError:
        raise UserError("expressions.parquet is not there, or cannot be read") from None
    # Pictures are of the validation split, which need not be among those that are reported.
    frame = frame[frame["split"] == run.trial.eval.select_on].reset_index(drop=True)
    names = list(zip(frame["ref_id"], frame["sentence_index"], strict=True))
    # In a mix of data sets two expressions may have one name, and then one of them has no picture.
    once = {name for name, number in Counter(names).items() if number == 1}
    drawn = frame[[name in once and name in paths for name in names]]
    if drawn.empty:
        raise UserError(f"no picture is of an expression of {run.trial.eval.select_on} in expressions.parquet")
    iou = metrics.iou(drawn["intersection"].to_numpy(), drawn["union"].to_numpy(), RIS_BENCH)
    failed = breakdowns.failures(drawn).fillna(False)
    found = {}
    for place, (row, wrong) in enumerate(zip(drawn.itertuples(), failed.itertuples(), strict=True)):
        is_so = {
            "right": iou[place] > RIGHT,
            "wrong instance": wrong.wrong_instance,
            "empty": wrong.empty,
            "zero IoU": wrong.zero_iou,
            "no target": row.target == 0,
        }
        kinds = tuple(kind for kind in KINDS if is_so.get(kind)) or ("imprecise",)
        key = Key(_dataset(run), row.split, int(row.ref_id), int(row.sentence_index), row.expression)
        found[key] = Outcome(paths[key.ref_id, key.sentence_index], float(iou[place]), kinds)
    return found


def _spread(outcomes: Mapping[str, Mapping[Key, Outcome]], limit: int) -> Iterator[Key]:
    """Of every split the expressions that most rows have, evenly, as many as there is room for and one at least."""
    counts = Counter(key for known in outcomes.values() for key in known)
    splits: dict[tuple[str, str], list[Key]] = {}
    for key in sorted(counts):
        splits.setdefault(key[:2], []).append(key)
    most = {split: max(counts[key] for key in keys) for split, keys in splits.items()}
    each = limit // sum(most.values())
    for split, keys in splits.items():
        shared = [key for key in keys if counts[key] == most[split]]
        number = min(max(each, 1), len(shared))
        yield from (shared[round(place * (len(shared) - 1) / max(number - 1, 1))] for place in range(number))


def _encoded(path: Path) -> tuple[bytes, tuple[int, int]]:
    """A PNG as a WebP of at most BYTES, or of the smallest of SIDES; and its size."""
    with Image.open(path, formats=("PNG",)) as image:
        if max(image.size) > MOST_SIDE:
            raise ValueError(f"{path} has {image.width} x {image.height} pixels")
        picture = _photo(image.convert("RGB"))
    for side in SIDES:
        picture.thumbnail((side, side))
        picture.save(file := io.BytesIO(), "WEBP", quality=75, method=2)
        if file.tell() <= BYTES:
            break
    return file.getvalue(), picture.size


def _photo(picture: Image.Image) -> Image.Image:
    """Without the caption that `evaluation.picture` writes below, and the page beside; whole where that is not found.

    It has 2 to 5 lines of 24 pixels, 8 above and below them, and a white margin of 8 to the left.
    """
    white_H = np.asarray(picture)[:, :8].min(axis=(1, 2)) == 255
    caption = int(white_H[::-1].argmin())
    return picture.crop((0, 0, picture.width, picture.height - caption)) if caption in CAPTIONS else picture


def _notes(pictures: Sequence[Picture], outcomes: Mapping[str, Mapping[Key, Outcome]]) -> Iterator[str]:
    drawn = len({key for known in outcomes.values() for key in known})
    shown = dict.fromkeys(f"{picture.key.dataset} {picture.key.split}" for picture in pictures)
    yield (
        f"{len({picture.key for picture in pictures})} of the {drawn} expressions of {', '.join(shown)} that trials "
        "drew, spread evenly over the split, with the first seed of every row."
    )
    kinds = [kind for kind in KINDS if any(kind in picture.kinds for picture in pictures)]
    yield f"Outcomes: {'; '.join(f'{kind}: {KINDS[kind]}' for kind in kinds)}."
