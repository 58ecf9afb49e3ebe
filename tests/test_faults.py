"""Whatever dies while a sweep is at work, the same command goes on, and ends as if nothing had been.

Sweeps are the real command, in processes of their own, on generated scenes; faults come to them from outside, at
moments that are drawn from a seed. Compared are tables, tuned tensors and predictions, byte by byte.
"""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import pytest

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes by /proc"),
]

ROOT = Path(__file__).parent.parent
EXPERIMENT = """\
name: faults
title: Faults
plugins: [struck.py]
defaults:
  dataset: {scenes: {num_train: 6, num_eval: 1}}
  backbone: tiny-clip-vit
  method: struck
  head: {etris: {width: 16, layers: 1, heads: 2, ffn: 16, dropout: 0.1}}
  train: {epochs: 2, batch_size: 4, lr: 1.0e-3, milestones: [1], gamma: 0.3, precision: fp32}
  eval: {select_on: val, splits: [val, testA]}
  seed: 0
grid:
  method: [struck: {text_rank: 1}, struck: {text_rank: 2}]
  seed: [0, 1]
table:
  rows: method
  columns:
    - {header: mIoU, value: miou, splits: [val, testA]}
    - {header: oIoU, value: oiou, splits: [val, testA]}
"""
PLUGIN = '''\
"""LoRA, slow enough to be met at any step; what stands in the file $FAULT befalls it once, as it trains, or makes all
steps slow while it stands there."""

import os
import time
from pathlib import Path

import torch

from ris_bench.methods.base import METHODS
from ris_bench.methods.lora import LoRA


@METHODS("struck")
class Struck(LoRA):
    def forward(self, backbone, image, tokens_BL):
        features = super().forward(backbone, image, tokens_BL)
        time.sleep(0.05)
        fault = Path(os.environ["FAULT"])
        if self.training and fault.exists():
            kind = fault.read_text()
            if kind == "slow":
                time.sleep(2)
                return features
            fault.unlink()
            if kind == "hang":
                time.sleep(600)
            if kind == "memory":
                torch.empty(2**50)
            features = features._replace(words_BLE=features.words_BLE * float("nan"))
        return features
'''
ALWAYS = ("--checkpoint-minutes", "0.000001")
"""After every step."""
CHECKPOINTS = 11
"""That a trial comes to then: for eight steps, two validations and the other split."""
SECONDS = 300
"""For what takes a few on a machine that has nothing else to do."""

Found = TypeVar("Found")


def wait_for(what: Callable[[], Found], seconds: float = SECONDS) -> Found:
    """What is looked for, as soon as it is there."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)
    return found


def has(said: str, pattern: str) -> bool:
    """Whether a line begins so."""
    return re.search(f"^{pattern}", said, re.MULTILINE) is not None


class Command:
    """`run_bench.py`, started in a session of its own, as a terminal does it."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], log: Path) -> None:
        self.log = log
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command, env=environment, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def said(self) -> str:
        return self.log.read_text()

    def meets(self, what: Callable[[], Found]) -> Found:
        """What is looked for, which has to come while the command runs."""

        def look() -> Found:
            found = what()
            assert found or self.process.poll() is None, f"it has ended:\n{self.said}"
            return found

        found = wait_for(look)
        assert self.process.poll() is None, f"it has ended:\n{self.said}"
        return found

    def interrupt(self) -> None:
        """As Ctrl-C does: everything that the terminal started hears of it."""
        os.killpg(self.process.pid, signal.SIGINT)

    def ends(self, code: int) -> str:
        """What it has said when it has ended, with this exit code; a traceback is never among it."""
        found = self.process.wait(SECONDS)
        assert found == code, f"it ended with {found}:\n{self.said}"
        assert "Traceback" not in self.said
        return self.said


