"""What a (backbone, method) pair tunes: as the papers count it, and as it really moves.

The papers' columns leave out tensors that are tuned and count tensors that are not. Each such difference is a `Rule`,
and a paper's rules are its convention; nothing else knows how a paper counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from tabulate import tabulate
from torch import nn

from ris_bench import experiment, published
from ris_bench.backbones.base import BACKBONES
from ris_bench.errors import UserError
from ris_bench.head import HEADS
from ris_bench.methods.base import METHODS
from ris_bench.model import RISModel, count
from ris_bench.records import Choice
from ris_bench.registry import Registry

COLUMNS = ("backbone", "prompt", "head")
"""Of the papers: what is tuned in the backbone or injected into it, words learned in front of a sentence, the head."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One difference between a paper's column and what is tuned here."""

    name: str
    column: Literal["backbone", "head"]
    why: str
    amount: Callable[[RISModel], int]
    """Parameters that the column has more than are tuned in the model; negative where it has fewer."""


def _tuned(part: nn.Module, prefix: str) -> int:
    return sum(p.numel() for name, p in part.named_parameters() if name.startswith(prefix) and p.requires_grad)


def _if_all_tuned(parameters: Callable[[RISModel], int]) -> Callable[[RISModel], int]:
    """For a tensor that only the released backbone has: it is tuned where all of the backbone is."""
    return lambda model: parameters(model) if all(p.requires_grad for p in model.backbone.parameters()) else 0


