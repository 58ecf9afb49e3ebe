"""A search: values are suggested in waves, each by what the trials of the waves before have come to.

Nothing is kept of it but the results of its trials. What is suggested is a function of the search and of these results:
an Optuna study is played anew, in memory and in a fixed order, up to the first wave of which a result is missing. So a
search that was cut off goes on, by being started again, as if it had not been.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from ris_bench.located import Located
from ris_bench.records import Choice, Result, Trial
from ris_bench.registry import record

if TYPE_CHECKING:  # importing it takes half a second
    import optuna

KINDS = ("backbone", "method", "head")
"""Keys of a trial that are choices, and may be searched."""
NUMBER = "trial"
"""What tells the runs of a search apart: the number of the suggestion, counted from 1."""
NONE = "–"
"""The label of a value where a trial has none: the rank of LoRA, where another method is tried."""
PATIENCE = 10
"""Suggestions in a row that may cost nothing, as they fail or were made before, where only hours are counted."""

Find = Callable[[Trial], Result | None]
"""The result of a trial, if it is known."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A key of a trial, such as "method", "train.lr" or "method.lora.text_rank", and what it may be."""

    key: str
    values: dict[str, Any] = field(default_factory=dict)
    """By label, in no order; of a choice the Choice. Empty for a range."""
    low: int | float = 0
    high: int | float = 0
    """The ends of a range, both included: of whole numbers, or of all."""
    step: int | float | None = None
    log: bool = False

    def concerns(self, trial: Trial) -> bool:
        """Whether the trial has this key: an option belongs to one backbone, method or head."""
        kind, *rest = self.key.split(".")
        return kind not in KINDS or not rest or getattr(trial, kind).name == rest[0]

    def put(self, trial: Trial, label: str) -> Trial:
        """The trial with this value."""
        value = self.values[label] if self.values else type(self.low)(label)
        section, *rest = self.key.split(".")
        if not rest:
            return replace(trial, **{section: value})
        part = getattr(trial, section)
        changed = {"options": {**part.options, rest[1]: value}} if section in KINDS else {rest[0]: value}
        return replace(trial, **{section: replace(part, **changed)})

    def ask(self, asked: optuna.Trial) -> str:
        """The label of what a study suggests."""
        if self.values:
            return asked.suggest_categorical(self.key, list(self.values))
        ends = {"low": self.low, "high": self.high, "log": self.log}
        if isinstance(self.low, int):
            return str(asked.suggest_int(self.key, **ends, step=self.step or 1))
        number = asked.suggest_float(self.key, **ends, step=self.step)
        # More digits would say nothing; the ends may have more.
        return str(min(max(float(f"{number:.10g}" if self.step else f"{number:.4g}"), self.low), self.high))

    def has(self, label: str) -> bool:
        """Whether a value is called so; ValueError for one that no range can have."""
        if label == NONE or self.values:
            return label == NONE or label in self.values
        return self.low <= type(self.low)(label) <= self.high

    @property
    def distribution(self) -> optuna.distributions.BaseDistribution:
        from optuna import distributions

        if self.values:
            return distributions.CategoricalDistribution(list(self.values))
        if isinstance(self.low, int):
            return distributions.IntDistribution(self.low, self.high, self.log, self.step or 1)
        return distributions.FloatDistribution(self.low, self.high, self.log, self.step)

    def __str__(self) -> str:
        if self.values:
            return f"{self.key}: {', '.join(self.values)}"
        steps = f" in steps of {self.step}" if self.step else ""
        return f"{self.key}: {self.low} to {self.high}{steps}{' (logarithmic)' if self.log else ''}"


