"""The results folder: `trials/<trial id>/` appears there whole or not at all, and is shared by all experiments."""

from __future__ import annotations

import glob
import json
import os
import secrets
import shutil
import socket
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ris_bench.errors import UserError
from ris_bench.files import write_whole
from ris_bench.records import Result, Trial

CHECKPOINTS = "checkpoints"
"""In the folder of an attempt: what the next attempt goes on from."""
PROGRESS = "progress.json"
"""In the folder of an attempt: how far it is, and which process works at it since when."""
PLAN = "plan.jsonl"
"""In the folder of an experiment: what it is."""


@dataclass(frozen=True)
class Store:
    """The results under `root`, an absolute path: worker processes have other working directories."""

    root: Path

    @property
    def place(self) -> str:
        """Where people find the results."""
        return str(self.root)

    def refresh(self, trial: Trial | None = None) -> None:
        """Take note of what other machines have left, of one trial or of all. They write into this folder itself."""

    def fetch(self, trials: Iterable[str]) -> None:
        """Have here what a report shows of trials that are done, by id."""

    def publish(self, name: str) -> None:
        """Show others the tables of an experiment, which have been written here."""

    def folder(self, trial: Trial) -> Path:
        """Where a finished trial lies, done or failed."""
        return self.root / "trials" / trial.id

    def read(self, trial: Trial) -> Result | None:
        """The result of a trial, or None; a file that does not hold this trial's whole result counts as none."""
        path = self.folder(trial) / "result.json"
        try:
            result = Result.from_json(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            result = None
        if result is None or result.trial.id != trial.id:
            warnings.warn(f"{path} does not hold the result of this trial: it will be run again", stacklevel=2)
            return None
        return result

    def done(self) -> Iterator[Result]:
        """Every sound result of a trial that is done, whatever experiment wants it."""
        for path in (self.root / "trials").glob("*/result.json"):
            with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
                result = Result.from_json(path.read_text(encoding="utf-8"))
                if result.status == "done" and result.trial.id == path.parent.name and _is_sound(result):
                    yield result

    def collect(self, trials: Iterable[Trial]) -> tuple[dict[str, Result], list[str]]:
        """What is known of trials, by id, and a sentence on every file that could pass for a result and is left out.

        Left out is what is no whole result, what holds another trial than its folder says, as a second result of one of
        these trials does, and what has a number that cannot be. Sound results of other trials are not named.
        """
        wanted = {trial.id for trial in trials}
        results: dict[str, Result] = {}
        skipped = []
        for path in sorted((self.root / "trials").glob("*/result.json")):
            folder = path.parent.name
            try:
                result = Result.from_json(path.read_text(encoding="utf-8"))
                sound = _is_sound(result)
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                why = " ".join(f"{type(error).__name__}: {error}".split())
                skipped.append(f"{path} is left out: it is no whole result ({why})")
                continue
            held = result.trial.id
            if held != folder:
                what = f"the result of {held}" if held in wanted else "the result of another trial"
                skipped.append(f"{path} is left out: it is {what}, which its folder is not named after")
            elif held in wanted and not sound:
                skipped.append(f"{path} is left out: it has a number that cannot be")
            elif held in wanted:
                results[held] = result
        return results, skipped

    def find(self, trial: str) -> Path:
        """The folder of the one finished trial whose id begins so; of `trial` itself where that is such a folder.

        Raises UserError where no id or several begin so.
        """
        if (Path(trial) / "result.json").is_file():
            return Path(trial)
        results = (self.root / "trials").glob("*/result.json")
        folders = sorted(path.parent for path in results if not path.parent.name.startswith("."))
        found = [folder for folder in folders if folder.name.startswith(trial)]
        if len(found) == 1:
            return found[0]
        some = ", ".join(folder.name for folder in found[:3]) + (", ..." if len(found) > 3 else "")
        begins = f"{len(found)} trials of {self.root} have an id that begins with {trial!r}"
        raise UserError(f"{begins}: {some}; write more of it" if found else f"{begins}; look into its folder 'trials'")

    def begin(self, trial: Trial) -> Path:
        """A new folder for an attempt at a trial, with the checkpoints of those before, and nothing else, in it.

        Each attempt has a folder of its own, so that a worker that was given up but still lives (its node lost the
        network) cannot write into its successor's: its own is removed, and it fails.
        """
        earlier = self.attempts(trial)
        folder = self.root / "trials" / f".{trial.id}.{secrets.token_hex(4)}.partial"
        folder.mkdir(parents=True)
        for attempt in (*earlier, self.folder(trial)):  # a trial that failed is tried again from where it was
            with suppress(FileNotFoundError):  # there are none, or another process is faster
                for checkpoint in (attempt / CHECKPOINTS).iterdir():
                    (folder / CHECKPOINTS).mkdir(exist_ok=True)
                    checkpoint.rename(folder / CHECKPOINTS / checkpoint.name)
        for attempt in earlier:
            shutil.rmtree(attempt, ignore_errors=True)
        return folder

    def shared(self, trial: Trial, folder: Path) -> AbstractContextManager[None]:
        """While an attempt is made in its folder: what the next one needs is where that finds it."""
        return nullcontext()

    def note(self, trial: Trial, line: str) -> None:
        """Add a line to the log of a trial that is worked at."""
        for folder in self.attempts(trial):
            add_line(folder, line)

    def attempts(self, trial: Trial) -> list[Path]:
        """Folders of attempts that have not been finished."""
        return list((self.root / "trials").glob(f".{glob.escape(trial.id)}.*.partial"))

    def finish(self, folder: Path, result: Result) -> Result:
        """Make the folder of an attempt the folder of its trial, with the result in it; return the result that counts.

        A result that is done stays as it is, without checkpoints; a failed one is replaced.
        """
        (folder / "result.json").write_text(result.to_json(), encoding="utf-8")
        _flush(path for path in folder.rglob("*") if path.is_file())
        final = self.folder(result.trial)
        try:
            folder.rename(final)
        except OSError:  # there is one already: a folder that is not empty is never renamed over
            known = self.read(result.trial)
            if known and known.status == "done":
                shutil.rmtree(folder)
                return known
            shutil.rmtree(final)
            folder.rename(final)
        if result.status == "done":
            shutil.rmtree(final / CHECKPOINTS, ignore_errors=True)
        return result

    @contextmanager
    def held(self, what: str) -> Iterator[None]:
        """Be the only process that starts trials here, which is freed of it however it ends.

        Raises UserError, which names the other, where one is at work, and where nothing can be written.
        """
        folder = self.root / "trials"
        lock, told = FileLock(folder / _DRIVER_LOCK), folder / _DRIVER
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=1)  # who only asks whether somebody is at work has it for a moment
            write_whole(told, json.dumps({"experiment": what, **this_process()}))
        except Timeout:
            holder = self.driver() or {}
            who = ", ".join(f"{key} {value}" for key, value in holder.items()) or "which has not said who it is"
            raise UserError(
                f"another run is at work in {self.root} ({who}); wait until it is done, stop it, or give another "
                "--results"
            ) from None
        except OSError as error:
            lock.release()
            raise UserError(
                f"results cannot be written to {self.root} ({error.strerror or error}); make room, or give another "
                "--results"
            ) from None
        try:
            yield
        finally:
            told.unlink(missing_ok=True)
            lock.release()
            if {path.name for path in folder.iterdir()} == {_DRIVER_LOCK}:  # nothing came of it
                (folder / _DRIVER_LOCK).unlink()
                with suppress(OSError):
                    folder.rmdir()
                    self.root.rmdir()

    def driver(self) -> Mapping[str, Any] | None:
        """What the process that starts trials here says of itself; None where there is none."""
        folder = self.root / "trials"
        if not (folder / _DRIVER_LOCK).exists():
            return None
        try:
            with FileLock(folder / _DRIVER_LOCK, timeout=0):
                return None
        except (Timeout, OSError):
            return _mapping(folder / _DRIVER) or {}

    def running(self, pattern: str = ".*.partial") -> list[tuple[str, Mapping[str, Any], float]]:
        """Every attempt that is not finished: the id of its trial, the last `PROGRESS`, and when that was, as a time.

        Nothing says that its process still lives.
        """
        found = []
        for folder in (self.root / "trials").glob(pattern):
            path = folder / PROGRESS
            with suppress(OSError):  # it may be finished just now
                last = (path if path.exists() else folder).stat().st_mtime
                found.append((folder.name[1:].rpartition(".partial")[0].rpartition(".")[0], _mapping(path) or {}, last))
        return sorted(found, key=lambda attempt: attempt[0])

    def check_writable(self) -> None:
        """Raises UserError where nothing could be written; creates nothing."""
        parent = next(path for path in (self.root, *self.root.parents) if path.exists())
        if not (parent.is_dir() and os.access(parent, os.W_OK)):
            raise UserError(f"results cannot be written to {self.root}: {parent} is not a writable folder")