def _grid_at_224(model: RISModel) -> int:
    tuned, image = _tuned(model.backbone, "image.positional_embedding"), model.backbone.image
    return tuned and ((224 // image.strides[0]) ** 2 + 1) * image.widths[0] - tuned


_TXT_PROJ = Rule(
    name="txt_proj",
    column="head",
    why="the papers' head is without the projection of the sentence, which is trained",
    amount=lambda model: -_tuned(model.head, "hierarchical_alignment.sentence."),
)
_LOGIT_SCALE = Rule(
    name="logit_scale",
    column="backbone",
    why="the papers count CLIP's temperature, which no segmentation model uses",
    amount=_if_all_tuned(lambda model: 1),
)
CONVENTIONS: Mapping[str, tuple[Rule, ...]] = {
    "ETRIS": (
        _TXT_PROJ,
        _LOGIT_SCALE,
        Rule(
            name="grid at 224",
            column="backbone",
            why="the positions of CLIP's ViT are counted as published for 224 pixels, and tuned at the image size",
            amount=_grid_at_224,
        ),
    ),
    "DETRIS": (
        _TXT_PROJ,
        _LOGIT_SCALE,
        Rule(
            name="text positions",
            column="backbone",
            why="the released code sorts parameters by name, and puts the positions of words outside of the backbone",
            amount=lambda model: -_tuned(model.backbone, "text.positional_embedding"),
        ),
        Rule(
            name="mask_token",
            column="backbone",
            why="the released DINOv2 has a token for masked patches, which no image here has",
            amount=_if_all_tuned(lambda model: model.backbone.image.widths[0]),
        ),
        Rule(
            name="class position",
            column="backbone",
            why="the released DINOv2 has a position for the class token, which timm adds to the token itself",
            amount=_if_all_tuned(lambda model: model.backbone.image.widths[0]),
        ),
    ),
}
"""By paper. A backbone is counted by the convention of the paper in whose tables it stands; by none, if in none."""


class Pair(NamedTuple):
    """What is counted; the choices are resolved."""

    backbone: Choice
    method: Choice
    head: Choice


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The counts of a published row that stands for a pair."""

    paper: str
    table: str
    """Its caption."""
    row: str
    cells: Mapping[str, published.Cell]
    """By column of COLUMNS; not every table has all."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Numbers of scalars, tensors counted by identity."""

    pair: Pair
    paper: Mapping[str, int]
    """By column of COLUMNS, as the papers count."""
    differences: Mapping[Rule, int]
    """The rules that made a difference, and how much."""
    parameters: int
    """All that have a gradient, the head's included."""
    statistics: int
    """Running means and variances that training moves, the head's included."""
    figures: Figures | None

    @property
    def agrees(self) -> dict[str, published.Agreement] | None:
        """By column that is printed."""
        if self.figures is None:
            return None
        return {key: published.agreement(self.paper[key], cell.text) for key, cell in self.figures.cells.items()}

    def to_dict(self) -> dict[str, Any]:
        found = self.figures
        source = found and {"paper": found.paper, "table": found.table, "row": found.row}
        figures = found and {key: found.cells[key].text if key in found.cells else None for key in COLUMNS}
        uncertain = found and [key for key, cell in found.cells.items() if cell.uncertain]
        return {
            "backbone": self.pair.backbone.name,
            "method": self.pair.method.name,
            "options": {key: choice.options for key, choice in self.pair._asdict().items()},
            "paper": self.paper,
            "published": found and {**source, **figures, "uncertain": uncertain},
            "agrees": found and {key: self.agrees.get(key) for key in COLUMNS},
            "moves": {"parameters": self.parameters, "statistics": self.statistics},
        }


def of_experiment(path: Path) -> list[Counts]:
    """Every pair of an experiment once, in the order of its trials. Raises UserError as `experiment.load` does, and for
    an impossible pair."""
    pairs: list[Pair] = []
    for trial in (run.trial for run in experiment.load(path).runs):
        pair = Pair(trial.backbone, trial.method, trial.head)
        if pair not in pairs:
            pairs.append(pair)
    return [count_pair(pair) for pair in pairs]


def of_registry(backbone: str | None, method: str | None) -> tuple[list[Counts], dict[str, str]]:
    """All pairs of what is named with all that is registered, and the reason why others are impossible, by pair.

    Of the backbones only those of full size, unless one is named. The options are those of the published row that
    stands for the pair, of several the one next to the defaults; else the defaults. Raises UserError for an unknown
    name, and where no pair is possible.
    """
    backbones = [backbone] if backbone else [name for name in BACKBONES if not name.startswith("tiny-")]
    methods = [method] if method else list(METHODS)
    for registry, name in ((BACKBONES, backbones[0]), (METHODS, methods[0])):
        registry[name]  # raises for an unknown name
    counted, refused = [], {}
    for name, other in product(backbones, methods):
        options = min((row.ours.options for _, row in _rows(name, other)), key=len, default={})
        try:
            chosen = METHODS.resolve(other, options), HEADS.resolve(_tabulated(name)[1], {})
            counted.append(count_pair(Pair(BACKBONES.resolve(name, {}), *chosen)))
        except UserError as error:
            refused[f"{other} on {name}"] = str(error)
    if not counted:
        raise UserError("; ".join(f"{pair} is impossible: {reason}" for pair, reason in refused.items()))
    return counted, refused


def count_pair(pair: Pair) -> Counts:
    """Count on the meta device: no data, no weights, no memory. Raises UserError for an impossible pair."""
    with torch.device("meta"):
        backbone = BACKBONES.build(pair.backbone, None)
        model = RISModel(backbone, METHODS.build(pair.method, backbone), HEADS.build(pair.head, backbone))
    in_backbone = count(model.backbone, model.method, tunable=True)
    prompt = model.count_prompt()
    amounts = {rule: rule.amount(model) for rule in CONVENTIONS.get(_tabulated(pair.backbone.name)[0], ())}
    paper = {"backbone": in_backbone - prompt, "prompt": prompt, "head": count(model.head, tunable=True)}
    for rule, amount in amounts.items():
        paper[rule.column] += amount
    return Counts(
        pair=pair,
        paper=paper,
        differences={rule: amount for rule, amount in amounts.items() if amount},
        parameters=count(model, tunable=True),
        statistics=sum(t.numel() for name, t in model.moving_statistics().items() if "running" in name),
        figures=_figures(pair),
    )


def _tabulated(backbone: str) -> tuple[str, str]:
    """The paper in whose tables a backbone stands, and the head that it has there; else "" and the default."""
    rows = ((table.paper, row.ours) for table in published.load().tables.values() for row in table.rows)
    return next(((paper, ours.head) for paper, ours in rows if ours and ours.backbone == backbone), ("", "etris"))


def _rows(backbone: str, method: str) -> Iterator[tuple[published.Table, published.Row]]:
    """The published rows with counts that stand for a backbone with a method."""
    for table in published.load().tables.values():
        if any(f"params.{column}" in table.columns for column in COLUMNS):
            for row in table.rows:
                if row.ours and (row.ours.backbone, row.ours.method) == (backbone, method):
                    yield table, row


def _figures(pair: Pair) -> Figures | None:
    """The first row that stands for the pair: in what tells the rows of a method apart, it has the pair's options.

    Whatever else is set, the figures are compared: that a setting misses the count of its row is worth knowing. With
    another head than the row's they are not, if the row counts that.
    """
    rows = [
        (table, row, METHODS.resolve(pair.method.name, row.ours.options).options)
        for table, row in _rows(pair.backbone.name, pair.method.name)
        if "params.head" not in table.columns or HEADS.resolve(row.ours.head, {}) == pair.head
    ]
    telling = {key for *_, options in rows for key in options if options[key] != rows[0][-1][key]}
    fitting = (row for row in rows if all(row[-1][key] == pair.method.options[key] for key in telling))
    if (found := next(fitting, None)) is None:
        return None
    table, row, _ = found
    cells = {column: row.cells.get(f"params.{column}") for column in COLUMNS}
    return Figures(
        paper=table.paper,
        table=table.caption,
        row=row.name,
        cells={column: cell for column, cell in cells.items() if cell and cell.text != "-"},
    )


_MARKS = {"both": "RT", "rounding": "R", "truncation": "T", "no": "≠"}


def text(counted: list[Counts], refused: Mapping[str, str]) -> str:
    """The counts as a table for a terminal, with what its marks and differences mean below it."""
    heads = {(counts.pair.backbone.name, _label(counts.pair.head, HEADS)) for counts in counted}
    sources: list[tuple[str, str]] = []
    rows = []
    for counts in counted:
        row = {"backbone": _label(counts.pair.backbone, BACKBONES), "method": _label(counts.pair.method, METHODS)}
        if len(heads) > len(dict(heads)):
            row["head used"] = _label(counts.pair.head, HEADS)
        row |= {"in backbone": counts.paper["backbone"], "prompt": counts.paper["prompt"], "head": counts.paper["head"]}
        row["published"] = ""
        if found := counts.figures:
            if (found.paper, found.table) not in sources:
                sources.append((found.paper, found.table))
            figures = (
                f"{cell.text}{'†' * cell.uncertain} {_MARKS[counts.agrees[key]]}" for key, cell in found.cells.items()
            )
            row["published"] = f"{', '.join(figures)} [{sources.index((found.paper, found.table)) + 1}] {found.row}"
        row |= {"moving parameters": counts.parameters, "statistics": counts.statistics}
        rows.append(row)
    numeric = {"in backbone", "prompt", "head", "moving parameters", "statistics"}
    lines = [tabulate(rows, headers="keys", intfmt=["," if key in numeric else "" for key in rows[0]]), ""]
    lines += [
        "in backbone, prompt, head: as the papers count. Moving: all that has a gradient, and running statistics."
    ]
    if sources:
        lines.append("Published figures that the count gives R by rounding, T by truncation, RT by both, ≠ by neither:")
        papers = published.load().papers
        lines += [f"  [{i}] {paper} ({papers[paper].venue}), {table!r}" for i, (paper, table) in enumerate(sources, 1)]
    rules: dict[Rule, set[int]] = {}
    for rule, amount in (item for counts in counted for item in counts.differences.items()):
        rules.setdefault(rule, set()).add(amount)
    if rules:
        lines.append("Where the papers' columns differ from what moves:")
        for rule, amounts in rules.items():
            printed = ", ".join(f"{amount:+,}" for amount in sorted(amounts))
            lines.append(f"  {rule.name} ({printed}, {rule.column}): {rule.why}")
    if refused:
        lines += ["Impossible:", *(f"  {pair}: {reason}" for pair, reason in refused.items())]
    return "\n".join(lines)


def _label(choice: Choice, registry: Registry) -> str:
    """The name with the options that are not the defaults."""
    defaults = registry.options(choice.name)
    given = {key: value for key, value in choice.options.items() if value != defaults[key].default}
    return choice.name + (f"({', '.join(f'{key}={value}' for key, value in given.items())})" if given else "")