class Sweep:
    """An experiment with a results folder, and what is found there."""

    def __init__(self, folder: Path, cache: Path, *, inside: Path | None = None, before: Sequence[str] = ()) -> None:
        """`inside` is the name that the results have for commands, which begin with `before`."""
        self.results, self.fault, self.commands = folder / "results", folder / "fault", 0
        self.folder, self.inside, self.before = folder, inside or self.results, before
        (folder / "struck.py").write_text(PLUGIN)
        (folder / "faults.yaml").write_text(EXPERIMENT)
        self.environment = {**os.environ, "RIS_BENCH_CACHE": str(cache), "FAULT": str(self.fault)}

    def start(self, *options: str) -> Command:
        self.commands += 1
        command = [sys.executable, "run_bench.py", str(self.folder / "faults.yaml"), "--results", str(self.inside)]
        return Command(
            [*self.before, *command, *options], self.environment, self.folder / f"command{self.commands}.log"
        )

    def befall(self, kind: str) -> None:
        """The whole word at once: a trial may be looking."""
        word = self.fault.with_suffix(".new")
        word.write_text(kind)
        word.replace(self.fault)

    def trials(self) -> list[str]:
        """Those that have ended, in the order in which they did."""
        return [path.parent.name for path in sorted(self._results(), key=lambda path: path.stat().st_mtime_ns)]

    def done(self) -> dict[str, int]:
        """When each of those that are done was."""
        done = [path for path in self._results() if json.loads(path.read_text())["status"] == "done"]
        return {path.parent.name: path.stat().st_mtime_ns for path in done}

    def _results(self) -> list[Path]:
        return [path for path in self.results.glob("trials/*/result.json") if not path.parent.name.startswith(".")]

    def attempt(self, trial: str) -> Path | None:
        return next(self.results.glob(f"trials/.{trial}.*.partial"), None)

    def process(self, trial: str) -> int | None:
        """That works at a trial, or has."""
        attempt = self.attempt(trial)
        try:
            return attempt and json.loads((attempt / "progress.json").read_text())["pid"]
        except FileNotFoundError:  # it has only begun
            return None

    def checkpoints(self, trial: str) -> list[Path]:
        attempt = self.attempt(trial)
        return sorted(attempt.glob("checkpoints/0*.safetensors")) if attempt else []

    def reached(self, trial: str, number: int) -> Callable[[], bool]:
        """Asks whether a trial that has not ended has saved where it stands so many times."""

        def ask() -> bool:
            assert not (self.results / "trials" / trial).exists(), f"{trial} has ended"
            return bool(found := self.checkpoints(trial)) and int(found[-1].name.partition("-")[0]) >= number

        return ask

    def log(self, trial: str) -> str:
        folder = self.results / "trials" / trial
        return ((folder if folder.exists() else self.attempt(trial)) / "log.txt").read_text()

    def outcome(self) -> dict[str, object]:
        """All that was computed, by file; the date in a table's footer is that of the day."""
        found: dict[str, object] = {}
        for kind in ("md", "tex", "csv"):
            table = self.results / "faults" / f"table.{kind}"
            found[table.name] = re.sub(rb"\d{4}-\d\d-\d\d", b"DATE", table.read_bytes())
        for path in self._results():
            record = json.loads(path.read_text())
            for key in ("status", "error", "scores", "selected_epoch", "history", "params"):
                found[f"{path.parent.name} {key}"] = record[key]
            for name in ("tuned.safetensors", "expressions.parquet"):
                found[f"{path.parent.name} {name}"] = (path.parent / name).read_bytes()
        return found

    def remains(self) -> list[str]:
        """Files that nobody needs when all is done."""
        # A driver that was killed leaves its name, where its workers finished all and the next had nothing to do.
        kept = (".driver.lock", ".driver.json")
        partial = [path.name for path in (self.results / "trials").glob(".*") if path.name not in kept]
        return partial + [str(path) for path in self.results.glob("trials/*/checkpoints")]


class Expected(dict):
    """The outcome of a sweep that nothing has befallen."""

    def __init__(self, sweep: Sweep, cache: Path) -> None:
        super().__init__(sweep.outcome())
        self.trials, self.cache = sweep.trials(), cache

    def check(self, sweep: Sweep, done: dict[str, int]) -> None:
        """That a sweep came to the same, and that those that were done before were not run again."""
        found = sweep.outcome()
        assert [key for key in self.keys() | found.keys() if self.get(key) != found.get(key)] == []
        assert done.items() <= sweep.done().items()
        assert sweep.remains() == []


