"""The RefCOCO family's files: where they are published, and how they come into the data folder.

A file is fetched or taken from an archive at hand, and what is there already is left as it is.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import constants

from ris_bench.data import archives
from ris_bench.data.archives import Report
from ris_bench.data.dataset import Dataset
from ris_bench.data.download import UnavailableError, digest, download
from ris_bench.data.refer import IMAGE_FOLDERS, ReferDataset
from ris_bench.errors import UserError

DOWNLOADS = "downloads"
"""Where in the data folder an archive lies until it is unpacked."""


@dataclass(frozen=True)
class Release:
    """A file as it is published: a zip archive, or one file of the data folder itself."""

    name: str
    urls: tuple[str, ...]
    """In the order in which they are asked."""
    sha256: str
    size: int | None
    """In bytes; None is not known."""
    folder: str
    """Where its files belong. An archive has them in a folder of the same name."""
    files: re.Pattern[str]
    """The names of those that are used."""
    most: int = 1 << 30
    """Bytes that they may come to when unpacked."""

    @property
    def is_archive(self) -> bool:
        return self.name.endswith(".zip")


def _refer(folder: str, snapshot: str, partitions: str, size: int, sha256: str) -> Release:
    name = f"{folder}.zip"
    original = f"https://bvisionweb1.cs.unc.edu/licheng/referit/data/{name}"
    urls = (f"https://web.archive.org/web/{snapshot}id_/{original}", original)
    files = re.compile(rf"instances\.json|refs\((?:{partitions})\)\.p")
    return Release(name, urls, sha256, size, folder, files)


def _grefcoco(name: str, sha256: str) -> Release:
    repository = f"{constants.ENDPOINT}/datasets/FudanCVL/gRefCOCO"
    url = f"{repository}/resolve/81eede59b3ac070049f597d023c0ff08d1fb80e9/{quote(name)}"
    return Release(name, (url,), sha256, None, "grefcoco", re.compile(re.escape(name)))


ANNOTATIONS = (
    _refer(
        "refcoco",
        "20220413011718",
        "unc|google",
        53_993_993,
        "7f924bb7ed8dc4568058e4ff626281918d56e5206f4c868c5a80f088f38c8bf0",
    ),
    _refer(
        "refcoco+",
        "20220413011656",
        "unc",
        45_613_210,
        "5f1238112d63199e68da54a28f201471909b21ded7ed79a57d51b4c1443c6b45",
    ),
    _refer(
        "refcocog",
        "20220413012904",
        "umd|google",
        56_712_951,
        "3d1f7e5b2ff2205940bf59de55f861f5f2cc1403fb980669933a7f9af1aa8211",
    ),
    _grefcoco("instances.json", "7f86adb7f4c39db19c7f02a3cc604d17f8016e4c4e8312652d0acc4eae3a2cbd"),
    _grefcoco("grefs(unc).json", "cc37c5ff95373c78a6a3f98b4c7bc67fde387ea8514752a1392db64223eb3366"),
)
"""The server of the REFER archives is gone; lichengunc/refer issues #14 and #26 name the snapshots. Sizes and sha256:
TarunTomar122/attention-is-all-you-need-for-vlms docs/datasets.md, and others agree. gRefCOCO's files are those of its
revision on the Hugging Face hub; public code that pins it gives their sha256."""

IMAGES = Release(
    "train2014.zip",
    (
        "http://images.cocodataset.org/zips/train2014.zip",
        "https://s3.amazonaws.com/images.cocodataset.org/zips/train2014.zip",
    ),
    "ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775",
    13_510_573_713,
    IMAGE_FOLDERS[0],
    re.compile(r"COCO_train2014_\d{12}\.jpg"),
    most=20 << 30,
)
"""Size and sha256: tensorflow/datasets tensorflow_datasets/url_checksums/coco.txt:4."""


def prepare(dataset: Dataset, data: Path, given: Sequence[Path] = (), report: Report = lambda *_: None) -> list[str]:
    """Bring what the dataset lacks into the data folder; returns what was brought, a line for each file it came from.

    `given` are archives, or folders in which they have their published names; what these do not hold is downloaded.
    Raises UserError for a dataset that is not published as files, for archives that are of no use or do harm, where the
    disk is too small, and where a file cannot be had: then it says what to get from where.
    """
    data = Path(data)
    sources = [_published(source) for source in dataset.sources]
    folders = {source.folder for source in sources}
    releases = [*(release for release in ANNOTATIONS if release.folder in folders), IMAGES]
    brought, failed = [], {}
    try:
        at_hand = _at_hand(given, releases, dataset.name, report)
        with _alone(data):
            for release in releases:
                for path in at_hand[release]:
                    if _is_lacking(release, sources, data):
                        brought += _install(path, release, data, report)
                if _is_lacking(release, sources, data):
                    try:
                        path = _download(release, data / DOWNLOADS, report)
                    except UnavailableError as error:
                        failed[release] = str(error)
                    else:
                        brought += _install(path, release, data, report)
                        path.unlink()
            with suppress(OSError):
                (data / DOWNLOADS).rmdir()  # where nothing is left in it
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"{error.filename or data} cannot be read or written ({reason}); see to that and run it again"
        ) from error
    if failed:
        raise UserError(_advice(failed, data))
    return brought


def _published(source: Dataset) -> ReferDataset:
    folders = [release.folder for release in ANNOTATIONS]
    if isinstance(source, ReferDataset) and source.home is None and source.folder in folders:
        return source
    raise UserError(f"{source.name} has no published files to prepare; {', '.join(dict.fromkeys(folders))} have")


@contextmanager
def _alone(data: Path) -> Iterator[None]:
    """Two that write to one folder would spoil each other's files."""
    data.mkdir(parents=True, exist_ok=True)
    folder = os.open(data, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another `ris-bench data prepare` is at work in {data}; wait until it is done") from None
        yield
    finally:
        os.close(folder)


def _at_hand(
    given: Sequence[Path], releases: Sequence[Release], dataset: str, report: Report
) -> dict[Release, list[Path]]:
    """Which of the files that the user has hold what of the dataset."""
    found: dict[Release, list[Path]] = {release: [] for release in releases}
    for path in map(Path, given):
        if not path.exists():
            raise UserError(f"{path} is not there: --archives takes files, or folders that hold them")
        held = []
        for release in releases:
            candidate = path / release.name if path.is_dir() else path
            if candidate.is_file() and _holds(candidate, release, report):
                found[release].append(candidate)
                held.append(release)
        if not held:
            names = ", ".join(release.name for release in releases)
            raise UserError(f"{path} has nothing of {dataset}, which is published as {names}")
    return found


def _holds(path: Path, release: Release, report: Report) -> bool:
    if not release.is_archive:
        # Other datasets have files of that name.
        return path.name == release.name and digest(path, report) == release.sha256
    if path.suffix == ".json":
        return False
    with archives.opened(path) as archive:
        return bool(_members(archive, release))


def _members(archive: zipfile.ZipFile, release: Release) -> dict[str, zipfile.ZipInfo]:
    return archives.members(archive, Path(release.folder).name, release.files)


def _is_lacking(release: Release, sources: Sequence[ReferDataset], data: Path) -> bool:
    """Whether the data folder is without something that a source needs from the file."""
    if release is IMAGES:
        return _is_lacking_images([data / source.folder / "instances.json" for source in sources], data)
    for source in sources:
        for name in ("instances.json", *(f"{source.stem}({source.partition}).{suffix}" for suffix in ("p", "json"))):
            path = data / source.folder / name
            if source.folder == release.folder and release.files.fullmatch(name) and not _is_there(path):
                return True
    return False


def _is_there(path: Path) -> bool:
    """Also in the other of the two forms that referents are read from."""
    return path.is_file() or path.stem != "instances" and any(path.with_suffix(s).is_file() for s in (".p", ".json"))


def _is_lacking_images(instances: Sequence[Path], data: Path) -> bool:
    folder = _image_folder(data)
    if not folder.is_dir():
        return True
    wanted: set[bytes] = set()
    for path in instances:
        if path.is_file() and path.stat().st_size:
            # Parsed it would take a gigabyte, for the sake of a few names.
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
                wanted.update(found[0] for found in re.finditer(IMAGES.files.pattern.encode(), text))
    return bool(wanted - set(os.listdir(os.fsencode(folder))))


def _image_folder(data: Path) -> Path:
    """Where the images are, or are to be."""
    return next((data / folder for folder in IMAGE_FOLDERS if (data / folder).is_dir()), data / IMAGE_FOLDERS[0])


def _download(release: Release, folder: Path, report: Report) -> Path:
    """The file, downloaded now or by a run that was stopped before it was unpacked."""
    path = folder / release.name
    folder.mkdir(exist_ok=True)
    if path.exists() and digest(path, report) == release.sha256:
        return path
    if release.size and release.is_archive:
        # Known before hours of waiting: it needs the same again for its files.
        part = path.with_name(f"{path.name}.part")
        held = part.stat().st_size if part.exists() else 0
        archives.require_space(folder, 2 * release.size - held, f"{release.name} with its files")
    download(release.urls, path, release.size, release.sha256, report)
    return path


def _install(path: Path, release: Release, data: Path, report: Report) -> list[str]:
    """Put the files of an archive, or the file itself, where they belong and are not yet; all at once, or none."""
    target = (_image_folder(data) if release is IMAGES else data / release.folder).resolve()
    unfinished = target.with_name(f".{target.name}.unfinished")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(unfinished, ignore_errors=True)  # a run may have been killed here
    unfinished.mkdir()
    try:
        if release.is_archive:
            with archives.opened(path) as archive:
                members = _members(archive, release)
                chosen = {name: member for name, member in members.items() if not (target / name).exists()}
                needed = archives.unpacked_size(archive, chosen, release.most)
                archives.require_space(unfinished, needed, f"what is in {path.name}")
                archives.unpack(archive, chosen, unfinished, report)
        elif not (target / path.name).exists():
            archives.require_space(unfinished, path.stat().st_size, path.name)
            shutil.copyfile(path, unfinished / path.name)
        names = sorted(os.listdir(unfinished))
        if target.exists():
            for name in names:
                (unfinished / name).rename(target / name)
        elif names:
            unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    what = ", ".join(names) if len(names) < 5 else f"{len(names):,} files"
    return [f"{target}: {what} from {path.name}"] if names else []


def _advice(failed: Mapping[Release, str], data: Path) -> str:
    reasons = "; ".join(f"{release.name} cannot be downloaded ({reason})" for release, reason in failed.items())
    ways = ", ".join(
        f"{release.urls[0]} ({f'{release.size:,} bytes, ' if release.size else ''}for {data / release.folder})"
        for release in failed
    )
    again = "--archives FILE ..., or run it again: it goes on where it ended"
    return f"{reasons}: get {ways} by other means and give what you have got to the same command as {again}"
