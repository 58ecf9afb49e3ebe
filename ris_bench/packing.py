"""How many trials share a GPU: as many as its memory has room for, by what trials of their kind have taken before."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from ris_bench.records import Result, Trial

MARGIN = 1.15
"""Of a peak: memory lies in pieces, and not all between them can be used."""
CONTEXT_BYTES = 10**9
"""That a process takes beside its tensors: the context of CUDA, kernels and what libraries work in."""
UNIT = 10_000
"""Parts of a GPU that Ray knows; it rounds to the next, and six trials of 0.1667 would be too many."""


def kind(trial: Trial) -> str:
    """What trials have in common that differ in nothing but seed and schedule, on which no memory depends."""
    train = replace(trial.train, epochs=1, lr=1.0, milestones=(), gamma=1.0, stop_below=())
    return replace(trial, seed=0, train=train).id


def peaks(results: Iterable[Result], speed: str, recompute: bool) -> dict[str, int]:
    """The most bytes of a GPU that a trial of a kind has taken, as one process that computed in this way, by kind."""
    found: dict[str, int] = {}
    for result in results:
        cost = result.cost
        if cost is None or cost.device.startswith("CPU") or cost.processes > 1:
            continue
        if (cost.speed, cost.recompute) == (speed, recompute):
            own = kind(result.trial)
            found[own] = max(cost.peak_memory_bytes, found.get(own, 0))
    return found


def waves(trials: Sequence[Trial], known: Mapping[str, int]) -> tuple[list[Trial], list[Trial]]:
    """Trials that can run now, and those that wait for the first one of their kind, of which no peak is known."""
    measured, now, later = set(known), [], []
    for trial in trials:
        own = kind(trial)
        (later if own in measured - known.keys() and _may_share(trial) else now).append(trial)
        measured.add(own)
    return now, later


def shares(trials: Sequence[Trial], known: Mapping[str, int], gpu_bytes: int, most: int) -> dict[str, float]:
    """The part of a GPU of so many bytes that each trial is given, by id: all of it where no peak is known.

    No GPU is cut into more than `most` parts.
    """

    def share(trial: Trial) -> float:
        peak = known.get(kind(trial))
        if peak is None or not _may_share(trial):
            return 1.0
        fit = int(gpu_bytes / (MARGIN * peak + CONTEXT_BYTES))
        return UNIT // max(1, min(fit, most)) / UNIT

    return {trial.id: share(trial) for trial in trials}


def _may_share(trial: Trial) -> bool:
    # The scores of one that makes do with less must not depend on its neighbours.
    return trial.train.out_of_memory != "split"
