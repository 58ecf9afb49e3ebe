"""A trial that is cut off goes on from its last checkpoint, and ends as if nothing had been."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import random
import resource
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import OPTIONS, TINY_HEAD, tiny_model
from safetensors import safe_open

from ris_bench import checkpoints, code, executors, sweep
from ris_bench.backbones.base import BACKBONES
from ris_bench.checkpoints import Checkpoints
from ris_bench.data.dataset import DATASETS
from ris_bench.head import HEADS
from ris_bench.methods.base import METHODS
from ris_bench.records import Evaluation, Places, Progress, Result, Training, Trial
from ris_bench.results import Store
from ris_bench.training import Loop
from ris_bench.trial import run_trial

pytestmark = pytest.mark.usefixtures("cache")

ALWAYS = 1e-9
"""Seconds between checkpoints: one after every step."""


def trial(backbone: str, method: str, **options) -> Trial:
    """Three epochs of two steps, the first one not validated, with dropout in the head."""
    return Trial(
        dataset=DATASETS.resolve("scenes", {"num_train": 4, "num_eval": 2}),
        backbone=BACKBONES.resolve(backbone, options),
        method=METHODS.resolve(method, OPTIONS.get(method, {})),
        head=HEADS.resolve("etris", {**TINY_HEAD, "dropout": 0.1}),
        train=Training(epochs=3, batch_size=4, lr=1e-3, milestones=(1,), gamma=0.3, precision="fp32", dice=1.0),
        eval=Evaluation(select_on="val", every=2, splits=("val", "testA")),
        seed=3,
    )


TRIALS = {
    "frozen": trial("tiny-clip-vit", "frozen"),
    "full": trial("tiny-clip-vit", "full"),
    "bridger": trial("tiny-clip-rn", "bridger"),
    "statistics": trial("tiny-clip-rn", "frozen", norm_stats="batch"),
}
SPLITS = {"evaluate val", "evaluate testA"}


def run(one: Trial, folder: Path, seconds: float, report=lambda progress: None) -> Result:
    folder.mkdir(parents=True, exist_ok=True)
    return run_trial(one, folder, Places(Path("nowhere"), None, checkpoint_seconds=seconds), report)


def run_and_die(one: Trial, folder: Path, environment: dict[str, str], event: str, number: int) -> None:
    """Run a trial in this process, and kill it at the event so called with this number.

    An event is a phase that is reported, or of a checkpoint "torn", half of it is written, or "kept". "" is any event.
    """
    os.environ |= environment
    left = number

    def happens(what: str) -> None:
        nonlocal left
        left -= what == event or not event
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

    def save_file(tensors, path, metadata):
        whole(tensors, path, metadata)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        happens("torn")
        path.write_bytes(content)

    def flush(folder):
        flushed(folder)
        happens("kept")

    code.digest = lambda: "the same"
    whole, checkpoints.save_file = checkpoints.save_file, save_file
    flushed, checkpoints._flush = checkpoints._flush, flush
    run(one, folder, ALWAYS, lambda progress: happens(progress.phase))


def killed(one: Trial, folder: Path, event: str, number: int) -> None:
    # A server that has computed nothing yet forks: it imports everything once, and inherits no threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "ris_bench.sweep", "ris_bench.trial"])
    environment = {"RIS_BENCH_CACHE": os.environ["RIS_BENCH_CACHE"]}
    process = context.Process(target=run_and_die, args=(one, folder, environment, event, number))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL, (event, number)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The result, folder and phases of a trial without checkpoints."""
    known = {}

    def get(name: str) -> tuple[Result, Path, list[str]]:
        if name not in known:
            folder, phases = tmp_path_factory.mktemp(name), []
            result = run(TRIALS[name], folder, 0, lambda progress: phases.append(progress.phase))
            assert result.status == "done", result.error
            assert not (folder / "checkpoints").exists()
            known[name] = result, folder, phases
        return known[name]

    return get


