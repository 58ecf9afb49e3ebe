"""Where a model is right and how it errs: the scores of groups of expressions, out of a trial's expressions.parquet."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import pyarrow as pa
from pandas.api.types import is_integer_dtype
from tabulate import tabulate

from ris_bench import metrics
from ris_bench.errors import UserError
from ris_bench.protocols import RIS_BENCH
from ris_bench.report.tables import DEFINITIONS, escaped

NOT_RECORDED = "not recorded"
"""What a table of an older version, or of a data set that knows of no other objects, does not tell."""
NO_TARGET = "no target"

# The attributes that Kazemzadeh et al., "ReferItGame", EMNLP 2014, count in expressions, of which colour, absolute and
# relative location can be told by words. A phrase of several words is looked for first, and its words count no more:
# "in front of" is a relation, "front" a place. What the category is called counts as nothing: an orange is no colour.
WORDS = {
    # Where in the picture: what RefCOCO+ forbade its players. Words of depth belong here, since they order the picture
    # as "left" does; "close" and "near" without "-est" do not, since they mostly stand beside another object.
    "location": (
        *("left", "right", "top", "bottom", "middle", "center", "centre", "central", "upper", "lower"),
        *("leftmost", "rightmost", "topmost", "uppermost", "bottommost", "lowest", "highest", "corner", "edge", "side"),
        *("front", "back", "rear", "foreground", "background", "closest", "nearest", "farthest", "furthest", "far"),
    ),
    # The eleven basic terms of Berlin and Kay (1969) for English, their other spellings, and what people say of hair,
    # clothes and metal. "light" and "dark" alone are of lamps and scenes as often as of colours.
    "colour": (
        *("black", "white", "red", "green", "yellow", "blue", "brown", "orange", "pink", "purple", "gray", "grey"),
        *("tan", "beige", "gold", "golden", "silver", "blond", "blonde", "maroon", "navy", "teal", "violet"),
    ),
    # Rank in a row of like things. RefCOCO writes "2nd" as "second"; others leave it as typed.
    "ordinal": (
        *("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "last"),
        *("1st", "2nd", "3rd", "4th", "5th", "6th", "7th", "8th", "9th", "10th"),
    ),
    # Where in respect of another object, and what holds the two together. "on", "in", "at", "of" and "with" are left
    # out: they are in "on the left", "in red" and "man with hat", which name no second object to be found.
    "relation": (
        *("in front of", "in back of", "on top of", "next to", "close to", "left of", "right of"),
        *("beside", "besides", "behind", "under", "underneath", "beneath", "below", "above", "over", "between"),
        *("among", "against", "along", "across", "around", "inside", "outside", "near", "by", "facing"),
        *("holding", "carrying", "riding", "touching", "pulling", "pushing", "following", "attached"),
    ),
}
"""By what they tell, the words and phrases, in lower case."""

LENGTHS = (0, 2, 3, 5, 7, 10, 20)
"""Last number of words of a group: fine where RefCOCO's expressions are, of three or four words, coarser where those of
RefCOCOg are, of about eight."""
AREAS = {"small": 32**2, "medium": 96**2}
"""COCO's: a mask of fewer pixels is so; the others are large (pycocotools/cocoeval.py, Params.setDetParams)."""
MOST_DISTRACTORS, MOST_RANKS = 5, 3
"""From there on all are one group."""
LETTERS = 80
"""Of a name that is printed: a category may be called anything."""

