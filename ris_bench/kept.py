"""What can be worked out again, kept on disk for all processes of a machine.

A folder is named after all that its content depends on, and has that name only when it is complete. Who uses one holds
its lock, which ends with the process, however that ends. Where room is needed, what nobody holds gives way: what killed
processes have left, and then what was used longest ago.
"""

from __future__ import annotations

import fcntl
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from filelock import FileLock

WAIT_SECONDS = 0.1
"""Between two looks whether another process is ready."""


class Room:
    """A folder for what is kept, of so many bytes at most: with 0 nothing is. What was got stays until it is closed."""

    def __init__(
        self,
        folder: Path,
        bytes: int,
        log: Callable[[str], None] = lambda line: None,
        report: Callable[[], None] = lambda: None,
    ) -> None:
        """`log` is told in a line what was made or left out; `report` is called now and then in work or waiting."""
        self._folder, self._bytes, self._log, self._report = folder, bytes, log, report
        self._held = ExitStack()
        self.left_out: list[str] = []
        """A line for each thing that there was no room for."""

    def __bool__(self) -> bool:
        return self._bytes > 0

    def __enter__(self) -> Room:
        return self

    def __exit__(self, *error: object) -> None:
        self._held.close()

    def get(
        self, name: str, what: str, size: int, make: Callable[[], Iterable[Mapping[str, memoryview]]]
    ) -> Path | None:
        """The folder of a name. Where nobody has made it, `make` yields what comes next in each of its files, `size`
        bytes in all; who asks for it meanwhile waits.

        None where there is no room for it in what is allowed or on the disk, or the folder cannot be written. Then this
        is said, of `what`.
        """
        if not self:
            return None
        folder = self._folder / name
        with ExitStack() as stack:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context(_opened(self._lock(name)))
                self._wait(lock, fcntl.LOCK_SH)
                while not folder.is_dir():
                    # Not from one to the other at once: two would wait for each other.
                    fcntl.flock(lock, fcntl.LOCK_UN)
                    self._wait(lock, fcntl.LOCK_EX)
                    if not folder.is_dir():
                        self._make(folder, size, make)
                        self._log(f"{what}, {_gigabytes(size)}, kept in {folder}")
                    self._wait(lock, fcntl.LOCK_SH)
                os.utime(folder)  # used last
            except OSError as error:
                self.left_out.append(f"{what} are not kept, and worked out anew every time: {error}")
                self._log(self.left_out[-1])
                return None
            self._held.enter_context(stack.pop_all())
        return folder

    def _lock(self, name: str) -> Path:
        return self._folder / f"{name}.lock"

    def _wait(self, lock: int, how: int) -> None:
        while not _locked(lock, how):
            self._report()
            time.sleep(WAIT_SECONDS)

    def _make(self, folder: Path, size: int, make: Callable[[], Iterable[Mapping[str, memoryview]]]) -> None:
        temporary = self._folder / f".{folder.name}.{size}"
        with self._changed():
            # Remains of a process that was killed: this one has the lock.
            for remains in self._folder.glob(f".{folder.name}.*"):
                shutil.rmtree(remains)
            self._make_room(size)
            temporary.mkdir()  # from now on it is counted
        try:
            with ExitStack() as stack:
                files = {}
                for part in make():
                    for name, content in part.items():
                        if name not in files:
                            files[name] = stack.enter_context(open(temporary / name, "wb"))
                        files[name].write(content)
                    self._report()
                for file in files.values():
                    file.flush()
                    os.fsync(file.fileno())
            with self._changed():
                temporary.rename(folder)
        except BaseException:
            with self._changed():
                shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _changed(self) -> FileLock:
        """For as long as it is held, no other process lets a folder come or go."""
        return FileLock(self._lock("room"))

    def _make_room(self, size: int) -> None:
        """Throw out as little as makes room for `size` more bytes; OSError, and nothing is lost, if that cannot be."""
        wanted, allowed = f"they take {_gigabytes(size)}", f"--feature-cache allows {_gigabytes(self._bytes)}"
        if size > self._bytes:
            raise OSError(f"{wanted}, and {allowed}")
        in_use = 0
        idle: dict[Path, int] = {}
        with ExitStack() as stack:
            for path in self._folder.glob("*.lock"):  # what has none is not ours
                unfinished = list(self._folder.glob(f".{path.stem}.*"))
                folders = list(filter(Path.is_dir, [self._folder / path.stem]))
                kept = sum(file.stat().st_size for folder in folders for file in folder.iterdir())
                if not _locked(stack.enter_context(_opened(path)), fcntl.LOCK_EX):
                    in_use += kept + sum(int(folder.name.rpartition(".")[2]) for folder in unfinished)
                    continue
                for folder in unfinished:
                    shutil.rmtree(folder)
                idle |= dict.fromkeys(folders, kept)
            if in_use + size > self._bytes:
                raise OSError(f"{wanted}, and {allowed}, of which {_gigabytes(in_use)} are in use")
            free = shutil.disk_usage(self._folder).free
            if size > free + sum(idle.values()):
                raise OSError(f"{wanted}, and the disk of {self._folder} has {_gigabytes(free)} free")
            for folder in sorted(idle, key=lambda folder: folder.stat().st_mtime):
                if in_use + sum(idle.values()) + size <= self._bytes and size <= shutil.disk_usage(self._folder).free:
                    break
                # Half of it, if this process is killed, must not have its name.
                shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}.{idle.pop(folder)}")))


class Mapped:
    """A tensor that is a whole file; it is read where it is looked at, and pickled by the name of the file."""

    def __init__(self, path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self._given = path, dtype, shape
        self.tensor = torch.from_file(str(path), shared=False, size=math.prod(shape), dtype=dtype).view(shape)

    def __reduce__(self) -> tuple[type[Mapped], tuple[Path, torch.dtype, tuple[int, ...]]]:
        return Mapped, self._given


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _locked(lock: int, how: int) -> bool:
    """Whether it could be locked, now."""
    try:
        fcntl.flock(lock, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _gigabytes(number: int) -> str:
    return f"{number / 1e9:.3g} GB"