@dataclass(frozen=True, kw_only=True)
class Halving:
    """Early stopping: Li et al., "A System for Massively Parallel Hyperparameter Tuning", MLSys 2020 (ASHA).
    arXiv:1810.05934.

    After `first`, first * eta, first * eta^2, ... epochs a trial goes on if its best validation score so far is among
    the best 1/eta of what the trials of earlier waves had there, itself included. Other than in the paper a trial that
    is stopped is never taken up again, so that what a trial is does not depend on when others end.
    """

    eta: int = 3
    first: int = 1

    def rungs(self, epochs: int) -> Iterator[int]:
        """The epochs, of so many, after which a trial may be stopped."""
        rung = self.first
        while rung < epochs:
            yield rung
            rung *= self.eta

    def cut_offs(self, trial: Trial, earlier: Sequence[Result]) -> tuple[tuple[int, float], ...]:
        """`Training.stop_below` of a trial; rounded down to four digits."""
        found = []
        for rung in self.rungs(trial.train.epochs):
            scores = sorted((s for result in earlier if (s := score_after(result, rung)) is not None), reverse=True)
            if rank := (len(scores) + 1) // self.eta:
                found.append((rung, math.floor(scores[rank - 1] * 1e4) / 1e4))
        return tuple(found)


def score_after(result: Result, epoch: int) -> float | None:
    """The best validation score within so many epochs; None where the trial failed, or was over before."""
    if result.status != "done" or result.history[-1].epoch < epoch:
        return None
    lines = (getattr(line, result.trial.eval.metric) for line in result.history if line.epoch <= epoch)
    return max((score for score in lines if score is not None), default=None)


