"""Results at a URL, such as s3://bucket/path. Whatever fsspec opens has no folders, no locks, and renames nothing.

Every process works in a mirror, an ordinary results folder among its machine's cached files. A finished trial is
uploaded file by file, its `result.json` last: without one the others count for nothing. Of an attempt the checkpoints,
the log and how far it is are uploaded as they are made, for the next attempt, wherever it is made. What lies at the URL
is laid out as in a results folder: a copy of it is one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from filelock import FileLock

from ris_bench import cache
from ris_bench.errors import UserError
from ris_bench.files import whole, write_whole
from ris_bench.records import Result, Trial
from ris_bench.results import CHECKPOINTS, PLAN, PROGRESS, Store, add_line, is_gone, this_process

SHARE_SECONDS = 30
"""Between two uploads of what an attempt has: a few requests each."""
BEAT_SECONDS = 60
"""Between two signs of life of the process that starts trials."""
GONE_SECONDS = 200
"""After which it counts as gone."""
PAUSES = (1, 4, 15, 60)
"""Seconds after which what has failed is tried again: a network has its moments, and a trial takes hours."""
HEAVY = ("tuned.safetensors", "tensorboard/*", f"{CHECKPOINTS}/*")
"""Files of a trial that no report shows."""

T = TypeVar("T")

_MIRRORED = ".mirrored.json"
"""In a mirror: by name, which version of an object the file is."""
_DRIVERS = ".drivers/"
_ATTEMPT = "shared"
"""In the place of the token that the name of an attempt has: at a URL each goes on where the one before was."""
_BEGUN_BY = "begun_by"


def is_url(place: object) -> bool:
    return "://" in str(place)


def store_at(place: str | Path) -> Store:
    """The results at a URL or in a folder. Raises UserError where a URL is of a kind that cannot be opened here."""
    if not is_url(place):
        return Store(Path(place).absolute())
    objects = Objects(str(place).rstrip("/"))
    try:
        _ = objects.fs
    except ImportError as error:
        raise UserError(f"{place} takes another package ({error}): install it, on every node of a cluster") from error
    except Exception as error:
        raise UserError(f"{place} cannot be opened ({_brief(error)}); write such as s3://bucket/path") from error
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", objects.url)[-40:].strip("-")
    mirror = f"{readable}-{hashlib.sha256(objects.url.encode()).hexdigest()[:12]}"
    return UrlStore(cache.folder() / "mirrors" / mirror, objects)


@dataclass(frozen=True)
class Objects:
    """What lies below a URL, by name: `trials/ID/result.json`. Whatever fsspec raises passes."""

    url: str

    @cached_property
    def fs(self) -> Any:
        return self._opened[0]

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        import fsspec  # only now: few need it

        own = {"auto_mkdir": True} if self.url.startswith(("file:", "local:")) else {}
        fs, path = fsspec.url_to_fs(self.url, **own)
        return fs, path.rstrip("/")

    def _path(self, name: str) -> str:
        return f"{self._opened[1]}/{name}"

    def versions(self, prefix: str = "") -> dict[str, str]:
        """What there is whose name begins with a folder, and which version it is. Names that lead elsewhere are not."""
        self.fs.invalidate_cache()
        try:
            found = self.fs.find(self._path(prefix).rstrip("/"), detail=True)
        except FileNotFoundError:
            return {}
        names = {path[len(self._path("")) :]: about for path, about in found.items() if about.get("type") == "file"}
        return {name: _version(about) for name, about in names.items() if _is_plain(name) and name.startswith(prefix)}

    def read(self, name: str) -> bytes | None:
        try:
            return self.fs.cat_file(self._path(name))
        except FileNotFoundError:
            return None

    def modified(self, name: str) -> datetime:
        """When it was written, by the clock of who keeps it."""
        self.fs.invalidate_cache()
        when = self.fs.modified(self._path(name))
        return when if when.tzinfo else when.replace(tzinfo=timezone.utc)

    def write(self, name: str, content: Any) -> None:
        self.fs.pipe_file(self._path(name), json.dumps(content).encode())

    def upload(self, file: Path, name: str) -> None:
        self.fs.put_file(str(file), self._path(name))

    def download(self, name: str, file: Path) -> None:
        """FileNotFoundError where it is there no more."""
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole(file) as temporary:
            self.fs.get_file(self._path(name), str(temporary))

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            with suppress(FileNotFoundError):
                self.fs.rm_file(self._path(name))


@dataclass(frozen=True)
class UrlStore(Store):
    """The results at a URL; `root` is the mirror, which is another one on every machine."""

    objects: Objects

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return store_at, (self.objects.url,)

    @property
    def place(self) -> str:
        return self.objects.url

    def refresh(self, trial: Trial | None = None) -> None:
        if trial is not None:
            result = f"trials/{trial.id}/result.json"
            _persistently(lambda: self._mirror(f"trials/{trial.id}/", lambda name: name == result))
            return
        with self._reached("read"):
            self._mirror("", lambda name: PurePosixPath(name).name in ("result.json", PROGRESS, PLAN))

    def fetch(self, trials: Iterable[str], but: Collection[str] = HEAVY) -> None:
        wanted = set(trials)
        with self._reached("read"):
            self._mirror("trials/", lambda name: _is_of(name, wanted, but))

    def find(self, trial: str) -> Path:
        if not (Path(trial) / "result.json").is_file():
            self.refresh()
        found = super().find(trial)
        self.fetch((found.name,), but=())
        return found

    def publish(self, name: str) -> None:
        try:
            folder = self.root / name
            for file in (*folder.glob("table.*"), *folder.glob("*.yaml"), folder / PLAN):
                self.objects.upload(file, f"{name}/{file.name}")
        except Exception as error:  # they can be made again from the results, and are with the next one
            warnings.warn(f"the tables are not at {self.place} ({_brief(error)})", stacklevel=2)

    def attempts(self, trial: Trial) -> list[Path]:
        def begun() -> None:
            self._mirror(_remains(trial), lambda name: True)
            self._mirror(f"trials/{trial.id}/{CHECKPOINTS}/", lambda name: True)

        _persistently(begun)
        return super().attempts(trial)

    def begin(self, trial: Trial) -> Path:
        folder = super().begin(trial)
        _persistently(lambda: self.objects.write(_remains(trial) + _BEGUN_BY, folder.name))
        return folder

    @contextmanager
    def shared(self, trial: Trial, folder: Path) -> Iterator[None]:
        sent: dict[str, object] = {}
        over = threading.Event()

        def now() -> None:
            # Whoever waits for a network keeps no trial from going on.
            with suppress(Exception):
                self._share(trial, folder, sent)

        def again_and_again() -> None:
            with suppress(Exception):
                sent.update(dict.fromkeys(self.objects.versions(f"{_remains(trial)}{CHECKPOINTS}/"), True))
            while not over.wait(SHARE_SECONDS):
                now()

        thread = threading.Thread(target=again_and_again, daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            over.set()
            thread.join()
            now()  # it was stopped, and goes on elsewhere
            raise
        finally:
            over.set()
            thread.join()

    def note(self, trial: Trial, line: str) -> None:
        for folder in super().attempts(trial):
            add_line(folder, line)
            log = (folder / "log.txt", f"{_remains(trial)}log.txt")
            upload = threading.Thread(target=self.objects.upload, args=log, daemon=True)
            upload.start()
            upload.join(SHARE_SECONDS)  # perhaps it is the network that hangs

    def finish(self, folder: Path, result: Result) -> Result:
        write_whole(folder / "result.json", result.to_json())
        counts = _persistently(lambda: self._commit(folder, result))
        for attempt in super().attempts(result.trial):
            shutil.rmtree(attempt, ignore_errors=True)
        return counts

    @contextmanager
    def held(self, what: str) -> Iterator[None]:
        name = f"{_DRIVERS}{secrets.token_hex(4)}.json"
        over = threading.Event()

        def beat() -> None:
            while not over.wait(BEAT_SECONDS):
                with suppress(Exception):
                    self.objects.write(name, told)

        told = {"experiment": what, **this_process()}
        with self._reached("written to"):
            self.objects.write(name, told)
            others = self._drivers(self.objects.modified(name), besides=name)
        try:
            if others:
                who = ", ".join(f"{key} {value}" for key, value in others[0].items()) or "which has not said who it is"
                raise UserError(
                    f"another run is at work in {self.place} ({who}); wait until it is done, stop it, or give another "
                    f"--results; one that was killed is forgotten after {GONE_SECONDS} seconds"
                )
            with suppress(Exception):  # of those that were killed
                self.objects.delete(other for other in self.objects.versions(_DRIVERS) if other != name)
            threading.Thread(target=beat, daemon=True).start()
            yield
        finally:
            over.set()
            with suppress(Exception):
                self.objects.delete([name])

    def running(self, pattern: str = f".*.{_ATTEMPT}.partial") -> list[tuple[str, Mapping[str, Any], float]]:
        return super().running(pattern)

    def driver(self) -> Mapping[str, Any] | None:
        with self._reached("read"):
            return next(iter(self._drivers(datetime.now(timezone.utc))), None)

    def check_writable(self) -> None:
        name = f"{_DRIVERS}.{secrets.token_hex(4)}"
        with self._reached("written to"):
            self.objects.write(name, None)
            self.objects.delete([name])

    def _commit(self, folder: Path, result: Result) -> Result:
        """May be done again after it failed halfway."""
        trial, done = result.trial, result.status == "done"
        final, remains = f"trials/{trial.id}/", _remains(trial)
        self._mirror(final, lambda name: name == f"{final}result.json")
        known = self.read(trial)
        if not (known and known.status == "done"):
            begun_by = self.objects.read(remains + _BEGUN_BY)
            if begun_by and json.loads(begun_by) != folder.name and folder.name != Path(remains).name:
                raise _SupersededError("another process has begun this trial since: what that leaves counts")
            # First of all the result, if one has failed: without it the rest is nothing.
            before = self.objects.versions(final)
            self.objects.delete(sorted(before, key=lambda name: name != f"{final}result.json"))
            files = [path for path in folder.rglob("*") if path.is_file() and path.name != "result.json"]
            names = {path: path.relative_to(folder).as_posix() for path in files}
            needless = (PROGRESS, _BEGUN_BY, *([f"{CHECKPOINTS}/*"] if done else ()))
            kept = [path for path in files if not any(fnmatch(names[path], pattern) for pattern in needless)]
            _each(lambda path: self.objects.upload(path, final + names[path]), kept)
            self.objects.upload(folder / "result.json", f"{final}result.json")
            known = result
        self.objects.delete(self.objects.versions(remains))
        return known

    def _share(self, trial: Trial, folder: Path, sent: dict[str, object]) -> None:
        """Upload what is new of an attempt; `sent` says what has been, and is told."""
        there = [path for path in (folder / "log.txt", folder / PROGRESS) if path.exists()]
        saved = sorted((folder / CHECKPOINTS).glob("[!.]*"))
        for path in (*saved, *there):
            name = _remains(trial) + path.relative_to(folder).as_posix()
            with suppress(FileNotFoundError):  # a checkpoint gives way to a newer one
                about = path.stat()
                version = True if path in saved else (about.st_size, about.st_mtime_ns)  # named by their content
                if sent.get(name) != version:
                    self.objects.upload(path, name)
                    sent[name] = version
        kept = {_remains(trial) + path.relative_to(folder).as_posix() for path in saved}
        for name in [name for name in sent if f"/{CHECKPOINTS}/" in name and name not in kept]:
            self.objects.delete([name])
            del sent[name]

    def _mirror(self, prefix: str, wanted: Callable[[str], bool]) -> None:
        """Make what is wanted of all that begins with a prefix in the mirror what it is at the URL."""
        self.root.mkdir(parents=True, exist_ok=True)
        with FileLock(self.root / f"{_MIRRORED}.lock"):
            kept: dict[str, str] = _json(self.root / _MIRRORED) or {}
            there = self.objects.versions(prefix)

            def take(name: str) -> None:
                with suppress(FileNotFoundError):  # it was there a moment ago
                    self.objects.download(name, self.root / name)
                    if PurePosixPath(name).name == PROGRESS:  # since when it is silent
                        when = self.objects.modified(name).timestamp()
                        os.utime(self.root / name, (when, when))
                    kept[name] = there[name]

            new = [n for n in there if wanted(n) and (kept.get(n) != there[n] or not (self.root / n).exists())]
            try:
                _each(take, new)
                for name in [name for name in kept if name.startswith(prefix) and name not in there]:
                    path = self.root / name
                    path.unlink(missing_ok=True)
                    del kept[name]
                    with suppress(OSError):  # as long as they are empty
                        for folder in path.relative_to(self.root).parents[:-1]:
                            (self.root / folder).rmdir()
            finally:
                write_whole(self.root / _MIRRORED, json.dumps(kept))

    def _drivers(self, now: datetime, besides: str = "") -> list[Mapping[str, Any]]:
        """What the processes say of themselves that start trials here, and have given a sign of life lately."""
        alive = []
        for name in self.objects.versions(_DRIVERS):
            with suppress(FileNotFoundError):
                if name == besides or not name.endswith(".json"):
                    continue
                told = {}
                with suppress(ValueError):  # it writes just now
                    told = json.loads(self.objects.read(name) or "{}")
                told = told if isinstance(told, dict) else {}
                if now - self.objects.modified(name) < timedelta(seconds=GONE_SECONDS) and not is_gone(told):
                    alive.append(told)
        return alive

    @contextmanager
    def _reached(self, what: str) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            hint = "is it there, and are you let in?"
            raise UserError(f"{self.place} cannot be {what} ({_brief(error)}); {hint}") from error


class _SupersededError(OSError):
    """It would be the same if it were tried again."""


def _remains(trial: Trial) -> str:
    """Where an attempt at a trial leaves what the next one goes on from."""
    return f"trials/.{trial.id}.{_ATTEMPT}.partial/"


def _is_of(name: str, trials: Collection[str], but: Collection[str]) -> bool:
    _, trial, *rest = PurePosixPath(name).parts
    file = "/".join(rest)
    return trial in trials and not any(fnmatch(file, pattern) for pattern in but)


def _persistently(do: Callable[[], T]) -> T:
    """What it returns, in the end. Raises OSError, as a disk does: every kind of storage has errors of its own."""
    for pause in (*PAUSES, None):
        try:
            return do()
        except _SupersededError:
            raise
        except Exception as error:
            if pause is None:
                raise OSError(_brief(error)) from error
            time.sleep(pause)
    raise AssertionError


def _each(do: Callable[[Any], None], items: Collection[Any]) -> None:
    with ThreadPoolExecutor(max_workers=8) as threads:
        for _ in threads.map(do, items):
            pass


def _version(about: Mapping[str, Any]) -> str:
    told = sorted((key, str(value)) for key, value in about.items())
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


def _is_plain(name: str) -> bool:
    """Whether it names a file below the folder that it is joined to, whoever has chosen it."""
    path = PurePosixPath(name)
    leads_away = path.is_absolute() or ".." in path.parts or "\\" in name
    return name == path.as_posix() and not leads_away and path.parts[0][: len(_MIRRORED)] != _MIRRORED


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
