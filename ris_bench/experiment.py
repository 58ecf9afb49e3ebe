"""An experiment file: one complete trial, the axes along which it varies, and the table that shows what came out; or
one complete trial, and what of it is searched."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from itertools import permutations, product
from pathlib import Path
from typing import Any

from ris_bench import code, plugins
from ris_bench.backbones.base import BACKBONES
from ris_bench.data.dataset import DATASETS, Dataset
from ris_bench.errors import UserError
from ris_bench.head import HEADS
from ris_bench.layout import read_layout, searched_layout, standing
from ris_bench.located import Located, read
from ris_bench.methods.base import METHODS
from ris_bench.plan import NAME, Experiment, Run, read_text
from ris_bench.plugins import Plugin
from ris_bench.records import Choice, Evaluation, Training, Trial
from ris_bench.search import read_search

Grid = dict[str, dict[str, Located]]
"""Values by label, by axis."""

CHOICES = {"dataset": DATASETS, "backbone": BACKBONES, "method": METHODS, "head": HEADS}


def load(path: Path, assignments: Sequence[str] = ()) -> Experiment:
    """Read an experiment file; each assignment `key=value` replaces a key of `defaults`, or an axis by one value.

    `grid` is one product of axes, or a list of products of the same axes, where not every pair is possible or wanted.
    Of several, an assignment to an axis keeps those that have its value; where none has, it replaces the values of all.
    Instead of `grid` and `table` there may be a `search`.

    Raises UserError, which begins with FILE:LINE or with the assignment, for all that cannot be run or tabulated as it
    is written. The file is checked as it stands first, so that its table is known to fit its own grid.
    """
    text = read_text(path)
    written = read(text, lambda line: f"{path}:{line}")
    searches = isinstance(written.value, dict) and "search" in written.value
    top = written.keys(
        "the experiment",
        allowed=("name", "title", "notes", "plugins", "defaults", "grid", "choose", "table", "search"),
        required=("name", "title", "defaults", *(() if searches else ("grid", "table"))),
    )
    plugged = _plugins(top["plugins"], path.parent) if "plugins" in top else ()
    _trial(top["defaults"])
    return Experiment(
        code=code.digest(),
        name=_name(top["name"]),
        title=top["title"].typed(str, "title"),
        notes=top["notes"].typed(tuple[str, ...], "notes") if "notes" in top else (),
        path=path,
        source=text,
        assignments=tuple(assignments),
        plugins=plugged,
        **(_searched if searches else _gridded)(top, assignments),
    ).after(lambda trial: None)


def _gridded(top: Mapping[str, Located], assignments: Sequence[str]) -> dict[str, Any]:
    defaults, grids = top["defaults"], _grids(top["grid"])
    choose = _chosen(top["choose"], grids[0]) if "choose" in top else ()
    runs = _runs(defaults, grids, choose)
    axes = _union(grids)
    table = read_layout(top["table"], {key: axes[key] for key in axes if key not in choose}, choose, runs, _resolve)
    for assignment in assignments:
        defaults, grids = _assign(assignment, defaults, grids)
    if assignments:
        runs, axes = _runs(defaults, grids, choose), _union(grids)
        # A column about values that are no longer there has nothing to show.
        kept = (c for c in table.columns if all(label in axes[axis] for axis, label in c.where.items()))
        stands_for = standing(table.published, table.rows, runs, _resolve)
        table = replace(table, columns=tuple(kept), stands_for=stands_for)
    return {
        "axes": axes,
        "choose": tuple(key for key in choose if len(axes[key]) > 1),
        "runs": tuple(runs),
        "table": table,
    }


def _searched(top: Mapping[str, Located], assignments: Sequence[str]) -> dict[str, Any]:
    for key in ("grid", "choose", "table"):
        if key in top and top[key].value:
            raise top[key].error(f"an experiment with a search has no {key}, as that makes its own; keep one of them")
    defaults = top["defaults"]
    search = read_search(top["search"], defaults, _splits(_trial(defaults)), _trial, _labelled)
    for assignment in assignments:
        key, value = _assigned(assignment)
        if hides := [axis.key for axis in search.space if f"{key}.".startswith(f"{axis.key}.")]:
            raise value.error(f"{key} would not act, because {hides[0]} is searched; change search.space instead")
        defaults = defaults.put(key.split("."), value, "defaults")
    if assignments:
        search = read_search(top["search"], defaults, _splits(_trial(defaults)), _trial, _labelled)
    return {"axes": {}, "choose": (), "runs": (), "table": searched_layout(search), "search": search}


def _plugins(item: Located, folder: Path) -> tuple[Plugin, ...]:
    # First of all, since what follows may name what they register.
    found = []
    for entry in item.items("plugins"):
        name = entry.typed(str, "plugins")
        try:
            found.append(plugins.find(name, folder))
            found[-1].load()
        except UserError as error:
            raise entry.error(str(error)) from error
    return tuple(found)


def _name(item: Located) -> str:
    name = item.typed(str, "name")
    if not NAME.fullmatch(name):
        raise item.error(f"name is {name!r}; a folder is named so: use letters, digits, _ . + -, and not 'trials'")
    return name


def _choice(kind: str, item: Located) -> Choice:
    if isinstance(item.value, str):
        name, chosen, options = item.value, item, {}
    elif isinstance(item.value, dict) and len(item.value) == 1:
        [(name, chosen)] = item.value.items()
        options = chosen.mapping(f"{kind}.{name}")
    else:
        raise item.error(f"{kind} is {item.plain()!r}; write a name, or {{name: {{option: value}}}}")
    try:
        return CHOICES[kind].resolve(name, {key: option.plain() for key, option in options.items()})
    except UserError as error:
        blamed = (option for key, option in options.items() if f"option {key!r}" in str(error))
        raise next(blamed, chosen).error(str(error)) from None


def _trial(defaults: Located) -> Trial:
    names = [f.name for f in fields(Trial)]
    items = defaults.keys("defaults", allowed=names, required=names)
    trial = Trial(
        **{kind: _choice(kind, items[kind]) for kind in CHOICES},
        train=items["train"].record(Training, "train"),
        eval=items["eval"].record(Evaluation, "eval"),
        seed=items["seed"].typed(int, "seed"),
    )
    try:
        dataset = DATASETS.build(trial.dataset)
    except UserError as error:
        raise items["dataset"].error(str(error)) from None
    for key, allowed, words in _rules(trial, dataset):
        if not allowed:
            section, _, name = key.partition(".")
            item = items[section].value.get(name, items[section]) if name else items[section]
            value = getattr(getattr(trial, section), name) if name else trial.seed
            raise item.error(f"{key} is {list(value) if isinstance(value, tuple) else value!r}; it must be {words}")
    return trial


def _rules(trial: Trial, dataset: Dataset) -> Iterator[tuple[str, bool, str]]:
    # Key, whether its value is allowed, what is.
    train, evaluation = trial.train, trial.eval
    splits, trained = ", ".join(dataset.eval_splits), dict.fromkeys(dataset.train_splits + dataset.eval_splits)
    bare = [split.removesuffix("/shuffled") for split in evaluation.splits]
    yield "train.epochs", train.epochs >= 1, "at least 1"
    yield "train.batch_size", train.batch_size >= 2, "at least 2, because the head normalises over the batch"
    yield "train.lr", 0 < train.lr < math.inf, "greater than 0"
    ascending = list(train.milestones) == sorted(set(train.milestones)) and min(train.milestones, default=1) >= 1
    yield "train.milestones", ascending, "epochs in ascending order, each at least 1"
    yield "train.gamma", 0 < train.gamma <= 1, "greater than 0 and at most 1"
    most = train.batch_size // 2
    yield "train.accumulate", 1 <= train.accumulate <= most, f"from 1 to {most}, so that a micro-batch has 2 referents"
    yield "train.dice", 0 <= train.dice < math.inf, "at least 0"
    together = 1 <= train.expressions_per_image <= train.batch_size
    yield "train.expressions_per_image", together, f"from 1 to {train.batch_size}, the train.batch_size"
    yield "train.split", train.split in trained, f"a split of {dataset.name}: {', '.join(trained)}"
    yield "train.split", not train.split.startswith("test"), "no test split: those are only for the final scores"
    yield "eval.select_on", evaluation.select_on in dataset.eval_splits, f"a split of {dataset.name}: {splits}"
    yield "eval.every", evaluation.every >= 1, "at least 1"
    stops = [epoch for epoch, _ in train.stop_below]
    yield "train.stop_below", stops == sorted(set(stops)) and min(stops, default=1) >= 1, "epochs in ascending order"
    validated = all(epoch % evaluation.every == 0 for epoch in stops)
    yield (
        "train.stop_below",
        validated,
        f"epochs that are validated, each a multiple of {evaluation.every} (eval.every)",
    )
    yield "eval.threshold", 0 < evaluation.threshold < 1, "between 0 and 1, both excluded"
    known = all(split in dataset.eval_splits for split in bare)
    yield "eval.splits", known, f"splits of {dataset.name}, each also as SPLIT/shuffled: {splits}"
    yield "eval.splits", len(set(evaluation.splits)) == len(evaluation.splits), "without repetition"
    yield "seed", 0 <= trial.seed < 2**32, "from 0 to 4294967295"


def _resolve(kind: str, name: str, options: Mapping[str, Any]) -> Choice:
    return CHOICES[kind].resolve(name, options)


def _resolved(key: str, item: Located) -> Any:
    return _choice(key, item) if key in CHOICES else item.plain()


def _grids(item: Located) -> list[Grid]:
    written = [grid.mapping("grid") for grid in (item.items("grid") if isinstance(item.value, list) else [item])]
    for grid, other in product(written, written):
        if missing := [key for key in other if key not in grid]:
            place = next(iter(grid.values()), item)
            raise place.error(f"this grid lacks {', '.join(missing)}; all grids of a list have the same axes; add it")
    for (outer, _), (inner, value) in permutations(written[0].items(), 2):
        if inner.startswith(f"{outer}."):
            raise value.error(f"{inner} is a part of {outer}, which is an axis itself; keep one of them")
    labelled = {key: _labelled(key, [grid[key] for grid in written]) for key in written[0]}
    return [{key: labels[index] for key, labels in labelled.items()} for index in range(len(written))]


def _chosen(item: Located, axes: Collection[str]) -> tuple[str, ...]:
    for entry in item.items("choose"):
        key = entry.typed(str, "choose")
        if key not in axes:
            raise entry.error(f"choose has {key!r}; it must be an axis of the grid: {', '.join(axes) or 'it has none'}")
        if key.split(".")[0] in ("dataset", "eval", "seed"):
            raise entry.error(
                f"{key} cannot be chosen by a score; keys of backbone, method, head and train can; remove it"
            )
    return item.typed(tuple[str, ...], "choose")


def _labelled(key: str, lists: Sequence[Located]) -> list[dict[str, Located]]:
    """The values of an axis by label, for every grid: the name, with the options in which it differs from namesakes."""
    resolved = [[(_resolved(key, item), item) for item in values.items(key)] for values in lists]
    every = [value for values in resolved for value, _ in values]
    labelled = []
    for values in resolved:
        labels = {}
        for value, item in values:
            label = _label(next(equal for equal in every if equal == value), every)
            if label in labels:
                raise item.error(f"{key} has the value {item.plain()!r} twice; a value is given once; remove one")
            labels[label] = item
        labelled.append(labels)
    return labelled


def _label(value: Any, every: Sequence[Any]) -> str:
    if not isinstance(value, Choice):
        return str(value)
    rivals = [other.options for other in every if other.name == value.name]
    differing = {k: v for k, v in value.options.items() if any(options[k] != v for options in rivals)}
    return value.name + (f"({', '.join(f'{k}={v}' for k, v in differing.items())})" if differing else "")


def _union(grids: Sequence[Grid]) -> dict[str, tuple[str, ...]]:
    return {key: tuple(dict.fromkeys(label for grid in grids for label in grid[key])) for key in grids[0]}


def _runs(defaults: Located, grids: Sequence[Grid], choose: Collection[str]) -> list[Run]:
    runs: dict[tuple[str, ...], Run] = {}
    for keyed, labels in ((grid, labels) for grid in grids for labels in product(*grid.values())):
        document = defaults
        for (key, values), label in zip(keyed.items(), labels, strict=True):
            document = document.put(key.split("."), values[label], "defaults")
        trial = _trial(document)
        splits = _splits(trial)
        if choose and trial.eval.select_on not in splits:
            item = document.value["eval"].value["splits"]
            raise item.error(f"{', '.join(choose)} is chosen on {trial.eval.select_on}, not among eval.splits; add it")
        # What several grids hold is one run.
        runs.setdefault(labels, Run(trial=trial, axes=dict(zip(keyed, labels, strict=True)), splits=splits))
    return list(runs.values())


def _splits(trial: Trial) -> tuple[str, ...]:
    return trial.eval.splits or DATASETS.build(trial.dataset).eval_splits


def _assigned(assignment: str) -> tuple[str, Located]:
    key, equals, text = assignment.partition("=")
    place = f"--set {assignment}"
    value = read(text, lambda line: place)
    if not (key and equals):
        raise value.error("this sets nothing; write --set key=value with a key of defaults, such as train.epochs=2")
    return key, value


def _assign(assignment: str, defaults: Located, grids: list[Grid]) -> tuple[Located, list[Grid]]:
    key, value = _assigned(assignment)
    if key in grids[0]:
        wanted = _resolved(key, value)
        same = [{label: value for label, item in grid[key].items() if _resolved(key, item) == wanted} for grid in grids]
        kept = [{**grid, key: values} for grid, values in zip(grids, same, strict=True) if values]
        return defaults, kept or [{**grid, key: {_label(wanted, []): value}} for grid in grids]
    for axis in grids[0]:
        if axis.startswith(f"{key}.") or key.startswith(f"{axis}."):
            raise value.error(f"{key} would not act, because the experiment varies {axis}; set {axis} instead")
    return defaults.put(key.split("."), value, "defaults"), grids
