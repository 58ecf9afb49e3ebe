"""What a running sweep shows: live lines on a terminal, a few plain lines where the output is a pipe."""

from __future__ import annotations

import sys
import time

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from ris_bench.records import Progress, Result, Trial

QUIET_SECONDS = 30
"""In a pipe, a running trial prints a line no more often than this."""


class Display:
    """A context manager that follows a sweep on stdout.

    On a terminal every running trial has one line that changes in place, below the lines of the finished ones. In a
    pipe a trial prints when it starts, every half minute, and when it ends; no control characters are written.
    """

    def __init__(self) -> None:
        self._total = self._ended = self._id_width = 0
        self._running: dict[str, Progress | None] = {}
        self._started: dict[str, float] = {}
        self._spoke: dict[str, float] = {}
        self._warned: set[str] = set()
        self._stream = sys.stdout  # an executor may send what others print elsewhere
        console = Console(file=self._stream, highlight=False)
        # Not console.is_terminal: FORCE_COLOR would make a pipe pass for one.
        self._live = None
        if self._stream.isatty() and not console.is_dumb_terminal:
            self._live = Live(console=console, get_renderable=self._lines, redirect_stderr=sys.stderr.isatty())

    def __enter__(self) -> Display:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._running.clear()
        if self._live:
            self._live.stop()
        self._print("")

    def expect(self, trials: list[Trial], retried: int = 0) -> None:
        """More trials are to come; some of them have failed before."""
        self._total += len(trials)
        self._id_width = max([self._id_width, *(len(trial.id) for trial in trials)])
        again = f", {retried} of them again because they failed" if retried else ""
        self._print(f"{len(trials)} {'trial' if len(trials) == 1 else 'trials'} to run{again}")

    def started(self, trial: Trial) -> None:
        """A trial starts, or starts again because its process died."""
        again = trial.id in self._started
        self._started.setdefault(trial.id, time.monotonic())
        self._spoke[trial.id] = time.monotonic()
        self._running[trial.id] = None
        if again:
            self._print(f"{trial.id} starts again: its process died")
        elif not self._live:
            self._print(f"{trial.id} starts")

    def progress(self, progress: Progress) -> None:
        """A trial is this far."""
        trial_id, now = progress.trial_id, time.monotonic()
        self._running[trial_id] = progress
        if progress.warning and progress.warning not in self._warned:
            self._warned.add(progress.warning)
            self._print(f"warning: {progress.warning}")
        if not self._live and now - self._spoke[trial_id] >= QUIET_SECONDS:
            self._spoke[trial_id] = now
            self._print(f"{trial_id}  {describe(progress)}")

    def finished(self, result: Result) -> None:
        """A trial has its result."""
        trial_id, now = result.trial.id, time.monotonic()
        self._running.pop(trial_id, None)
        self._ended += 1
        seconds = now - self._started.get(trial_id, now)
        count = f"[{self._ended:>{len(str(self._total))}}/{self._total}]"
        outcome = describe_scores(result) if result.status == "done" else f"FAILED: {result.error}"
        self._print(f"{count} {trial_id:<{self._id_width}}  {seconds:6.0f} s  {outcome}")

    def _print(self, line: str) -> None:
        if self._live:
            self._live.console.print(line, markup=False, soft_wrap=True)
        else:
            print(line, file=self._stream, flush=True)

    def _lines(self) -> Group:
        width = self._live.console.width // 2 if self._live else 0
        # A copy: the screen is refreshed by a thread of its own.
        lines = [
            f"{shortened(trial_id, width)}  {describe(progress) if progress else 'starts'}"
            for trial_id, progress in list(self._running.items())
        ]
        return Group(*(Text(line, no_wrap=True, overflow="ellipsis") for line in lines))


def describe(progress: Progress) -> str:
    """ "train  epoch 3/10  loss 0.412  152 images/s  1:05 left"; what is not known is left out."""
    parts = [progress.phase]
    if progress.phase != "load":
        parts.append(f"epoch {progress.epoch}/{progress.epochs}")
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.3f}")
    if progress.score is not None:
        parts.append(f"score {100 * progress.score:.1f}")
    if progress.images_per_second is not None:
        parts.append(f"{progress.images_per_second:.0f} images/s")
    if progress.eta_seconds is not None:
        parts.append(f"{duration(progress.eta_seconds)} left")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """ "1:05", "2:01:05"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def describe_scores(result: Result) -> str:
    """The metric that the trial selects on, in percent, on every split that it reports: "miou val 53.1  testA 51.0"."""
    metric, precision = result.trial.eval.metric, result.trial.train.feature_precision
    parts = []
    for split, scores in result.scores.items():
        parts.append(f"{split} {100 * getattr(scores, metric):.1f}")
        if scores.rounded:
            difference = scores.rounded[metric] - getattr(scores, metric)
            parts[-1] += f" ({100 * difference:+.2f} with image features in {precision})"
    return f"{metric} {'  '.join(parts)}"


def shortened(text: str, width: int) -> str:
    """The text, or its two ends: in a trial's id the last characters are the ones that differ."""
    return text if len(text) <= width else f"{text[: width - width // 2 - 1]}…{text[-(width // 2) :]}"