def of(folder: Path) -> list[int]:
    """The processes whose environment names a folder."""
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it has ended, or is somebody else's
            if str(folder).encode() in environment.read_bytes():
                found.append(int(environment.parent.name))
    return found


@contextmanager
def nothing_left_behind(folder: Path) -> Iterator[None]:
    """End the processes of a folder."""
    try:
        yield
    finally:
        for process in of(folder):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> Iterator[Expected]:
    cache, folder = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("undisturbed")
    with nothing_left_behind(folder):
        sweep = Sweep(folder, cache)
        sweep.start("--executor", "local", *ALWAYS).ends(0)
        yield Expected(sweep, cache)


@pytest.fixture
def sweep(tmp_path, expected) -> Iterator[Sweep]:
    with nothing_left_behind(tmp_path):
        yield Sweep(tmp_path, expected.cache)


# Those through Ray take longest and come first, so that none is left alone at the end.


@pytest.mark.ray
def test_workers_are_killed(sweep, expected):
    """Once each, which is retried; one of them twice, which is not."""
    moments = random.Random("workers")
    left = {trial: [moments.randrange(1, CHECKPOINTS)] for trial in expected.trials}
    twice = expected.trials[moments.randrange(4)]
    left[twice] = sorted(moments.sample(range(1, CHECKPOINTS), 2))
    command = sweep.start(*ALWAYS)
    killed = {None}

    def next_one() -> str | None:
        alive = (trial for trial, numbers in left.items() if numbers and sweep.process(trial) not in killed)
        return next((trial for trial in alive if sweep.reached(trial, left[trial][0])()), None)

    while any(left.values()):
        trial = command.meets(next_one)
        left[trial].pop(0)
        process = sweep.process(trial)
        os.kill(process, signal.SIGKILL)
        killed.add(process)
    said = command.ends(1)
    assert said.count("starts again: its process died") == 4
    assert has(said, rf"failed: {twice}: its process died twice: killed, out of memory, or .*; see ")
    done = sweep.done()
    assert done.keys() == set(expected.trials) - {twice}
    for trial in done:
        assert "goes on from the checkpoint" in sweep.log(trial)
    sweep.start(*ALWAYS).ends(0)
    assert "goes on from the checkpoint" in sweep.log(twice)
    expected.check(sweep, done)


@pytest.mark.ray
def test_the_driver_of_workers_is_killed(sweep, expected):
    """Those live on for a while, beside those of the next driver, which starts at once."""
    moments = random.Random("driver of workers")
    command = sweep.start(*ALWAYS)
    command.meets(sweep.reached(expected.trials[moments.randrange(2)], moments.randrange(1, CHECKPOINTS)))
    command.process.kill()
    command.ends(-signal.SIGKILL)
    done = sweep.done()
    sweep.start(*ALWAYS).ends(0)
    expected.check(sweep, done)


@pytest.mark.ray
def test_ctrl_c_under_ray(sweep, expected):
    moments = random.Random("ctrl-c under Ray")
    trial = expected.trials[moments.randrange(2)]
    rarely = ("--checkpoint-minutes", "60")
    command = sweep.start(*rarely)
    command.meets(sweep.reached(trial, 1))
    sweep.befall("slow")  # the signal, and what trials are told then, take up to a second each
    command.interrupt()
    said = command.ends(130)
    sweep.fault.unlink()
    assert "stops after the step that is running" in said and "the same command goes on with the rest" in said
    done = sweep.done()
    assert trial not in done
    sweep.start(*rarely).ends(0)
    assert "goes on from the checkpoint" in sweep.log(trial)
    expected.check(sweep, done)


