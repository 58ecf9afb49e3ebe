"""What is kept on disk is whole or not there, made once, and never more than allowed, whoever is killed meanwhile."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ris_bench import kept
from ris_bench.kept import Mapped, Room

# The processes of these tests write files and nothing else, so that a fork will do, which is there at once.
CONTEXT = multiprocessing.get_context("fork")
PARTS, PART = 3, bytes(range(100))
SIZE = 2 * PARTS * len(PART)


def content(before: Callable[[int], None] = lambda number: None) -> Iterator[dict[str, memoryview]]:
    """Of two files, in parts; `before` is called with the number of each."""
    for number in range(PARTS):
        before(number)
        yield {"a": memoryview(PART), "b": memoryview(PART[::-1])}


def get(room: Room, name: str = "set-1", before: Callable[[int], None] = lambda number: None) -> Path | None:
    return room.get(name, "sets", SIZE, lambda: content(before))


def whole(folder: Path) -> bool:
    return {file.name: file.read_bytes() for file in folder.iterdir()} == {"a": PARTS * PART, "b": PARTS * PART[::-1]}


def folders(path: Path) -> list[str]:
    return sorted(folder.name for folder in path.iterdir() if folder.is_dir())


def run(work: Callable[[], None]) -> multiprocessing.process.BaseProcess:
    process = CONTEXT.Process(target=work)
    process.start()
    return process


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_part(number: int) -> Callable[[pytest.MonkeyPatch, Path], None]:
    def work(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
        get(Room(path, 10**6), before=lambda now: now == number and die())

    return work


def at_call(owner: object, name: str, after: bool = False) -> Callable[[pytest.MonkeyPatch, Path], None]:
    """When a function is called the first time, or once it is done."""

    def work(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
        done = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **given: die(after and done(*args, **given)))
        get(Room(path, 10**6))

    return work


@pytest.mark.parametrize(
    ("killed", "left"),
    [
        (at_call(Path, "mkdir"), []),
        (at_part(0), [f".set-1.{SIZE}"]),
        (at_part(2), [f".set-1.{SIZE}"]),
        (at_call(os, "fsync"), [f".set-1.{SIZE}"]),
        (at_call(Path, "rename"), [f".set-1.{SIZE}"]),
        (at_call(Path, "rename", after=True), ["set-1"]),
        (at_call(os, "utime"), ["set-1"]),
    ],
    ids=["before", "first part", "last part", "synced", "whole", "named", "made"],
)
def test_who_is_killed_leaves_nothing_that_is_taken_for_whole(killed, left, tmp_path, monkeypatch):
    path = tmp_path / "kept"
    process = run(lambda: killed(monkeypatch, path))
    process.join(20)
    assert process.exitcode == -signal.SIGKILL
    assert (folders(path) if path.is_dir() else []) == left
    # The next one waits for nobody, and finds or makes it right.
    made = []
    with Room(path, 10**6) as room:
        assert whole(get(room, before=made.append))
    assert made == ([] if left == ["set-1"] else [0, 1, 2])
    assert folders(path) == ["set-1"]


def test_what_a_killed_process_has_left_under_another_name_gives_way(tmp_path):
    process = run(lambda: get(Room(tmp_path, 10**6), "set-0", before=lambda now: now and die()))
    process.join(20)
    assert folders(tmp_path) == [f".set-0.{SIZE}"]
    with Room(tmp_path, SIZE) as room:
        assert whole(get(room))
    assert folders(tmp_path) == ["set-1"]


def test_several_that_want_the_same_make_it_once(tmp_path):
    made = tmp_path / "made"

    def note(number: int) -> None:
        with made.open("a") as file:
            file.write(f"{number} ")
        time.sleep(0.02)

    def work() -> None:
        with Room(tmp_path / "kept", 10**6) as room:
            os._exit(0 if whole(get(room, before=note)) else 1)

    processes = [run(work) for _ in range(4)]
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [0] * 4
    assert made.read_text() == "0 1 2 "


def test_who_waits_says_so_and_can_be_stopped(tmp_path):
    begun, go_on = CONTEXT.Event(), CONTEXT.Event()
    process = run(lambda: get(Room(tmp_path, 10**6), before=lambda now: (begun.set(), go_on.wait(20))))
    assert begun.wait(20)
    seen = []

    def report() -> None:
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Room(tmp_path, 10**6, report=report) as room:
        get(room)
    go_on.set()
    process.join(20)
    assert folders(tmp_path) == ["set-1"]


def test_what_was_used_longest_ago_gives_way(tmp_path):
    for name in ("set-1", "set-2", "set-3"):
        with Room(tmp_path, 3 * SIZE) as room:
            get(room, name)
        os.utime(tmp_path / name, (1, int(name[-1])))
    with Room(tmp_path, 3 * SIZE) as room:
        get(room, "set-1")  # used last
    with Room(tmp_path, 3 * SIZE) as room:
        get(room, "set-4")
    assert folders(tmp_path) == ["set-1", "set-3", "set-4"]


def test_who_is_killed_while_something_gives_way_leaves_no_half_of_it(tmp_path, monkeypatch):
    with Room(tmp_path, SIZE) as room:
        get(room)

    def begin(folder: Path) -> None:
        (folder / "a").unlink()
        die()

    def work() -> None:
        monkeypatch.setattr(kept.shutil, "rmtree", begin)
        get(Room(tmp_path, SIZE), "set-2")

    process = run(work)
    process.join(20)
    assert process.exitcode == -signal.SIGKILL
    with Room(tmp_path, SIZE) as room:
        assert whole(get(room))
    assert folders(tmp_path) == ["set-1"]


def test_what_is_not_its_own_is_let_alone(tmp_path):
    for name in ("mine", ".mine", ".mine.d"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(bytes(SIZE))
    for name in ("set-1", "set-2"):
        with Room(tmp_path, SIZE) as room:
            assert get(room, name)
    assert folders(tmp_path) == [".mine", ".mine.d", "mine", "set-2"]


def test_what_is_used_stays_and_is_counted(tmp_path):
    lines = []
    with Room(tmp_path, 2 * SIZE) as one, Room(tmp_path, 2 * SIZE, lines.append) as other:
        first = get(one, "set-1")
        assert get(other, "set-1") == first
        assert get(other, "set-2")
        assert get(other, "set-3") is None
        assert other.left_out == lines[1:] and len(lines) == 2
        assert "sets are not kept" in lines[1] and "--feature-cache allows 1.2e-06 GB, of which 1.2e-06" in lines[1]
        assert folders(tmp_path) == ["set-1", "set-2"] and whole(first)
    with Room(tmp_path, 2 * SIZE) as room:
        assert get(room, "set-3")


def test_what_is_being_written_is_counted_as_a_whole(tmp_path):
    begun, go_on = CONTEXT.Event(), CONTEXT.Event()
    process = run(lambda: get(Room(tmp_path, SIZE), before=lambda now: (begun.set(), go_on.wait(20))))
    assert begun.wait(20)
    with Room(tmp_path, SIZE) as room:
        assert get(room, "set-2") is None
    go_on.set()
    process.join(20)
    assert folders(tmp_path) == ["set-1"]


def test_what_does_not_fit_is_said_with_its_size_and_the_flag(tmp_path):
    with Room(tmp_path, 50 * 10**9) as room:
        get(room)
        assert room.get("set-2", "frozen features of 16,994 images", 94_312_000_000, content) is None
    [line] = room.left_out
    assert "frozen features of 16,994 images" in line and "94.3 GB" in line and "--feature-cache allows 50 GB" in line
    assert folders(tmp_path) == ["set-1"]  # nothing is lost for what cannot be
    nothing = Room(tmp_path / "none", 0)
    assert not nothing and get(nothing) is None and not nothing.left_out and not (tmp_path / "none").exists()


def test_a_full_disk_is_no_end(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, Room(tmp_path, 10**6) as room:
        patch.setattr(os, "fsync", full)
        assert get(room) is None
    assert "No space left" in room.left_out[0] and not folders(tmp_path)
    with Room(tmp_path, 10**6) as room:
        get(room, "set-0")
    with monkeypatch.context() as patch, Room(tmp_path, 10**6) as room:
        patch.setattr(kept.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
        assert get(room, "set-1") is not None  # in the place of the other
        assert get(room, "set-2") is None
    assert "has 1e-08 GB free" in room.left_out[0] and folders(tmp_path) == ["set-1"]


def test_an_error_of_its_maker_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), Room(tmp_path, 10**6) as room:
        get(room, before=lambda now: 1 / (1 - now))
    assert not folders(tmp_path)
    with Room(tmp_path, 10**6) as room:
        assert whole(get(room))


def test_a_mapped_tensor_is_pickled_by_the_name_of_its_file(tmp_path):
    (tmp_path / "x").write_bytes(torch.arange(10_000, dtype=torch.int32).numpy().tobytes())
    pickled = pickle.dumps(Mapped(tmp_path / "x", torch.int32, (100, 100)))
    assert len(pickled) < 500
    assert torch.equal(pickle.loads(pickled).tensor.flatten(), torch.arange(10_000, dtype=torch.int32))