TEXTS = ("split", "category", "expression")
NUMBERS = ("sentence_index", "intersection", "union", "predicted", "target")
"""Columns without which a file is no table of expressions."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """The scores of the expressions of one split that have something in common; rates and scores are fractions."""

    trial: str
    split: str
    by: str
    group: str
    num_expressions: int
    miou: float
    oiou: float
    precision: float
    """Pr@0.5."""
    zero_iou: float | None
    """Share of expressions with a target whose prediction touches it nowhere; None where none has a target."""
    empty: float | None
    """Share of them for which no pixel is predicted."""
    wrong_instance: float | None
    """Share of them whose prediction has a larger IoU with another annotated object; None where not recorded."""


def read(folder: Path) -> pd.DataFrame:
    """The expressions of a trial. UserError where its folder has no such table."""
    path = folder / "expressions.parquet"
    try:
        frame = pd.read_parquet(path)
    except (OSError, ValueError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be read ({reason}); run the trial again") from None
    if missing := [column for column in (*TEXTS, *NUMBERS) if column not in frame]:
        raise UserError(f"{path} lacks the columns {', '.join(missing)}: it is no table of a trial's expressions")
    texts = all(isinstance(value, str) for column in TEXTS for value in frame[column])
    try:
        metrics.iou(frame["intersection"].to_numpy(), frame["union"].to_numpy(), RIS_BENCH)
        numbers = len(frame) > 0 and all(is_integer_dtype(frame[column]) for column in NUMBERS)
    except ValueError:
        numbers = False
    if not (texts and numbers):
        raise UserError(f"{path} holds no counts of expressions: run the trial again")
    return frame


def breakdown(trial: str, frame: pd.DataFrame, by: str) -> list[Group]:
    """Every split of a trial in groups by one of `BY`: splits in their order, groups in the order that they have."""
    names, order = BY[by](frame)
    known = [NOT_RECORDED if name is None else name for name in names]
    order = dict.fromkeys([*order, NOT_RECORDED])
    frame = frame.assign(group=pd.Categorical(known, list(order), ordered=True))
    return [
        _group(trial, str(split), by, str(group), rows)
        for split, part in frame.groupby("split", sort=False)
        for group, rows in part.groupby("group", sort=True, observed=True)
    ]


def _group(trial: str, split: str, by: str, name: str, rows: pd.DataFrame) -> Group:
    intersection, union = (rows[column].to_numpy() for column in ("intersection", "union"))
    scores = metrics.scores(intersection, union, RIS_BENCH)
    failed = failures(rows)

    def share(failure: str) -> float | None:
        known = failed[failure].dropna()
        return float(known.mean()) if len(known) else None

    return Group(
        trial=trial,
        split=split,
        by=by,
        group=name,
        num_expressions=scores.num_expressions,
        miou=scores.miou,
        oiou=scores.oiou,
        precision=scores.precision_at["0.5"],
        zero_iou=share("zero_iou"),
        empty=share("empty"),
        wrong_instance=share("wrong_instance"),
    )


def failures(frame: pd.DataFrame) -> pd.DataFrame:
    """What goes wrong with every expression: the rates of `Group` as columns of booleans, with the frame's index.

    They are missing for an expression without a target, and where it is not recorded.
    """
    is_so = {
        "zero_iou": (frame["intersection"] == 0).astype("boolean"),
        "empty": (frame["predicted"] == 0).astype("boolean"),
        "wrong_instance": _wrong(frame),
    }
    return pd.DataFrame({name: values.where(frame["target"] > 0) for name, values in is_so.items()})


def _wrong(frame: pd.DataFrame) -> pd.Series:
    """Whether a prediction has a larger IoU with another object than with its referent; missing where not recorded."""
    if not {"other_intersection", "other_union"} <= set(frame):
        return pd.Series(pd.NA, index=frame.index, dtype="boolean")
    counts = frame[["intersection", "union", "other_intersection", "other_union"]].astype("Int64")
    # Of integers, so that equal ratios are equal; no union of an image of 2**26 pixels overflows their product.
    return counts["other_intersection"] * counts["union"] > counts["intersection"] * counts["other_union"]


Grouping = tuple[Sequence[str | None], Sequence[str]]
"""The name of each row's group, None where it is not recorded; and all names, in the order in which they are shown."""


def _category(frame: pd.DataFrame) -> Grouping:
    named = frame["category"].replace("", "no category").tolist()
    return named, sorted(set(named))


def _people(frame: pd.DataFrame) -> Grouping:
    # testA of RefCOCO is made so: of COCO's category "person".
    people = ("people" if "person" in category.split("+") else "things" for category in frame["category"])
    names = [name if target else NO_TARGET for name, target in zip(people, frame["target"], strict=True)]
    return names, ("people", "things", NO_TARGET)


def _area(frame: pd.DataFrame) -> Grouping:
    names = (NO_TARGET, *AREAS, "large")
    return _between(frame["target"], [0, *(area - 1 for area in AREAS.values())], names), names


def _length(frame: pd.DataFrame) -> Grouping:
    starts = [0, *(end + 1 for end in LENGTHS)]
    pairs = zip(starts, LENGTHS, strict=False)
    names = [*(f"{a}" if a == b else f"{a} to {b}" for a, b in pairs), f"{starts[-1]} or more"]
    return _between((len(text.split()) for text in frame["expression"]), LENGTHS, names), names


def _between(numbers: Iterable[int], last: Sequence[int], names: Sequence[str]) -> list[str]:
    """The first name for numbers up to the first of `last`, and so on."""
    return [names[bisect_left(last, number)] for number in numbers]


