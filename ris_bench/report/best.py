"""The best trial of a search as an experiment of its own, which trains it to its end and scores it on every split."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import yaml

from ris_bench.layout import METRICS, TITLES
from ris_bench.records import Result, plain
from ris_bench.report.tables import line
from ris_bench.search import KINDS, NONE, NUMBER, score

if TYPE_CHECKING:
    from ris_bench.plan import Experiment

FILE = "best.yaml"


def text(experiment: Experiment, results: Mapping[str, Result]) -> str | None:
    """The experiment file; None where there is no search, or no result of it."""
    search = experiment.search
    found = search and search.best([run.trial for run in experiment.runs], results)
    if not found:
        return None
    labels = next(run.axes for run in experiment.runs if run.trial.id == found.id)
    trial = search.whole(found)
    measured = f"{100 * score(results[found.id]):.2f} {METRICS[trial.eval.metric]} on {trial.eval.select_on}"
    values = ", ".join(f"{key} {label}" for key, label in labels.items() if label != NONE and key != NUMBER)
    record = plain(trial)
    choices = {
        kind: {choice.name: dict(choice.options)} for kind in ("dataset", *KINDS) if (choice := getattr(trial, kind))
    }
    document: dict[str, Any] = {"name": f"{experiment.name}-best", "title": f"{experiment.title}: the best"}
    if experiment.plugins:
        document["plugins"] = [_place(experiment, plugin.name) for plugin in experiment.plugins]
    document["defaults"] = {**record, **choices}
    document["grid"] = {"method": [choices["method"]]}
    document["table"] = {
        "rows": "method",
        "columns": [
            {"header": "Params (K)", "value": "params.tunable_backbone", "scale": 1e-3},
            {
                "header": TITLES.get(trial.dataset.name, trial.dataset.name.capitalize()),
                "value": trial.eval.metric,
                "splits": list(search.splits),
            },
        ],
    }
    # Through JSON: YAML has no tuples.
    body = yaml.safe_dump(
        json.loads(json.dumps(document)), sort_keys=False, allow_unicode=True, width=100, default_flow_style=None
    )
    head = (
        f"The best of the search {line(experiment.name)}: trial {labels[NUMBER]}, {measured}.",
        line(values),
        f"Of {len(results)} trials with a result. Written anew while the search goes on.",
    )
    return "".join(f"# {each}\n" for each in head) + f"\n{body}"


def _place(experiment: Experiment, plugin: str) -> str:
    """A plug-in as another folder names it."""
    return str((experiment.path.parent / plugin).absolute()) if plugin.endswith(".py") else plugin