def read_done(folder: Path) -> Result:
    """What lies in the folder of a trial that is done. UserError where it is no result, or the trial failed."""
    path = folder / "result.json"
    try:
        result = Result.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is no result ({type(error).__name__}: {error})") from None
    if result.status != "done":
        raise UserError(f"trial {folder.name} failed ({result.error}): it left neither a model nor scores")
    return result


_DRIVER, _DRIVER_LOCK = ".driver.json", ".driver.lock"


def this_process() -> dict[str, Any]:
    """As people look for a process."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def is_gone(told: Mapping[str, Any]) -> bool:
    """Whether what `this_process` has told of itself was a process of this machine, and is one no more."""
    pid = told.get("pid")
    if told.get("host") != socket.gethostname():
        return False
    if not isinstance(pid, int) or pid <= 0:
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # somebody else's
    return False


def add_line(folder: Path, *lines: str) -> None:
    """To the log of an attempt."""
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        print(*lines, sep="\n", file=log)


def _mapping(path: Path) -> Mapping[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _is_sound(result: Result) -> bool:
    """Whether its numbers can be what they are called; TypeError where one is none."""
    shares = [x for s in result.scores.values() for x in (s.miou, s.oiou, *s.precision_at.values())]
    shares += [x for s in result.scores.values() for swept in s.by_threshold.values() for x in swept.values()]
    counted = [vars(record).items() for record in (result.params, result.cost) if record]
    amounts = [
        x
        for items in counted
        for name, x in items
        if name not in ("device", "speed") and (name, x) not in (("prompt", None), ("micro_batches", None))
    ]
    return (
        result.status in ("done", "failed")
        and all(0 <= share <= 1 for share in shares)
        and all(amount >= 0 for amount in amounts)
    )


def _flush(paths: Iterable[Path]) -> None:
    # After a power cut a renamed folder must not hold files whose content never reached the disk.
    for path in paths:
        with path.open("r+b") as file:
            os.fsync(file.fileno())