def _distractors(frame: pd.DataFrame) -> Grouping:
    recorded = frame["distractors"] if "distractors" in frame else [None] * len(frame)
    return _capped(recorded, 0, MOST_DISTRACTORS)


def _rank(frame: pd.DataFrame) -> Grouping:
    return _capped(frame["sentence_index"] + 1, 1, MOST_RANKS)


def _capped(numbers: Iterable[int | None], first: int, last: int) -> Grouping:
    names = [*map(str, range(first, last)), f"{last} or more"]
    return [None if pd.isna(number) else names[min(int(number), last) - first] for number in numbers], names


def kinds(expression: str, category: str = "") -> set[str]:
    """Which of `WORDS` an expression has, however it is spelt; the name of its category is not looked at."""
    named = set(_WORD.findall(category.casefold()))
    text = " ".join(word for word in _WORD.findall(expression.casefold()) if word not in named)
    return {_KIND[phrase] for phrase in _PHRASE.findall(text)}


_KIND = {phrase: kind for kind, phrases in WORDS.items() for phrase in phrases}
_WORD = re.compile(r"\w+")
_PHRASE = re.compile(rf"\b(?:{'|'.join(sorted(map(re.escape, _KIND), key=len, reverse=True))})\b")


def _has(kind: str) -> Callable[[pd.DataFrame], Grouping]:
    names = (f"with {kind} words", "without")

    def grouped(frame: pd.DataFrame) -> Grouping:
        pairs = zip(frame["expression"], frame["category"], strict=True)
        return [names[kind not in kinds(*pair)] for pair in pairs], names

    return grouped


BY: dict[str, Callable[[pd.DataFrame], Grouping]] = {
    "all": lambda frame: (["all"] * len(frame), ["all"]),
    "category": _category,
    "people": _people,
    "area": _area,
    "distractors": _distractors,
    "length": _length,
    **{kind: _has(kind) for kind in WORDS},
    "rank": _rank,
}
"""What expressions may be grouped by."""

TITLES = {
    "all": "Group",
    "category": "COCO category",
    "people": "People or things",
    "area": "Area of the mask",
    "distractors": "Other objects of the category",
    "length": "Words",
    "location": "Words of location",
    "colour": "Words of colour",
    "ordinal": "Ordinal words",
    "relation": "Words of relation",
    "rank": "Rank among the sentences of the referent",
}


SCORES = ("Expressions", "mIoU", "oIoU", "Pr@0.5", "Zero IoU", "Empty", "Wrong instance")


def records(groups: Iterable[Group]) -> list[dict]:
    """As JSON has them."""
    return [asdict(group) for group in groups]


def markdown(groups: Sequence[Group]) -> str:
    """A table for each thing that is grouped by, then what the columns mean; several trials are named."""
    several = len({group.trial for group in groups}) > 1
    lines: list[str] = []
    for by in dict.fromkeys(group.by for group in groups):
        rows = [list(_cells(group, several)) for group in groups if group.by == by]
        labels = [*(["Trial"] if several else []), "Split", TITLES[by]]
        align = [*["left"] * len(labels), *["right"] * len(SCORES)]
        lines += [tabulate(rows, [*labels, *SCORES], tablefmt="pipe", colalign=align, disable_numparse=True), ""]
    notes = (
        f"{DEFINITIONS['miou']}; {DEFINITIONS['oiou']}; {DEFINITIONS['pr']}. In percent, protocol {RIS_BENCH.name}.",
        "Zero IoU, Empty: of the expressions with a target, those whose prediction touches it nowhere, and those for "
        "which no pixel is predicted; the second are among the first.",
        "Wrong instance: of the expressions with a target, those whose prediction has a larger IoU with another "
        "annotated object of the image. Crowds are no object.",
        f"Area, in pixels of the original image: small below {AREAS['small']:,}, medium below {AREAS['medium']:,}.",
    )
    return "\n".join([*lines, *(f"- {escaped(note)}" for note in notes)])


def _cells(group: Group, several: bool) -> Iterator[str]:
    for label in (group.trial, group.split, group.group)[not several :]:
        # Names come from files: none becomes a link, or code, or a command to a terminal.
        text = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in label)
        text = text if len(text) <= LETTERS else f"{text[: LETTERS - 3]}..."
        yield escaped(text)
    yield f"{group.num_expressions:,}"
    for score in (group.miou, group.oiou, group.precision):
        yield f"{100 * score:.2f}"
    for rate, absent in ((group.zero_iou, "–"), (group.empty, "–"), (group.wrong_instance, NOT_RECORDED)):
        yield absent if rate is None else f"{100 * rate:.2f}"
