"""`data prepare`: downloads are resumed and bounded, archives are safe or refused, and what is there stays as it is."""

import contextlib
import copy
import fcntl
import hashlib
import http.server
import io
import os
import random
import re
import shutil
import stat
import struct
import threading
import time
import tracemalloc
import zipfile
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import replica

from ris_bench import cli
from ris_bench.data import archives, download, prepare, refcoco
from ris_bench.data.check import check
from ris_bench.data.dataset import DATASETS, named
from ris_bench.data.refer import ReferDataset
from ris_bench.errors import UserError

NAMES = [name for name in DATASETS if name not in ("mixed", "own", "scenes")]
BODY = bytes(range(256)) * 1000
SHA256 = hashlib.sha256(BODY).hexdigest()


def quiet(*_: object) -> None:
    """A report that nobody reads."""


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.files` with ranges, each request spoilt by the next of `server.faults`."""

    def do_GET(self) -> None:
        fault = self.server.faults.pop(0) if self.server.faults else ""
        asked = self.headers.get("Range"), self.headers.get("If-Range")
        self.server.requests.append((self.path, *asked))
        body = self.server.files.get(self.path)
        if body is None or isinstance(fault, int):
            return self.send_error(fault or 404)
        start = 0
        if asked[0] and asked[1] in (None, self.server.tag) and "deaf" not in str(fault):
            start = int(asked[0].removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            begins = start + 7 if fault == "elsewhere" else start
            self.send_header("Content-Range", f"bytes {begins}-{len(body) - 1}/{len(body)}")
        lengths = {"silent": None, "endless": None, "vast": 10**17, "nonsense": "9" * 5000}
        if (length := lengths.get(fault, len(body) - start)) is not None:
            self.send_header("Content-Length", str(length))
        self.send_header("Content-Type", "text/html; charset=utf-8" if fault == "login" else "application/zip")
        self.send_header("ETag", self.server.tag)
        self.end_headers()
        if fault == "trickle":
            for byte in body:
                self.wfile.write(bytes([byte]))
                time.sleep(0.01)
        if fault == "endless":
            while True:
                self.wfile.write(body)
        self.wfile.write(body[start : start + 100_000] if "cut" in fault else body[start:])
        return None

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # whoever asked has gone
            super().handle()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "PAUSE", 0)
    monkeypatch.setattr(download, "STEP", 1000)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.faults, server.requests, server.tag = {"/f": BODY}, [], [], '"one"'
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def fetch(server, folder: Path, *, size: int | None = len(BODY), paths: tuple[str, ...] = ("/f",)) -> bytes:
    path = folder / "f"
    download.download([server.url + path for path in paths], path, size, SHA256, quiet)
    assert os.listdir(folder) == ["f"]
    return path.read_bytes()


@pytest.mark.parametrize("size", [len(BODY), None])
@pytest.mark.parametrize("faults", [(), ("silent",), ("cut", "cut"), ("cut", "deaf"), (500, "cut", 503, 429)])
def test_a_download_arrives_whole(faults, size, server, tmp_path) -> None:
    server.faults += faults
    assert fetch(server, tmp_path, size=size) == BODY
    assert len(server.requests) == len(faults) + (faults != ("silent",) and faults != ("cut", "deaf"))


def test_a_server_that_sends_byte_by_byte_is_given_up(server, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(download, "WINDOW", 0.2)
    server.faults += ["trickle"] * download.TRIES
    with pytest.raises(download.UnavailableError, match="less than 65,536 bytes in 0.2 seconds, and 5 tries"):
        fetch(server, tmp_path)
    assert len(server.requests) == download.TRIES
    server.faults += ["trickle"]  # once only: the rest comes with the next try
    assert fetch(server, tmp_path) == BODY


def test_a_cut_download_goes_on_where_it_was(server, tmp_path) -> None:
    server.faults += ["cut", "cut"]
    fetch(server, tmp_path)
    assert [request[1] for request in server.requests] == [None, "bytes=100000-", "bytes=200000-"]
    assert [request[2] for request in server.requests] == [None, '"one"', '"one"']


def test_another_version_is_fetched_from_its_start(server, tmp_path) -> None:
    server.files["/f"] = bytes(len(BODY))
    server.faults += ["cut"]

    def change(name: str, done: int, total: int | None) -> None:
        server.files["/f"], server.tag = BODY, '"two"'

    download.download([f"{server.url}/f"], tmp_path / "f", len(BODY), SHA256, change)
    assert (tmp_path / "f").read_bytes() == BODY
    assert [request[1:] for request in server.requests] == [(None, None), ("bytes=100000-", '"one"')]


@pytest.mark.parametrize(
    "left, ranges",
    [
        (BODY[:5000], ["bytes=5000-"]),
        (BODY, []),
        (bytes(5000), ["bytes=5000-", None]),
        (bytes(len(BODY)), [None]),
        (bytes(len(BODY) + 5), ["bytes=256005-", None]),
    ],
)
def test_what_an_earlier_run_left(left, ranges, server, tmp_path) -> None:
    (tmp_path / "f.part").write_bytes(left)
    assert fetch(server, tmp_path) == BODY
    assert [request[1] for request in server.requests] == ranges


@pytest.mark.parametrize("fault", ["elsewhere", 416])
def test_a_range_that_was_not_asked_for_is_not_taken(fault, server, tmp_path) -> None:
    server.faults += ["cut", fault]
    assert fetch(server, tmp_path) == BODY
    assert [request[1] for request in server.requests] == [None, "bytes=100000-", None]


@pytest.mark.parametrize(
    "faults, size, message, requests",
    [
        ([404], len(BODY), "it answers 404 Not Found", 1),
        ([403], len(BODY), "it answers 403 Forbidden", 1),
        ([500] * 9, len(BODY), "it answers 500 Internal Server Error, and 5 tries brought no more", 5),
        (["login"], len(BODY), "it answers with a web page", 1),
        (["vast"], len(BODY), "its file has 100,000,000,000,000,000 bytes, and the original 256,000", 1),
        (["vast"], None, "its file has 100,000,000,000,000,000 bytes", 1),
        ([], len(BODY) + 1, "its file has 256,000 bytes, and the original 256,001", 1),
        (["endless"], None, "what it sends has the sha256", 1),
        (["deaf"] + ["cut"] * 9, 10**6, "its file has 256,000 bytes, and the original 1,000,000", 1),
    ],
)
def test_an_address_that_does_not_give_the_file(faults, size, message, requests, server, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(download, "MOST", 10**6)
    server.faults += faults
    with pytest.raises(download.UnavailableError, match=re.escape(f"127.0.0.1:{server.server_port}: {message}")):
        fetch(server, tmp_path, size=size)
    assert len(server.requests) == requests and not os.listdir(tmp_path)


@pytest.mark.parametrize("fault", ["endless", "nonsense"])
def test_headers_are_not_relied_on(fault, server, tmp_path) -> None:
    server.faults += [fault]
    assert fetch(server, tmp_path) == BODY


def test_another_file_of_the_same_size_is_not_kept(server, tmp_path) -> None:
    server.files["/f"] = bytes(len(BODY))
    with pytest.raises(download.UnavailableError, match=f"has the sha256 .* instead of {SHA256}"):
        fetch(server, tmp_path)
    assert not os.listdir(tmp_path)


def test_a_second_address_goes_on_with_what_the_first_gave(server, tmp_path) -> None:
    server.files["/mirror"] = BODY
    server.faults += ["cut", 404]
    assert fetch(server, tmp_path, paths=("/f", "/mirror")) == BODY
    assert server.requests[1:] == [("/f", "bytes=100000-", '"one"'), ("/mirror", "bytes=100000-", None)]


def test_tries_that_bring_nothing_new_are_counted(server, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(download, "STEP", 10**5)
    server.faults += ["cut"] + ["deaf and cut"] * 50
    with pytest.raises(download.UnavailableError, match="it ended after 100,000 of 256,000 bytes, and 5 tries"):
        fetch(server, tmp_path)
    assert len(server.requests) == 5


def test_a_full_disk_is_noticed_before_it_is_full(server, tmp_path, monkeypatch) -> None:
    fill(monkeypatch, 1000)
    with pytest.raises(UserError, match="f needs 256,000 bytes and the disk of .* has 1,000: make room"):
        fetch(server, tmp_path)
    assert not os.listdir(tmp_path)


def fill(monkeypatch, free: int) -> None:
    usage = namedtuple("usage", "total used free")(10**12, 0, free)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)


# Archives


def entry(name: str, mode: int = 0) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    info.compress_type = zipfile.ZIP_DEFLATED
    return info


def packed(*entries: tuple[str | zipfile.ZipInfo, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in (("refcoco/instances.json", b'{"images": []}'), *entries):
            archive.writestr(name, content)
    return file.getvalue()


def claiming(content: bytes, size: int) -> bytes:
    """An archive of refs(unc).p that says it has another size, in both its headers."""
    whole = packed(("refcoco/refs(unc).p", content))
    said, others = struct.pack("<L", len(content)), struct.pack("<L", size)
    assert whole.count(said) == 2
    return whole.replace(said, others)


def encrypted() -> bytes:
    whole = bytearray(packed(("refcoco/refs(unc).p", b"secret")))
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        whole[whole.rfind(signature) + flags] |= 1
    return bytes(whole)


def with_flipped_bit() -> bytes:
    whole = bytearray(packed(("refcoco/refs(unc).p", NOISE)))
    whole[whole.find(b"refs(unc).p") + 500] ^= 1
    return bytes(whole)


NOISE = random.Random(0).randbytes(77_777)
BAD = {
    "above its folder": (lambda: packed(("../evil", b"")), "its entry ../evil leads out of the folder"),
    "above, further down": (lambda: packed(("refcoco/../../evil", b"")), "leads out of the folder"),
    "above, in Windows": (lambda: packed(("refcoco\\..\\..\\evil", b"")), "leads out of the folder"),
    "an absolute name": (lambda: packed(("/etc/evil", b"")), "its entry /etc/evil leads out of the folder"),
    "a drive": (lambda: packed(("C:\\evil", b"")), "leads out of the folder"),
    "a symbolic link": (
        lambda: packed((entry("refcoco/refs(unc).p", stat.S_IFLNK | 0o777), b"/etc/passwd")),
        "its entry refcoco/refs(unc).p is a link or a device",
    ),
    "a device": (lambda: packed((entry("refcoco/null", stat.S_IFCHR), b"")), "is a link or a device"),
    "a bomb": (lambda: packed(("refcoco/refs(unc).p", bytes(50 << 20))), "bytes would become 52,428,8"),
    "a bomb of 10,000 times its size": (lambda: claiming(b"x" * 77_777, 10**7), "bytes would become 10,000,0"),
    "a bomb that says it is small": (
        lambda: claiming(bytes(50 << 20), 999),
        "is no zip archive or damaged (BadZipFile",
    ),
    "a bomb of another kind": (
        lambda: packed(("refcoco/refs(unc).p", bytes(50 << 20)), method=zipfile.ZIP_BZIP2),
        "is compressed by bzip2, not deflate",
    ),
    "less than it says": (lambda: claiming(NOISE, 77_888), "has 77,777 bytes and says 77,888"),
    "a name twice": (lambda: packed(("x/refcoco/instances.json", b"{}")), "it has refcoco/instances.json twice"),
    "a password": (encrypted, "its entry refcoco/refs(unc).p is encrypted"),
    "a flipped bit": (with_flipped_bit, "is no zip archive or damaged"),
    "half of it": (lambda: packed(("a", NOISE))[:700], "is no zip archive or damaged (BadZipFile"),
    "no end": (lambda: packed()[:-1], "is no zip archive or damaged"),
    "a web page": (
        lambda: b"<html>Sign in</html>",
        "is no zip archive or damaged (BadZipFile: File is not a zip file)",
    ),
    "nothing": (lambda: b"", "is no zip archive or damaged"),
    "a directory without end": (
        lambda: packed(*((f"{i:03}" + "n" * 65000, b"") for i in range(30))),
        "is no zip archive or damaged (BadZipFile: its list of entries takes 1,95",
    ),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", BAD)
def test_a_harmful_archive_is_refused_and_leaves_nothing(name: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(archives, "LARGEST_DIRECTORY", 1 << 20)
    make, message = BAD[name]
    archive, data = tmp_path / "refcoco.zip", tmp_path / "data"
    archive.write_bytes(make())
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=re.escape(message)):
            prepare.prepare(named("refcoco"), data, [archive])
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()
    assert not data.exists() or not os.listdir(data)
    assert sorted(os.listdir(tmp_path)) in (["refcoco.zip"], ["data", "refcoco.zip"])


def test_many_entries_and_others_than_are_needed(tmp_path) -> None:
    path, folder = tmp_path / "a.zip", tmp_path / "out"
    junk = ["__MACOSX/refcoco/._instances.json", "refcoco/.DS_Store", "refcoco/readme/", "other/refs(unc).p"]
    path.write_bytes(packed(*((name, b"") for name in junk)))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("last", b"")
        for i in range(100_000):
            archive.filelist.append(copy.copy(archive.filelist[-1]))
            archive.filelist[-1].filename = f"n/{i}"
    folder.mkdir()
    with archives.opened(path) as archive:
        assert len(archive.infolist()) == 100_006
        found = archives.members(archive, "refcoco", re.compile(r"instances\.json|refs\((unc|google)\)\.p"))
        assert list(found) == ["instances.json"] and archives.unpacked_size(archive, found, 1000) == 14
        archives.unpack(archive, found, folder, quiet)
    assert os.listdir(folder) == ["instances.json"]


# From archives to a dataset that passes `data check`


@pytest.fixture
def world(server, tmp_path, monkeypatch):
    """Makes a replica of a dataset and publishes it on the server; gives the dataset and the folder of its releases."""

    def publish(name: str) -> tuple[ReferDataset, Path]:
        original, releases = tmp_path / "original", tmp_path / "releases"
        dataset = replica.write(named(name), original, json_refs=name == "grefcoco")
        releases.mkdir()

        def local(release: prepare.Release) -> prepare.Release:
            path, folder = releases / release.name, original / release.folder
            if release.folder == dataset.folder or release.name == "train2014.zip":
                if release.is_archive:
                    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                        for file in sorted(folder.iterdir()):
                            archive.write(file, f"{folder.name}/{file.name}")
                else:
                    shutil.copy(folder / release.name, path)
                content = server.files[f"/{release.name}"] = path.read_bytes()
                release = replace(release, sha256=hashlib.sha256(content).hexdigest(), size=len(content))
            return replace(release, urls=(f"{server.url}/gone/{release.name}", f"{server.url}/{release.name}"))

        monkeypatch.setattr(prepare, "ANNOTATIONS", tuple(map(local, prepare.ANNOTATIONS)))
        monkeypatch.setattr(prepare, "IMAGES", local(prepare.IMAGES))
        return dataset, releases

    return publish


def contents(data: Path) -> dict[str, bytes]:
    return {str(path.relative_to(data)): path.read_bytes() for path in data.rglob("*") if path.is_file()}


def test_releases_cover_every_dataset() -> None:
    for name in NAMES:
        source = named(name)
        patterns = [release.files for release in prepare.ANNOTATIONS if release.folder == source.folder]
        refs = [f"{source.stem}({source.partition}).{suffix}" for suffix in ("p", "json")]
        for needed in (["instances.json"], refs):
            assert sum(bool(pattern.fullmatch(name)) for pattern in patterns for name in needed) == 1
    for release in (*prepare.ANNOTATIONS, prepare.IMAGES):
        assert re.fullmatch("[0-9a-f]{64}", release.sha256)
        assert all(url.endswith(("/" + release.name, "/grefs%28unc%29.json")) for url in release.urls)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["download", "files", "folder"])
def test_a_dataset_is_prepared_and_passes_the_check(name: str, how: str, world, server, tmp_path) -> None:
    dataset, releases = world(name)
    data = tmp_path / "data"
    given = {"download": [], "files": sorted(releases.iterdir()), "folder": [releases]}[how]
    said = prepare.prepare(named(name), data, given)
    assert len(said) == len(os.listdir(releases)) == (3 if name == "grefcoco" else 2)
    assert contents(data) == contents(tmp_path / "original")
    assert all(row.ok for row in check(dataset, data))
    assert len(server.requests) == (2 * len(said) if how == "download" else 0)
    server.requests.clear()
    assert prepare.prepare(named(name), data) == [] and not server.requests


def test_what_is_there_stays(world, tmp_path) -> None:
    world("refcoco")
    data = tmp_path / "data"
    (data / "refcoco").mkdir(parents=True)
    (data / "refcoco" / "instances.json").write_text("mine")
    images = data / "images" / "mscoco" / "images" / "train2014"
    images.mkdir(parents=True)
    (images / "COCO_train2014_000000000100.jpg").write_text("mine")
    said = prepare.prepare(named("refcoco"), data)
    assert said == [f"{data / 'refcoco'}: refs(unc).p from refcoco.zip"]  # that file names no image
    shutil.copy(tmp_path / "original" / "refcoco" / "instances.json", data / "refcoco")
    said = prepare.prepare(named("refcoco"), data)
    assert said == [f"{images}: 7 files from train2014.zip"]
    assert (images / "COCO_train2014_000000000100.jpg").read_text() == "mine"
    assert len(os.listdir(images)) == 8 and not (data / "images" / "train2014").exists()
    assert sorted(os.listdir(data)) == ["images", "refcoco"]


def test_referents_in_the_other_form_are_there(world, server, tmp_path) -> None:
    world("refcoco")
    data = tmp_path / "data"
    shutil.copytree(tmp_path / "original", data)
    (data / "refcoco" / "refs(unc).p").rename(data / "refcoco" / "refs(unc).json")
    assert prepare.prepare(named("refcoco"), data) == [] and not server.requests


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device", "x.jpg")])
def test_an_interrupted_unpacking_leaves_nothing_and_can_be_repeated(error, world, tmp_path, monkeypatch) -> None:
    dataset, releases = world("refcoco+")
    data = tmp_path / "data"

    def stop(name: str, done: int, total: int | None) -> None:
        if name == "unpacking train2014.zip" and done > total / 2:
            raise error

    with pytest.raises((KeyboardInterrupt, UserError), match=None if error is KeyboardInterrupt else "x.jpg cannot"):
        prepare.prepare(named("refcoco+"), data, [releases], stop)
    assert sorted(os.listdir(data)) == ["images", "refcoco+"] and not os.listdir(data / "images")
    (data / "images" / ".train2014.unfinished" / "of a run that was killed").mkdir(parents=True)
    prepare.prepare(named("refcoco+"), data, [releases])
    assert contents(data) == contents(tmp_path / "original")
    assert all(row.ok for row in check(dataset, data))


def test_a_download_that_was_unpacked_by_no_one_is_used(world, server, tmp_path) -> None:
    _, releases = world("refcoco")
    (tmp_path / "data" / "downloads").mkdir(parents=True)
    for path in releases.iterdir():
        shutil.copy(path, tmp_path / "data" / "downloads")
    (tmp_path / "data" / "downloads" / "refcoco.zip").write_text("half of it")
    prepare.prepare(named("refcoco"), tmp_path / "data")
    assert contents(tmp_path / "data") == contents(tmp_path / "original")
    assert {path for path, *_ in server.requests} == {"/gone/refcoco.zip", "/refcoco.zip"}


def test_without_a_network_it_says_what_to_get_and_where_to_put_it(
    world, server, tmp_path, capsys, monkeypatch
) -> None:
    world("refcoco")
    server.files.clear()
    data = tmp_path / "data"
    assert cli.main(["data", "prepare", "refcoco", "--data", str(data)]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and err.startswith("error: refcoco.zip cannot be downloaded (127.0.0.1")
    for said in (
        "refcoco.zip",
        f"bytes, for {data / 'refcoco'}",
        f"bytes, for {data / 'images/train2014'}",
        "--archives",
    ):
        assert said in err
    assert not os.listdir(data)


def test_a_host_that_is_not_known_is_not_asked_again(server, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(download.time, "sleep", lambda _: pytest.fail("it waits"))
    with pytest.raises(download.UnavailableError, match="^nowhere.invalid: "):
        download.download(["http://nowhere.invalid/f"], tmp_path / "f", None, SHA256, quiet)


def test_the_command_prepares_and_checks(world, tmp_path, capsys, monkeypatch) -> None:
    dataset, releases = world("refcoco")
    arguments = ["data", "prepare", "refcoco", "--data", str(tmp_path / "data"), "--archives", str(releases)]
    assert cli.main(arguments) == 1  # of the replica's counts
    out, err = capsys.readouterr()
    assert "instances.json, refs(unc).p from refcoco.zip" in out and "differs from published" in out
    assert "unpacking train2014.zip: " in err
    monkeypatch.setitem(refcoco.PUBLISHED, "refcoco", dataset.published)
    assert cli.main(arguments) == 0
    assert "holds every file of refcoco" in capsys.readouterr().out


def test_archives_of_no_use(world, tmp_path) -> None:
    world("refcoco")
    (tmp_path / "none").mkdir()
    (tmp_path / "other.zip").write_bytes(packed(("b", b"")).replace(b"refcoco/", b"refclef/"))
    (tmp_path / "instances.json").write_text("{}")
    for name in ("none", "other.zip", "instances.json"):
        with pytest.raises(UserError, match=f"{name} has nothing of refcoco, which is published as refcoco.zip, train"):
            prepare.prepare(named("refcoco"), tmp_path / "data", [tmp_path / name])
    with pytest.raises(UserError, match="has nothing of grefcoco"):  # another dataset's file of that name
        prepare.prepare(named("grefcoco"), tmp_path / "data", [tmp_path / "instances.json"])
    with pytest.raises(UserError, match="gone.zip is not there"):
        prepare.prepare(named("refcoco"), tmp_path / "data", [tmp_path / "gone.zip"])


def test_a_dataset_that_is_not_published(tmp_path) -> None:
    with pytest.raises(UserError, match="scenes has no published files to prepare; refcoco, refcoco.,"):
        prepare.prepare(named("scenes"), tmp_path)


def test_several_at_once(world, tmp_path) -> None:
    world("refcoco")
    mixed = named({"mixed": {"parts": ["refcoco", "refcoco-google"]}})
    replica.write(named("refcoco-google"), tmp_path / "data")
    said = prepare.prepare(mixed, tmp_path / "data")
    assert [line.split(": ")[1] for line in said] == ["refs(unc).p from refcoco.zip"]


def test_two_at_a_time_in_one_folder(world, tmp_path) -> None:
    world("refcoco")
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another `ris-bench data prepare` is at work"):
        prepare.prepare(named("refcoco"), tmp_path)
    os.close(folder)


def test_a_disk_too_small(world, tmp_path, monkeypatch) -> None:
    _, releases = world("refcoco")
    fill(monkeypatch, 1000)
    with pytest.raises(UserError, match="refcoco.zip with its files needs [0-9,]+ bytes and the disk of .* has 1,000"):
        prepare.prepare(named("refcoco"), tmp_path / "data")
    with pytest.raises(UserError, match="what is in refcoco.zip needs [0-9,]+ bytes and the disk of .* has 1,000"):
        prepare.prepare(named("refcoco"), tmp_path / "data", [releases])
    assert not [*(tmp_path / "data").rglob("*.json")]
