"""Zip archives from elsewhere: the members asked for are unpacked, and nothing is taken on trust.

One that was made to do harm ends in a UserError before anything of it is unpacked.
"""

from __future__ import annotations

import io
import re
import shutil
import stat
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from ris_bench.data.untrusted import shown
from ris_bench.errors import UserError

Report = Callable[[str, int, int | None], None]
"""Called with what is done ("unpacking refcoco.zip"), how many bytes of it are, and of how many if that is known."""

CHUNK = 1 << 20
LARGEST_DIRECTORY = 32 << 20
"""Bytes of an archive's list of entries; COCO's train2014.zip has 82,784 of about 120 bytes."""
HIGHEST_RATIO = 200
"""Of what is unpacked to the archive; annotations in JSON come to 10, a bomb of zeros to 1,000 and more."""


class _Reader(io.BufferedReader):
    """A file of which a header cannot make anybody read very much at once."""

    def read(self, size: int | None = -1) -> bytes:
        size = LARGEST_DIRECTORY if size is None or size < 0 else size
        if size > LARGEST_DIRECTORY:
            raise zipfile.BadZipFile(f"its list of entries takes {size:,} bytes")
        return super().read(size)


@contextmanager
def opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """The archive, of which every entry lies below the folder that it is unpacked to and is a file or a folder.

    Raises UserError where that is not so or the archive is damaged.
    """
    with _Reader(io.FileIO(path)) as file:
        with _damage_told(path):
            archive = zipfile.ZipFile(file)
        with archive:
            for entry in archive.infolist():
                name = entry.orig_filename
                if ".." in re.split(r"[/\\]", name) or re.match(r"[/\\]|[A-Za-z]:", name) or "\0" in name:
                    raise _refused(path, f"its entry {shown(name)} leads out of the folder that it is unpacked to")
                if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                    raise _refused(path, f"its entry {shown(name)} is a link or a device")
            yield archive


def members(archive: zipfile.ZipFile, parent: str, names: re.Pattern[str]) -> dict[str, zipfile.ZipInfo]:
    """The files that lie in a folder called `parent`, anywhere in the archive, and are called as asked; by their name.

    Raises UserError where there are two of a name.
    """
    found: dict[str, zipfile.ZipInfo] = {}
    for entry in archive.infolist():
        path = PurePosixPath(entry.filename)
        if path.parent.name == parent and names.fullmatch(path.name) and not entry.is_dir():
            if path.name in found:
                raise _refused(_path(archive), f"it has {parent}/{path.name} twice")
            found[path.name] = entry
    return found


def unpacked_size(archive: zipfile.ZipFile, chosen: Mapping[str, zipfile.ZipInfo], most: int) -> int:
    """Bytes that the members come to when unpacked; UserError for an encrypted one, and where they exceed `most`.

    Entries may share their compressed bytes, so that these are counted as what they are: the whole archive.
    """
    for entry in chosen.values():
        if entry.flag_bits & 0x1:
            raise _refused(_path(archive), f"its entry {shown(entry.filename)} is encrypted")
        # The decoders of the other methods in zipfile put out at once all that a few bytes stand for.
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            method = zipfile.compressor_names.get(entry.compress_type, entry.compress_type)
            raise _refused(_path(archive), f"its entry {shown(entry.filename)} is compressed by {method}, not deflate")
    total = sum(entry.file_size for entry in chosen.values())
    packed = _path(archive).stat().st_size
    if total > most or total > HIGHEST_RATIO * packed:
        raise _refused(_path(archive), f"its {packed:,} bytes would become {total:,}")
    return total


def unpack(archive: zipfile.ZipFile, chosen: Mapping[str, zipfile.ZipInfo], folder: Path, report: Report) -> None:
    """Write the members into an empty folder, each under its name.

    Raises UserError where one is damaged or has another size than it says, and OSError where it cannot be written.
    """
    path = _path(archive)
    total, done = sum(entry.file_size for entry in chosen.values()), 0
    for name, entry in chosen.items():
        before = done
        with (folder / name).open("xb") as file:
            for chunk in _content(archive, entry, path):
                file.write(chunk)
                done += len(chunk)
                report(f"unpacking {path.name}", done, total)
        if done - before != entry.file_size:
            lacks = f"{shown(entry.filename)} has {done - before:,} bytes and says {entry.file_size:,}"
            raise UserError(f"{path} is damaged ({lacks}); download it again")


def require_space(folder: Path, needed: int, purpose: str) -> None:
    """Raises UserError where the disk of the folder has fewer bytes to spare."""
    if (free := shutil.disk_usage(folder).free) < needed:
        raise UserError(f"{purpose} needs {needed:,} bytes and the disk of {folder} has {free:,}: make room")


def _content(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path) -> Iterator[bytes]:
    """Never more than the entry says; zipfile compares the checksum at its end."""
    with _damage_told(path), archive.open(entry) as stream:
        while chunk := stream.read(CHUNK):
            yield chunk


@contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    # A damaged archive can fail in as many ways as zipfile has lines.
    try:
        yield
    except Exception as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{path} is no zip archive or damaged ({shown(text)}); download it again") from error


def _path(archive: zipfile.ZipFile) -> Path:
    return Path(archive.filename)


def _refused(path: Path, why: str) -> UserError:
    return UserError(f"{path} is refused: {why}; use the original archive")