@pytest.mark.ray
def test_a_file_system_hangs(sweep, expected, tmp_path):
    """Whoever opens a pipe waits for somebody who writes to it."""
    moments = random.Random("hang")
    sweep.environment["RIS_BENCH_CACHE"] = str(shutil.copytree(expected.cache, tmp_path / "cache"))
    trial = expected.trials[moments.randrange(2)]
    command = sweep.start(*ALWAYS, "--patience-minutes", "0.3")
    command.meets(sweep.reached(trial, moments.randrange(1, 5)))
    [image] = tmp_path.glob("cache/scenes-*/images/**/val_000000.jpg")
    image.rename(tmp_path / image.name)
    os.mkfifo(image)
    process = sweep.process(trial)
    attempt = sweep.attempt(trial)
    command.meets(lambda: "no progress for 0.3 minutes: its process was ended" in (attempt / "log.txt").read_text())
    (tmp_path / image.name).replace(image)
    assert f"{trial} starts again: its process died" in command.ends(0)
    assert not Path(f"/proc/{process}").exists()
    expected.check(sweep, {})


@pytest.fixture
def nodes(tmp_path, expected) -> Iterator[tuple[str, Path]]:
    """The address of a cluster of two nodes for one trial each, and what names the processes of the second one."""
    from ray.cluster_utils import Cluster

    def node(mark: Path) -> dict[str, object]:
        variables = {"RIS_BENCH_CACHE": str(expected.cache), "FAULT": str(mark)}
        return {"num_cpus": 1, "object_store_memory": 2**27, "env_vars": variables}

    mark = tmp_path / "second"
    with nothing_left_behind(tmp_path), pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # A node whose processes are gone is missed after seconds, as it is not while one is merely slow to answer.
        patch.setenv("RAY_health_check_initial_delay_ms", "0")
        patch.setenv("RAY_health_check_period_ms", "500")
        head = {**node(tmp_path / "first"), "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            cluster.add_node(**node(mark))
            yield cluster.address, mark
        finally:
            cluster.shutdown()


@pytest.mark.ray
def test_a_node_is_lost(sweep, expected, nodes):
    address, mark = nodes
    moments = random.Random("node")
    number = moments.randrange(1, CHECKPOINTS)
    command = sweep.start(*ALWAYS, "--address", address)

    def there() -> str | None:
        on_it = (trial for trial in expected.trials if sweep.process(trial) in of(mark))
        return next((trial for trial in on_it if sweep.reached(trial, number)()), None)

    trial = command.meets(there)
    for process in of(mark):
        with suppress(ProcessLookupError):  # with one the next may end
            os.kill(process, signal.SIGKILL)
    assert not (sweep.results / "trials" / trial).exists()
    assert f"{trial} starts again: its process died" in command.ends(0)
    assert "goes on from the checkpoint" in sweep.log(trial)
    expected.check(sweep, {})


def test_the_driver_is_killed_three_times(sweep, expected):
    moments = random.Random("driver")
    done: dict[str, int] = {}
    for trial in sorted(moments.sample(range(4), 3)):
        command = sweep.start("--executor", "local", *ALWAYS)
        command.meets(sweep.reached(expected.trials[trial], moments.randrange(1, CHECKPOINTS)))
        command.process.kill()
        command.ends(-signal.SIGKILL)
        assert sweep.trials() == expected.trials[:trial] and done.items() <= sweep.done().items()
        done = sweep.done()
    sweep.start("--executor", "local", *ALWAYS).ends(0)
    assert "goes on from the checkpoint" in sweep.log(expected.trials[trial])
    expected.check(sweep, done)


def test_the_newest_checkpoint_is_torn(sweep, expected):
    moments = random.Random("torn")
    trial = expected.trials[moments.randrange(4)]
    command = sweep.start("--executor", "local", *ALWAYS)
    command.meets(sweep.reached(trial, moments.randrange(2, CHECKPOINTS)))
    command.process.kill()
    command.ends(-signal.SIGKILL)
    *_, before, newest = sweep.checkpoints(trial)
    content = newest.read_bytes()
    newest.write_bytes(content[: moments.randrange(len(content))])
    sweep.start("--executor", "local", *ALWAYS).ends(0)
    assert f"the checkpoint {newest.name} is passed over" in sweep.log(trial)
    assert f"goes on from the checkpoint {before.name}" in sweep.log(trial)
    expected.check(sweep, {})


def test_ctrl_c_once_and_twice(sweep, expected):
    """The first one saves where the trial stands; the second one does not wait for the step."""
    moments = random.Random("ctrl-c")
    first, second = sorted(moments.sample(range(4), 2))
    trial = expected.trials[first]
    rarely = ("--executor", "local", "--checkpoint-minutes", "60")
    command = sweep.start(*rarely)
    command.meets(sweep.reached(trial, 1))  # after a validation a trial is saved in any case
    command.interrupt()
    said = command.ends(130)
    assert "stops after the step that is running" in said and "the same command goes on with the rest" in said
    assert len(sweep.checkpoints(trial)) == 2
    done = sweep.done()
    assert done.keys() == set(expected.trials[:first])

    trial = expected.trials[second]
    command = sweep.start(*rarely)
    command.meets(sweep.reached(trial, 1))
    sweep.befall("hang")
    command.meets(lambda: not sweep.fault.exists())
    command.interrupt()
    command.meets(lambda: "once more stops at once" in command.said)
    time.sleep(0.5)
    assert command.process.poll() is None
    pressed = time.monotonic()
    command.interrupt()
    assert "the same command goes on with the rest" in command.ends(130)
    assert time.monotonic() - pressed < 10  # the step would have taken ten minutes
    assert done.items() <= sweep.done().items()
    done = sweep.done()
    assert done.keys() == set(expected.trials[:second])

    sweep.start(*rarely).ends(0)
    assert "goes on from the checkpoint" in sweep.log(trial)
    expected.check(sweep, done)


def test_losses_that_are_not_finite_and_memory_that_runs_out(sweep, expected):
    moments = random.Random("steps")
    first, second = (expected.trials[i] for i in sorted(moments.sample(range(4), 2)))
    command = sweep.start("--executor", "local", *ALWAYS)
    for trial, kind in ((first, "nan"), (second, "memory")):
        command.meets(sweep.reached(trial, moments.randrange(1, 9)))
        sweep.befall(kind)
        command.meets(lambda: not sweep.fault.exists())
    said = command.ends(1)
    assert has(said, rf"failed: {first}: FloatingPointError: the loss is nan at epoch \d, batch \d of 4; see ")
    assert has(said, rf"failed: {second}: RuntimeError: .*can't allocate memory.* \(the peak was .* GiB; ")
    done = sweep.done()
    assert done.keys() == set(expected.trials) - {first, second}
    for trial in (first, second):
        assert "Traceback" in sweep.log(trial)

    assert "2 trials to run, 2 of them again because they failed" in sweep.start("--executor", "local", *ALWAYS).ends(0)
    assert "goes on from the checkpoint" in sweep.log(first)
    expected.check(sweep, done)


def test_an_image_vanishes(sweep, expected, tmp_path):
    moments = random.Random("image")
    sweep.environment["RIS_BENCH_CACHE"] = str(shutil.copytree(expected.cache, tmp_path / "cache"))
    trial = moments.randrange(1, 4)
    command = sweep.start("--executor", "local", "--feature-cache", "0", *ALWAYS)  # or it would be there still
    command.meets(sweep.reached(expected.trials[trial], moments.randrange(1, 8)))
    [image] = tmp_path.glob("cache/scenes-*/images/**/testA_000000.jpg")
    image.rename(tmp_path / image.name)
    said = command.ends(1)
    for failed in expected.trials[trial:]:
        assert has(said, rf"failed: {failed}: UserError: .*{image}.*; see ")
    done = sweep.done()
    assert done.keys() == set(expected.trials[:trial])
    (tmp_path / image.name).rename(image)
    sweep.start("--executor", "local", *ALWAYS).ends(0)
    expected.check(sweep, done)


def test_a_second_driver(sweep, expected):
    command = sweep.start("--executor", "local", *ALWAYS)
    moments = random.Random("second driver")
    command.meets(sweep.reached(expected.trials[moments.randrange(4)], moments.randrange(1, CHECKPOINTS)))
    command.process.send_signal(signal.SIGSTOP)  # or it has ended before the other has come
    status = [sys.executable, "-c", "import sys; from ris_bench.cli import main; sys.exit(main())", "status", "--json"]
    told = json.loads(subprocess.check_output([*status, str(sweep.results)], cwd=ROOT))
    assert told["driver"]["pid"] == command.process.pid == told["running"][0]["told"]["pid"]
    said = sweep.start("--executor", "local").ends(2)
    assert has(said, rf"error: another run is at work in .* \(experiment faults, .*pid {command.process.pid}, ")
    command.process.send_signal(signal.SIGCONT)
    command.ends(0)
    expected.check(sweep, {})


class Disk:
    """A small file system that no other process sees: in name spaces of its own, which end with this object."""

    def __init__(self, folder: Path, megabytes: int) -> None:
        folder.mkdir()
        spaces = ["--mount"] if os.geteuid() == 0 else ["--user", "--mount"]
        mount = f"mount -t tmpfs -o size={megabytes}m none '{folder}' && echo mounted && exec cat"
        mapped = [] if os.geteuid() == 0 else ["--map-root-user"]
        self._holder = subprocess.Popen(
            ["unshare", *spaces, *mapped, "sh", "-c", mount], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.mounted = self._holder.stdout.readline() == b"mounted\n"
        inside = ["--preserve-credentials"] if mapped else []
        self.enter = ["nsenter", f"--target={self._holder.pid}", *spaces, *inside, "--wd"]
        self.folder = Path(f"/proc/{self._holder.pid}/root{folder}")
        self._filler = self.folder / "filler"

    def fill(self) -> None:
        with suppress(OSError), self._filler.open("ab", buffering=0) as file:
            while file.write(bytes(4096)):
                pass

    def free(self) -> None:
        self._filler.unlink()

    def close(self) -> None:
        self._holder.stdin.close()
        self._holder.wait()


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk]:
    try:
        disk = Disk(tmp_path / "disk", megabytes=24)
    except FileNotFoundError as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    try:
        if not disk.mounted:
            pytest.skip("no file system can be mounted here")
        yield disk
    finally:
        disk.close()


def test_the_disk_is_full(tmp_path, expected, disk):
    """For a while, which a training survives; for so long that results cannot be written; and from the beginning."""
    moments = random.Random("disk")
    survives, fails = sorted(moments.sample(range(3), 2))
    with nothing_left_behind(tmp_path):
        sweep = Sweep(tmp_path, expected.cache, inside=tmp_path / "disk" / "results", before=disk.enter)
        sweep.results = disk.folder / "results"
        command = sweep.start("--executor", "local", *ALWAYS)
        trial = expected.trials[survives]
        command.meets(sweep.reached(trial, moments.randrange(1, 6)))
        # Its last page has room for a line when no file has.
        command.meets(lambda: disk.fill() or "no checkpoint could be written" in sweep.log(trial))
        disk.free()
        command.meets(sweep.reached(expected.trials[fails], moments.randrange(1, CHECKPOINTS)))
        while command.process.poll() is None:
            disk.fill()  # also what others give back
            time.sleep(0.01)
        said = command.ends(1)
        for failed in expected.trials[fails:]:
            assert has(said, rf"failed: {failed}: (OS|Safetensor)Error: .*{os.strerror(errno.ENOSPC)}"), said
        assert has(said, rf"error: the tables cannot be written to .*{os.strerror(errno.ENOSPC)}")
        done = sweep.done()
        assert done.keys() == set(expected.trials[:fails])

        said = sweep.start("--executor", "local", *ALWAYS).ends(2)
        assert has(said, rf"error: results cannot be written to .*{os.strerror(errno.ENOSPC)}.*; make room")
        disk.free()
        sweep.start("--executor", "local", *ALWAYS).ends(0)
        expected.check(sweep, done)