def check_same(result: Result, folder: Path, expected: Result, expected_folder: Path) -> None:
    assert result.status == "done", result.error
    for key in ("scores", "history", "selected_epoch", "params"):
        assert getattr(result, key) == getattr(expected, key), key
    for name in ("tuned.safetensors", "expressions.parquet"):
        assert (folder / name).read_bytes() == (expected_folder / name).read_bytes(), name


def lines(folder: Path, *parts: str) -> list[str]:
    return [line for line in (folder / "log.txt").read_text().splitlines() if all(part in line for part in parts)]


@pytest.mark.parametrize("name", TRIALS)
def test_it_ends_as_if_it_had_not_been_killed(name, tmp_path, undisturbed):
    """At random moments, several times over, and then not."""
    moments = random.Random(name)
    for _ in range(3):
        killed(TRIALS[name], tmp_path, "", moments.randint(2, 14))
    result = run(TRIALS[name], tmp_path, ALWAYS)
    check_same(result, tmp_path, *undisturbed(name)[:2])
    # The process may have died before it had removed the oldest.
    assert len(list((tmp_path / "checkpoints").iterdir())) <= checkpoints.KEPT + 1


@pytest.mark.parametrize(
    ("event", "number", "goes_on"),
    [
        ("train", 1, False),  # before the first checkpoint
        ("torn", 1, False),  # while it is written
        ("torn", 3, True),
        ("kept", 1, True),
        ("train", "epoch", True),  # behind the last step of an epoch, which is not saved yet
        ("kept", "epoch", True),  # and which is
        ("evaluate val", 1, True),
        ("evaluate testA", 1, True),
    ],
)
def test_wherever_it_is_killed(event, number, goes_on, tmp_path, undisturbed):
    expected, folder, phases = undisturbed("frozen")
    steps = phases.count("train") // 3
    assert steps > 1
    killed(TRIALS["frozen"], tmp_path, event, steps if number == "epoch" else number)
    seen = []
    result = run(TRIALS["frozen"], tmp_path, ALWAYS, lambda progress: seen.append(progress.phase))
    check_same(result, tmp_path, expected, folder)
    assert bool(lines(tmp_path, "goes on from the checkpoint 0")) == goes_on
    assert not lines(tmp_path, "passed over")
    assert (seen.count("train") < phases.count("train")) == goes_on
    if event == "evaluate testA":
        assert set(seen) == {"load", "evaluate testA"}  # what was finished is not repeated


def test_a_trial_that_is_outdone_stops_there_also_when_it_was_killed_just_then(tmp_path, undisturbed):
    expected = undisturbed("bridger")[0]
    cut = lambda *stops: replace(TRIALS["bridger"], train=replace(TRIALS["bridger"].train, stop_below=stops))  # noqa: E731
    reached = expected.history[1].miou
    assert cut().id == TRIALS["bridger"].id != cut((2, reached)).id
    assert run(cut((2, reached)), tmp_path / "reached", 0).history == expected.history

    one = cut((2, reached + 1e-6))
    stopped = run(one, tmp_path / "stopped", 0)
    assert stopped.stopped and not expected.stopped
    assert stopped.history == expected.history[:2]
    assert stopped.selected_epoch == 2
    assert stopped.scores["val"].miou == reached
    steps = undisturbed("bridger")[2].count("train") // 3
    killed(one, tmp_path / "killed", "kept", 2 * steps + 1)  # it has validated that epoch, and saved it
    seen = []
    result = run(one, tmp_path / "killed", ALWAYS, lambda progress: seen.append(progress.phase))
    check_same(result, tmp_path / "killed", stopped, tmp_path / "stopped")
    assert "train" not in seen