def score(result: Result | None) -> float | None:
    """That a search goes by: of the selected checkpoint, on the split that it is selected on."""
    if result is None or result.status != "done":
        return None
    evaluation = result.trial.eval
    return getattr(result.scores[evaluation.select_on], evaluation.metric)


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    number: int
    """As `NUMBER` has it."""
    labels: Mapping[str, str]
    """By the key of an axis, NONE where it does not concern the trial."""
    trial: Trial
    first: bool
    """Whether it has not been made before: a trial is run once."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """What is searched, how, and for how long."""

    base: Trial
    """All that is not searched, as `defaults` has it."""
    splits: tuple[str, ...]
    """That the best one is to be scored on; the search looks at none but that which checkpoints are selected on."""
    space: tuple[Axis, ...]
    """Choices before their options."""
    trials: int | None = None
    """Suggestions to be made."""
    gpu_hours: float | None = None
    """Of training and evaluation, counted for each process of a trial, after which no suggestion is made."""
    seed: int = 0
    sampler: Literal["tpe", "random"] = "tpe"
    parallel: int = 4
    """Suggestions of a wave: they are made without knowing what each other comes to."""
    asha: Halving | None = None

    def replay(self, find: Find) -> list[Suggestion]:
        """Every suggestion that can be made by the results that are known, those included that led to it."""
        made: list[Suggestion] = []
        known: list[Result] = []
        with _quiet_optuna() as optuna:
            samplers = {
                "tpe": lambda: optuna.samplers.TPESampler(
                    seed=self.seed, multivariate=True, group=True, constant_liar=True
                ),
                "random": lambda: optuna.samplers.RandomSampler(seed=self.seed),
            }
            study = optuna.create_study(direction="maximize", sampler=samplers[self.sampler]())
            trials: dict[str, Trial] = {}  # with the cut-offs, by the id without them
            while number := self._more(len(made), known):
                earlier = list({result.trial.id: result for result in known}.values())
                asked = []
                for _ in range(number):
                    asked.append(study.ask())
                    labels, trial = self._suggest(lambda axis, one=asked[-1]: axis.ask(one))
                    if first := trial.id not in trials:
                        trials[trial.id] = self._with_cut_offs(trial, earlier)
                    made.append(Suggestion(number=len(made) + 1, labels=labels, trial=trials[trial.id], first=first))
                wave = made[-number:]
                results = [find(suggestion.trial) for suggestion in wave]
                if None in results:
                    break
                for one, result in zip(asked, results, strict=True):
                    value = score(result)
                    study.tell(one, value, state=optuna.trial.TrialState.FAIL if value is None else None)
                known += results
        return made

    def corners(self) -> list[Trial]:
        """Every combination of backbone, method and head, each with the first value of all that is searched besides."""
        choices = [axis for axis in self.space if axis.key in KINDS]
        found = []
        for labels in product(*(axis.values for axis in choices)):
            chosen = {axis.key: label for axis, label in zip(choices, labels, strict=True)}
            found.append(self._suggest(lambda axis, chosen=chosen: chosen.get(axis.key) or _first(axis))[1])
        return found

    def best(self, trials: Sequence[Trial], results: Mapping[str, Result]) -> Trial | None:
        """The trial with the best score; None where none has one."""
        scored = [(trial, value) for trial in trials if (value := score(results.get(trial.id))) is not None]
        return max(scored, key=lambda pair: pair[1], default=(None, None))[0]

    def whole(self, trial: Trial) -> Trial:
        """A trial of this search as it would be without one: never stopped early, and scored on every split."""
        return replace(
            trial,
            train=replace(trial.train, stop_below=self.base.train.stop_below),
            eval=replace(trial.eval, splits=self.base.eval.splits),
        )

    def importances(self, trials: Sequence[tuple[Mapping[str, str], float]]) -> dict[str, float]:
        """How much of being among the best tenth goes back to each key, of 1 in all; out of labels and scores.

        Watanabe, Bansal and Hutter, "PED-ANOVA: Efficiently Quantifying Hyperparameter Importance in Arbitrary
        Subspaces", IJCAI 2023. arXiv:2304.10255. Of Optuna before 5, keys that only some trials have are left out.
        """
        with _quiet_optuna() as optuna:
            study = optuna.create_study(direction="maximize")
            for labels, value in trials:
                had = [axis for axis in self.space if labels[axis.key] != NONE]
                params = {a.key: labels[a.key] if a.values else type(a.low)(labels[a.key]) for a in had}
                study.add_trial(
                    optuna.create_trial(
                        params=params, distributions={axis.key: axis.distribution for axis in had}, value=value
                    )
                )
            evaluator = optuna.importance.PedAnovaImportanceEvaluator()
            return optuna.importance.get_param_importances(study, evaluator=evaluator)

    def notes(self) -> Iterator[str]:
        """What a reader of its results has to know."""
        how = {"tpe": "TPE", "random": "random sampling"}[self.sampler]
        yield f"Searched by {how} (Optuna) with seed {self.seed}, in waves of {self.parallel}: {self.budget()}."
        yield f"Space: {'; '.join(map(str, self.space))}."
        if self.asha:
            rungs = ", ".join(map(str, self.asha.rungs(self.base.train.epochs)))
            yield f"Stopped early by ASHA (Li et al., MLSys 2020) with eta {self.asha.eta}, after epoch {rungs}."
        yield "Scores on the split that is searched on are optimistic; no other split was looked at."

    def budget(self) -> str:
        amounts = (self.trials and f"{self.trials} suggestions", self.gpu_hours and f"{self.gpu_hours:g} hours")
        return " or ".join(filter(None, amounts))

    def _more(self, made: int, known: Sequence[Result]) -> int:
        """How many suggestions the next wave has."""
        results = {result.trial.id: result for result in known}.values()
        if self.gpu_hours is not None:
            costs = [result.cost for result in results if result.cost]
            seconds = sum(cost.processes * (cost.train_seconds + cost.eval_seconds) for cost in costs)
            if seconds >= 3600 * self.gpu_hours:
                return 0
        if self.trials is not None:
            return min(self.parallel, self.trials - made)
        earlier = {result.trial.id for result in known[:-PATIENCE]}
        idle = all(result.cost is None or result.trial.id in earlier for result in known[-PATIENCE:])
        return 0 if len(known) >= PATIENCE and idle else self.parallel

    def _suggest(self, choose: Callable[[Axis], str]) -> tuple[dict[str, str], Trial]:
        trial = replace(self.base, eval=replace(self.base.eval, splits=(self.base.eval.select_on,)))
        labels = {}
        for axis in self.space:
            labels[axis.key] = choose(axis) if axis.concerns(trial) else NONE
            if labels[axis.key] != NONE:
                trial = axis.put(trial, labels[axis.key])
        return labels, trial

    def _with_cut_offs(self, trial: Trial, earlier: Sequence[Result]) -> Trial:
        if self.asha is None:
            return trial
        return replace(trial, train=replace(trial.train, stop_below=self.asha.cut_offs(trial, earlier)))


def read_search(
    item: Located,
    defaults: Located,
    splits: tuple[str, ...],
    build: Callable[[Located], Trial],
    labelled: Callable[[str, Sequence[Located]], list[dict[str, Located]]],
) -> Search:
    """The `search` of an experiment file; UserError where it could not be made as it is written.

    Args:
        item: the section.
        defaults: the section of this name, which is a trial.
        splits: that the trial reports.
        build: the trial that such a section is, or UserError.
        labelled: the values of a key by label, list by list.
    """
    known = get_type_hints(Search)
    items = item.keys("search", [key for key in known if key not in ("base", "splits")], ("space",))
    base = build(defaults)
    if base.eval.select_on.startswith("test"):
        select_on = defaults.value["eval"].value["select_on"]
        raise select_on.error(f"eval.select_on is {base.eval.select_on}; a search sees no test split; name another")
    found = Search(
        base=base,
        splits=splits,
        space=tuple(_read_space(items["space"], defaults, build, labelled)),
        asha=items["asha"].record(Halving, "search.asha") if "asha" in items else None,
        **{
            key: value.typed(known[key], f"search.{key}")
            for key, value in items.items()
            if key not in ("space", "asha")
        },
    )
    if found.trials is None and found.gpu_hours is None:
        raise item.error("search says not when it ends; add trials, gpu_hours or both")
    for key, allowed, words in _rules(found):
        if not allowed:
            section, _, name = key.partition(".")
            place = items[section].value.get(name, items[section]) if name else items[section]
            value = getattr(found.asha, name) if name else getattr(found, key)
            raise place.error(f"search.{key} is {value!r}; it must be {words}")
    if found.asha and base.train.stop_below:
        raise items["asha"].error("asha decides on train.stop_below, which defaults has too; remove one of them")
    return found


def _rules(found: Search) -> Iterator[tuple[str, bool, str]]:
    # Key, whether its value is allowed, what is.
    yield "trials", found.trials is None or found.trials >= 1, "at least 1"
    yield "gpu_hours", found.gpu_hours is None or 0 < found.gpu_hours < math.inf, "greater than 0"
    yield "seed", 0 <= found.seed < 2**32, "from 0 to 4294967295"
    yield "parallel", found.parallel >= 1, "at least 1"
    if found.asha:
        epochs, every = found.base.train.epochs, found.base.eval.every
        yield "asha.eta", found.asha.eta >= 2, "at least 2"
        yield "asha.first", found.asha.first >= 1, "at least 1"
        yield "asha.first", found.asha.first % every == 0, f"a validated epoch, a multiple of {every} (eval.every)"
        yield "asha.first", found.asha.first < epochs, f"less than {epochs} (train.epochs)"


def _read_space(
    item: Located,
    defaults: Located,
    build: Callable[[Located], Trial],
    labelled: Callable[[str, Sequence[Located]], list[dict[str, Located]]],
) -> Iterator[Axis]:
    space = item.mapping("search.space")
    if not space:
        raise item.error("search.space is empty; add a key of defaults with its values: train.lr: [1.0e-3, 1.0e-4]")
    chosen: dict[str, list[Located]] = {kind: [defaults.value[kind]] for kind in KINDS}
    # Choices first: they say which options there are.
    for key, written in sorted(space.items(), key=lambda pair: pair[0].count(".")):
        section, *rest = key.split(".")
        if section not in ("train", *KINDS) or len(rest) not in ((1,) if section == "train" else (0, 2)):
            raise written.error(
                f"{key} cannot be searched; train.KEY, a whole {', '.join(KINDS)} and its options, such as "
                "method.lora.text_rank, can; correct or remove it"
            )
        if section == "train" and rest[0] in ("split", "stop_below"):
            raise written.error(f"{key} cannot be searched: it would compare what is not comparable; remove it")
        owners = [entry for entry in chosen[section] if _name(entry) == rest[0]] if len(rest) == 2 else []
        if len(rest) == 2 and not owners:
            raise written.error(f"{key} is searched, but {section} is never {rest[0]}; add that or remove this")
        yield _read_axis(key, written, owners, defaults, build, labelled)
        if not rest:
            chosen[section] = written.value


def _read_axis(
    key: str,
    written: Located,
    owners: Sequence[Located],
    defaults: Located,
    build: Callable[[Located], Trial],
    labelled: Callable[[str, Sequence[Located]], list[dict[str, Located]]],
) -> Axis:
    """Args: as `_read_space`, and the choices, as they are written, that a key is an option of."""
    section, *rest = key.split(".")

    def resolve(value: Located) -> Any:
        """A value as a trial has it; every choice that it is an option of is looked at."""
        trials = [build(defaults.put([section], _with_option(one, rest[-1], value), "defaults")) for one in owners]
        trial = trials[0] if owners else build(defaults.put([section, *rest], value, "defaults"))
        part = getattr(trial, section)
        return part.options[rest[-1]] if owners else getattr(part, rest[0]) if rest else part

    if isinstance(written.value, list):
        [values] = labelled(key, [written])
        return Axis(key=key, values={label: resolve(value) for label, value in values.items()})
    if not rest:
        raise written.error(f"{key} is {written.plain()!r}; it must be a list: [a, b]")
    return _read_range(key, written, resolve)


def _read_range(key: str, written: Located, resolve: Callable[[Located], Any]) -> Axis:
    if not isinstance(written.value, dict):
        raise written.error(f"{key} is {written.plain()!r}; it must be a list of values, or {{low: A, high: B}}")
    items = written.keys(key, ("low", "high", "step", "log"), ("low", "high"))
    low, high = (resolve(items[end]) for end in ("low", "high"))
    if type(low) is not type(high) or type(low) not in (int, float):
        raise written.error(f"{key} is no number, so that it has no range; list its values: [a, b]")
    log = items["log"].typed(bool, f"{key}.log") if "log" in items else False
    step = items["step"].typed(type(low), f"{key}.step") if "step" in items else None
    for end, wrong, words in (
        ("low", not low < high, f"low is {low}, which is not less than high, {high}"),
        ("low", log and low <= 0, f"low is {low}; a logarithm needs more than 0"),
        ("step", step is not None and log, "a logarithmic range has no step; remove log or step"),
        ("step", step is not None and not 0 < step <= high - low, f"step is {step}; it must be from 0 to high - low"),
    ):
        if wrong:
            raise items[end].error(f"{key}: {words}")
    if step is not None and not math.isclose(round((high - low) / step) * step, high - low):
        raise items["step"].error(f"{key}: high, {high}, is not reached from {low} in steps of {step}; change one")
    return Axis(key=key, low=low, high=high, step=step, log=log)


def _name(choice: Located) -> str:
    """Of a choice that can be built."""
    return choice.value if isinstance(choice.value, str) else next(iter(choice.value))


def _with_option(choice: Located, option: str, value: Located) -> Located:
    name = _name(choice)
    options = {} if isinstance(choice.value, str) else choice.value[name].value
    return replace(choice, value={name: replace(choice, value={**options, option: value})})


def from_record(values: Mapping[str, Any]) -> Search:
    """The inverse of `records.plain`, also after a round trip through JSON; an error where it is none."""
    space = [record(Axis, axis) for axis in values["space"]]
    for axis in (axis for axis in space if axis.key in KINDS):
        axis.values.update({label: Choice(**choice) for label, choice in axis.values.items()})
    asha = values["asha"] and record(Halving, values["asha"])
    rest = {key: value for key, value in values.items() if key not in ("base", "space", "asha")}
    base = Trial.from_dict(values["base"])
    found = replace(record(Search, {**rest, "base": base, "space": ()}), space=tuple(space), asha=asha)
    for key, allowed, words in _rules(found):
        if not allowed:
            raise ValueError(f"search.{key} must be {words}")
    return found


def _first(axis: Axis) -> str:
    return next(iter(axis.values), str(axis.low))


@contextmanager
def _quiet_optuna() -> Iterator[Any]:
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            # What this needs of it is experimental in some versions.
            warnings.simplefilter("ignore")
            yield optuna
    finally:
        optuna.logging.set_verbosity(before)
