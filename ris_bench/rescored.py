"""Scores of a trial by other protocols: kept beside its result once its predictions were scored, to be tabulated."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ris_bench.errors import UserError
from ris_bench.files import write_whole
from ris_bench.protocols import RIS_BENCH, Protocol
from ris_bench.records import Result, Scores
from ris_bench.results import Store, read_done

if TYPE_CHECKING:  # it imports torch
    from ris_bench.scoring import Score

FILE = "protocols.json"
"""In the folder of a trial: by protocol and split, the scores as `Scores` has them, and marks of protocols.MARKS."""
CLOSE = 1e-3
"""How far the mIoU of a trial's predictions may be from its own: maps are kept with half the digits."""


def keep(folder: Path, scores: Iterable[Score]) -> Path:
    """Add what the predictions of a trial score, as papers make their numbers, to the folder of the trial.

    Raises UserError where they are not those of the trial: of other data, or another mIoU by ris-bench.
    """
    result = read_done(folder)
    kept = _read(folder)
    by_split: dict[tuple[str, str, str], dict[str, Score]] = {}
    for one in scores:
        by_split.setdefault((one.protocol, one.dataset, one.split), {})[one.kind] = one
    for (protocol, dataset, split), found in by_split.items():
        # A mixture of data sets names the part behind its splits.
        name = f"{split}/{dataset}" if result.trial.dataset.name == "mixed" else split
        if dataset not in (result.trial.dataset.name, *name.split("/")[1:]) or name not in result.scores:
            raise UserError(f"{folder} has no scores of {dataset} {split}: the predictions are not of this trial")
        mean = found["mean"].value
        if protocol == RIS_BENCH.name and abs(mean - result.scores[name].miou) > CLOSE:
            raise UserError(
                f"the predictions have {100 * mean:.2f} mIoU on {split}, and the trial in {folder} has "
                f"{100 * result.scores[name].miou:.2f}: they are not its own"
            )
        kept.setdefault(protocol, {})[name] = {
            "oiou": found["overall"].value,
            "miou": mean,
            "precision_at": {kind.removeprefix("Pr@"): one.value for kind, one in found.items() if kind[:3] == "Pr@"},
            "num_expressions": found["mean"].num_expressions,
            "marks": sorted({mark for one in found.values() for mark in one.marks}),
        }
    write_whole(folder / FILE, json.dumps(kept, indent=1))
    return folder / FILE


@dataclass(frozen=True)
class Rescored:
    """Results with the scores of another protocol in the place of their own."""

    protocol: Protocol
    results: Mapping[str, Result]
    """By trial id. A split that was not scored has no scores."""
    marks: Sequence[str]
    """Of protocols.MARKS, whatever of them holds for some score."""
    lacking: Sequence[str]
    """Trials of which something was not scored, by id."""


def rescored(results: Mapping[str, Result], store: Store, protocol: Protocol) -> Rescored:
    """What `keep` has kept of these results. UserError where a file is none of its."""
    found, marks, lacking = {}, set(), []
    for key, result in results.items():
        kept = _read(store.folder(result.trial)).get(protocol.name, {})
        marks |= {mark for one in kept.values() for mark in one["marks"]}
        scores = {
            split: Scores(**{name: value for name, value in one.items() if name != "marks"})
            for split, one in kept.items()
            if split in result.scores
        }
        if result.status == "done" and any(
            split not in scores for split in result.scores if not split.endswith("/shuffled")
        ):
            lacking.append(key)
        found[key] = replace(result, scores=scores)
    return Rescored(protocol, found, sorted(marks), lacking)


def _read(folder: Path) -> dict[str, dict[str, dict]]:
    path = folder / FILE
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        numbers = [value for splits in kept.values() for one in splits.values() for value in (one["oiou"], one["miou"])]
        if not all(0 <= number <= 1 for number in numbers):
            raise ValueError("a score that cannot be")
        return kept
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"{path} holds no scores by protocols ({why}); delete it and score the predictions again"
        ) from None