class Stop:
    """A report that stops a trial at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, progress: Progress) -> None:
        if progress.step == self.step:
            raise KeyboardInterrupt


def test_who_stops_it_loses_nothing(tmp_path, undisturbed):
    expected, folder, phases = undisturbed("bridger")
    with pytest.raises(KeyboardInterrupt):
        run(TRIALS["bridger"], tmp_path, 3600, Stop(3))
    seen = []
    result = run(TRIALS["bridger"], tmp_path, 3600, lambda progress: seen.append(progress.phase))
    check_same(result, tmp_path, expected, folder)
    assert seen.count("train") == phases.count("train") - 3


def test_what_is_kept_is_small_and_a_damaged_one_is_passed_over(tmp_path, undisturbed):
    one = TRIALS["frozen"]
    with pytest.raises(KeyboardInterrupt):
        run(one, tmp_path, ALWAYS, Stop(4))
    first, second = sorted((tmp_path / "checkpoints").iterdir())
    with safe_open(second, "pt") as file:
        names = {name.partition("/")[2] for name in file.keys() if not name.startswith("frame/")}  # noqa: SIM118
    assert not [name for name in names if name.startswith("backbone.")]

    second.write_bytes(second.read_bytes()[:-100])
    result = run(one, tmp_path, 3600)
    assert lines(tmp_path, second.name, "passed over", "damaged")
    assert lines(tmp_path, first.name, "goes on")
    check_same(result, tmp_path, *undisturbed("frozen")[:2])


def test_a_trial_through_the_store_goes_on_and_leaves_no_checkpoints(tmp_path, undisturbed):
    expected, folder, phases = undisturbed("frozen")
    places = Places(Path("nowhere"), None, checkpoint_seconds=3600)
    job = sweep.Job(run_trial, Store(tmp_path), places)
    one = TRIALS["frozen"]
    with pytest.raises(KeyboardInterrupt):
        job(one, Stop(3))
    job.lost(one, "it died")  # a trial that has failed goes on too
    assert (job.store.folder(one) / "checkpoints").is_dir()
    seen = []
    result = job(one, lambda progress: seen.append(progress.phase))
    check_same(result, job.store.folder(one), expected, folder)
    assert seen.count("train") == phases.count("train") - 3
    assert {path.name for path in (tmp_path / "trials").iterdir()} == {one.id}
    assert not (job.store.folder(one) / "checkpoints").exists()


# Without a trial.


def state(number: int) -> dict:
    return {"tuned/weight": torch.full((3, 2), float(number)), "number": number, "loss": 0.1 + number}


def taken(folder: Path, made_for: dict | None = None) -> tuple[list[dict], list[str]]:
    """What is restored, and what is said of it."""
    got, said = [], []
    Checkpoints(folder, made_for or {"trial": {"lr": 0.1, "milestones": (1, 2)}}).restore(got.append, said.append)
    return got, said


@pytest.fixture
def folder(tmp_path) -> Path:
    """With the last two of three."""
    kept = Checkpoints(tmp_path / "checkpoints", {"trial": {"lr": 0.1, "milestones": (1, 2)}})
    for number in range(3):
        kept.save(state(number))
    return kept.folder


def test_the_last_two_are_kept_and_the_newest_comes_back(folder):
    assert [path.name[:7] for path in sorted(folder.iterdir())] == ["000002-", "000003-"]
    [got], [said] = taken(folder)
    assert torch.equal(got.pop("tuned/weight"), torch.full((3, 2), 2.0))
    assert got == {"number": 2, "loss": 2.1}
    assert "goes on from the checkpoint 000003-" in said


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def damage(kind: str, path: Path) -> None:
    content = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "a bit":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif kind == "pickle":
        rename(path, pickle.dumps(Evil()))
    elif kind == "header":
        rename(path, (2**62).to_bytes(8, "little") + content[8:])
    elif kind == "no metadata":
        rename(path, (2).to_bytes(8, "little") + b"{}")
    else:
        path.unlink()
        path.mkdir()


def rename(path: Path, content: bytes) -> None:
    """As one who knows how they are named would write it."""
    path.unlink()
    path.with_name("x").write_bytes(content)
    path.with_name("x").rename(path.with_name(f"000004-{checkpoints._digest(path.with_name('x'))}.safetensors"))


@pytest.mark.parametrize("kind", ["truncated", "empty", "a bit", "pickle", "header", "no metadata", "a folder"])
def test_what_is_damaged_is_passed_over(kind, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    damage(kind, max(folder.iterdir()))
    [got], [over, said] = taken(folder)
    assert got["number"] == 1
    assert "passed over" in over and "\n" not in over
    assert "goes on from the checkpoint 000002-" in said
    assert not Path("executed").exists()


def test_what_is_foreign_is_passed_over(folder):
    assert taken(folder, {"trial": {"lr": 0.2}}) == taken(folder, {"trial": {"lr": 0.2}})
    got, said = taken(folder, {"trial": {"lr": 0.1, "milestones": [1, 2]}, "code": "x"})
    assert not got
    assert len(said) == 2 and all("it was made for another code" in line for line in said)


def test_what_does_not_fit_is_passed_over(folder):
    got = []

    def take_up(state):
        if state["number"] == 2:
            raise KeyError("optimizer")
        got.append(state["number"])

    assert Checkpoints(folder, {"trial": {"lr": 0.1, "milestones": (1, 2)}}).restore(take_up, lambda line: None)
    assert got == [1]


def test_a_full_disk_leaves_what_is_there(folder):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    kept = Checkpoints(folder, {})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError):
            kept.save({"weight": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_the_remains_of_a_process_that_was_killed_are_removed(folder):
    (folder / ".0123abcd").write_bytes(b"half")
    taken(folder)
    assert len(list(folder.iterdir())) == 2


def test_a_state_of_another_layout_is_refused_and_changes_nothing():
    settings = TRIALS["frozen"].train
    loop, other = (Loop(tiny_model("tiny-clip-vit", m), settings, torch.device("cpu")) for m in ("frozen", "coop"))
    before = {name: item.clone() for name, item in loop.state_dict().items() if isinstance(item, torch.Tensor)}
    whole = loop.state_dict()
    weight = next(name for name in whole if name.startswith("tuned/"))
    for wrong in (
        other.state_dict(),
        whole | {weight: whole[weight].double()},
        whole | {"rng/cpu": torch.zeros(3, dtype=torch.uint8)},
        whole | {"rng/cuda": whole["rng/cpu"]},
        whole | {"optimizer/head.unknown/step": torch.zeros(())},
        whole | {"scaler": {"scale": 1.0}},
    ):
        with pytest.raises(ValueError):
            loop.load_state_dict(wrong | {"epoch": 1})
        assert all(torch.equal(loop.state_dict()[name], tensor) for name, tensor in before.items())
        assert loop.epoch == 0


def test_an_attempt_takes_what_earlier_ones_left_and_shuts_them_out(tmp_path):
    store, one = Store(tmp_path), TRIALS["frozen"]
    first = store.begin(one)
    Checkpoints(first / "checkpoints", {}).save(state(1))
    (first / "log.txt").touch()
    second = store.begin(one)
    assert {path.name for path in second.iterdir()} == {"checkpoints"}
    with pytest.raises(OSError):
        Checkpoints(first / "checkpoints", {}).save(state(2))
    store.finish(second, sweep.failure(one, "it broke"))
    third = store.begin(one)
    assert len(list((third / "checkpoints").iterdir())) == 1
    assert store.read(one).error == "it broke"
    done = json.loads(sweep.failure(one, "").to_json()) | {"status": "done", "error": None}
    store.finish(third, Result.from_json(json.dumps(done)))
    assert {path.name for path in store.folder(one).iterdir()} == {"result.json"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_waits_for_the_step_and_a_second_one_does_not(number, tmp_path, capfd):
    steps = []

    def work(times: int, one: Trial, folder: Path, places: Places, report) -> Result:
        for step in range(5):
            if step == 1:
                for _ in range(times):
                    os.kill(os.getpid(), number)
            steps.append(step)
            report(Progress(one.id, "train", 1, 1, step, 5, None, None, None, None))
        raise AssertionError("it should have been stopped")

    class Watcher:
        started = progress = finished = staticmethod(lambda what: None)

    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    for times, done in ((1, [0, 1]), (2, [0])):
        steps.clear()
        job = sweep.Job(partial(work, times), Store(tmp_path), Places(tmp_path, None))
        with pytest.raises(KeyboardInterrupt), executors.in_process() as execute:
            execute(list(TRIALS.values()), job, Watcher())
        assert steps == done
        assert "once more stops at once" in capfd.readouterr().err
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before
