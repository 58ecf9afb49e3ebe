"""What a sweep keeps, runs again and says, with stand-ins for `run_trial`; Ray's part with real processes."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from conftest import STAND_IN

from ris_bench import executors, progress, status, sweep
from ris_bench.allocator import ENVIRONMENT
from ris_bench.backbones.base import BACKBONES
from ris_bench.errors import UserError
from ris_bench.experiment import Experiment, load
from ris_bench.methods.base import METHODS
from ris_bench.records import Places, Progress, Result, Scores, Trial
from ris_bench.results import Store, this_process

ROOT = Path(__file__).parent.parent
TEXT = (
    STAND_IN
    + """\
grid:
  seed: [0, 1, 2]
  method: [frozen]
table:
  rows: method
  columns:
    - {header: val, value: miou, splits: [val]}
"""
)
CHOOSE = "  train.lr: [1.0e-3, 1.0e-4, 1.0e-2]\nchoose: [train.lr]\ntable:"


def told(trial: Trial, step: int) -> Progress:
    return Progress(trial.id, "train", 1, 2, step, 9, 0.25, 100.0, 61.0, 0.5)


def stand_in(does: dict[int, str], trial: Trial, folder: Path, places: Places, report) -> Result:
    """Ends at once with mIoU 1 - lr, or as `does` says for the seed."""
    (folder / "log.txt").write_text("it began\n")
    report(told(trial, 1))
    action = does.get(trial.seed)
    if action == "raise":
        raise RuntimeError("no luck\nwith details")
    if action == "stop":
        raise KeyboardInterrupt
    if action == "die once" and not (folder.parent / "died").exists():
        (folder.parent / "died").touch()
        os._exit(3)
    if action == "hang once" and not (folder.parent / "hung").exists():
        (folder.parent / "hung").touch()
        time.sleep(600)
    if action == "work on":
        for step in range(600):
            report(told(trial, step))
            time.sleep(0.1)
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    scores = Scores(oiou=0.5, miou=1 - trial.train.lr, precision_at={}, num_expressions=1)
    record = json.loads(sweep.failure(trial, "").to_json())
    return Result.from_json(json.dumps(record | {"status": "done", "error": None, "scores": {"val": vars(scores)}}))


def never(trial: Trial, folder: Path, places: Places, report) -> Result:
    raise AssertionError("there is nothing to run")


@pytest.fixture
def experiment(tmp_path) -> Experiment:
    path = tmp_path / "stand_in.yaml"
    path.write_text(TEXT)
    return load(path)


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "results")


def run(experiment, store, does=None, run_trial=None, executor=None, only="") -> dict[str, Result]:
    job = sweep.Job(run_trial or partial(stand_in, does or {}), store, Places(data=Path("/nowhere"), weights=None))
    executor = executor or executors.in_process()
    return sweep.run(experiment, job, executor, only=only, check=lambda *places: None)


def statuses(results: dict[str, Result]) -> dict[int, str]:
    return {result.trial.seed: result.status for result in results.values()}


def kept(store: Store) -> dict[int, str]:
    files = store.root.glob("trials/*/result.json")
    return statuses({str(file): Result.from_json(file.read_text()) for file in files})


def test_a_second_run_has_nothing_to_do_and_says_nothing(experiment, store, capsys):
    first = run(experiment, store)
    assert kept(store) == dict.fromkeys((0, 1, 2), "done")
    capsys.readouterr()
    assert run(experiment, store, run_trial=never) == first
    assert capsys.readouterr().out == ""


def test_a_trial_cut_off_leaves_no_result_and_is_run_again(experiment, store):
    with pytest.raises(KeyboardInterrupt):
        run(experiment, store, {1: "stop"})
    assert kept(store) == {0: "done"}
    assert (store.root / "stand_in" / "table.md").exists()
    [partial_folder] = store.root.glob("trials/.*.partial")
    ran = []

    def note(trial, *rest):
        ran.append(trial.seed)
        return stand_in({}, trial, *rest)

    run(experiment, store, run_trial=note)
    assert ran == [1, 2]
    assert kept(store) == dict.fromkeys((0, 1, 2), "done")
    assert not partial_folder.exists()
    assert len(list((store.root / "trials").glob("[!.]*"))) == 3


def test_a_trial_that_ends_as_the_sweep_is_stopped_is_in_the_table(experiment, store):
    """In a process of its own, a trial may be done before the driver has heard of it."""

    @contextmanager
    def executor():
        def execute(trials, job, watcher):
            job(trials[0], lambda progress: None)
            raise KeyboardInterrupt

        yield execute

    with pytest.raises(KeyboardInterrupt):
        run(experiment, store, executor=executor())
    assert "99.9" in (store.root / "stand_in" / "table.md").read_text()


def test_a_failure_is_recorded_the_others_go_on_and_it_is_tried_again(experiment, store, capsys):
    results = run(experiment, store, {0: "raise"})
    assert statuses(results) == kept(store) == {0: "failed", 1: "done", 2: "done"}
    [failed] = [result for result in results.values() if result.status == "failed"]
    assert failed.error == "RuntimeError: no luck"
    log = (store.folder(failed.trial) / "log.txt").read_text()
    assert log.startswith("it began\n") and "with details" in log
    assert "FAILED: RuntimeError: no luck" in capsys.readouterr().out

    assert statuses(run(experiment, store)) == kept(store) == dict.fromkeys((0, 1, 2), "done")
    assert "1 trial to run, 1 of them again" in capsys.readouterr().out


def test_only_leaves_the_other_trials_and_their_failures_alone(experiment, store):
    run(experiment, store, {0: "raise"})
    results = run(experiment, store, run_trial=never, only=".s1.")
    assert statuses(results) == {0: "failed", 1: "done", 2: "done"}


def test_the_table_is_there_after_every_trial(experiment, store):
    tables = []

    def look(trial, *rest):
        path = store.root / "stand_in" / "table.csv"
        tables.append(path.read_text() if path.exists() else None)
        return stand_in({}, trial, *rest)

    run(experiment, store, run_trial=look)
    assert tables[0] is None and None not in tables[1:] and tables[1] != tables[2]


def test_trials_asked_for_by_results_are_run_too(tmp_path, store):
    path = tmp_path / "choose.yaml"
    path.write_text(TEXT.replace("table:", CHOOSE, 1))
    results = run(load(path), store)
    assert sorted((result.trial.seed, result.trial.train.lr) for result in results.values()) == [
        (0, 1e-4), (0, 1e-3), (0, 1e-2), (1, 1e-4), (2, 1e-4)
    ]  # fmt: skip
    assert run(load(path), store, run_trial=never) == results


@pytest.mark.parametrize("damage", ["{", "[]", '{"id": "x"}', "other"])
def test_a_damaged_result_counts_as_none(experiment, store, damage):
    results = run(experiment, store)
    first, second, _ = (store.folder(result.trial) / "result.json" for result in results.values())
    first.write_text(second.read_text() if damage == "other" else damage)
    trial = next(iter(results.values())).trial
    with pytest.warns(UserWarning, match="run again"):
        assert store.read(trial) is None
    with pytest.warns(UserWarning):
        assert run(experiment, store).keys() == results.keys()
    assert store.read(trial).status == "done"


def test_what_is_done_is_not_replaced(experiment, store):
    done = next(iter(run(experiment, store).values()))
    late = store.begin(done.trial)
    assert store.finish(late, sweep.failure(done.trial, "too late")) == done == store.read(done.trial)
    assert not late.exists()


def test_who_was_thought_dead_ends_when_another_has_taken_over(experiment, store, monkeypatch):
    monkeypatch.setattr(sweep, "PULSE_SECONDS", 0)
    others = []

    def overtaken(trial, folder, places, report):
        report(told(trial, 1))
        others.append(store.begin(trial))
        report(told(trial, 2))
        raise AssertionError("it goes on")

    trial = experiment.trials()[0]
    with pytest.raises(FileNotFoundError):
        sweep.Job(overtaken, store, Places(data=Path("/nowhere"), weights=None))(trial, lambda progress: None)
    assert store.attempts(trial) == others


def test_results_cannot_be_written_into_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="not a writable folder"):
        Store(tmp_path / "file" / "results").check_writable()


def test_a_pipe_gets_few_plain_lines(experiment, store, capsys, monkeypatch):
    def chatty(trial, folder, places, report):
        for step in range(1000):
            report(told(trial, step))
        return stand_in({}, trial, folder, places, report)

    run(experiment, store, run_trial=chatty)
    out = capsys.readouterr().out
    assert {character for character in out if not character.isprintable()} == {"\n"}
    trial = experiment.trials()[0]
    about = [line for line in out.splitlines() if trial.id in line]
    assert about == [f"{trial.id} starts", f"[1/3] {trial.id}       0 s  miou val 99.9"]

    monkeypatch.setattr(progress, "QUIET_SECONDS", 0)
    run(experiment, Store(store.root / "again"), run_trial=chatty)
    assert "train  epoch 1/2  loss 0.250  score 50.0  100 images/s  1:01 left" in capsys.readouterr().out


def test_a_terminal_gets_a_live_line(experiment, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stdout", terminal := Terminal())
    trial = experiment.trials()[0]
    with progress.Display() as display:
        display.expect([trial])
        display.started(trial)
        display.progress(told(trial, 1))
        time.sleep(0.5)
        display.finished(sweep.failure(trial, "it broke"))
    shown = terminal.getvalue()
    assert "epoch 1/2" in shown and "\x1b" in shown
    assert "FAILED: it broke" in shown


@pytest.fixture(scope="module")
def ray_here():
    from ray import cloudpickle

    with executors.through_ray():
        cloudpickle.register_pickle_by_value(sys.modules[__name__])  # its processes cannot import this file
        yield
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.mark.ray
def test_ray_starts_processes_that_keep_their_memory(ray_here):
    import ray

    found = ray.get(ray.remote(lambda: dict(os.environ)).remote())
    assert ENVIRONMENT.items() <= found.items()


@pytest.mark.ray
def test_ray_survives_what_its_processes_do(experiment, store, ray_here, capfd):
    results = run(experiment, store, {0: "kill", 1: "die once", 2: "raise"}, executor=executors.through_ray())
    assert statuses(results) == kept(store) == {0: "failed", 1: "done", 2: "failed"}
    errors = {result.trial.seed: result.error for result in results.values()}
    assert "its process died twice" in errors[0] and errors[2] == "RuntimeError: no luck"
    for result in results.values():
        assert (store.folder(result.trial) / "log.txt").read_text().startswith("it began")
    out = capfd.readouterr().out
    assert "starts again: its process died" in out
    assert {character for character in out if not character.isprintable()} == {"\n"}
    assert all(line.startswith(("refcoco.", "[", "3 trials")) for line in out.splitlines() if line), out


def test_only_one_process_starts_trials(experiment, store, capsys):
    def second(trial, folder, places, report):
        with pytest.raises(
            UserError, match=rf"at work in .* \(experiment stand_in, host .*, pid {os.getpid()}, since "
        ):
            run(experiment, store, run_trial=never)
        return stand_in({}, trial, folder, places, report)

    assert statuses(run(experiment, store, run_trial=second)) == dict.fromkeys((0, 1, 2), "done")
    assert store.driver() is None
    assert not (store.root / "trials" / ".driver.json").exists()
    assert run(experiment, store, run_trial=never)  # to look at what is done nobody has to wait


def test_the_process_that_starts_trials_holds_them_while_it_lives(experiment, store):
    code = f"""
import os
from pathlib import Path
from ris_bench.results import Store
with Store(Path({str(store.root)!r})).held("mine"):
    print("held", flush=True)
    os.kill(os.getpid(), 9)
"""
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert killed.stdout == "held\n" and (store.root / "trials" / ".driver.json").exists()
    assert store.driver() is None
    assert statuses(run(experiment, store)) == dict.fromkeys((0, 1, 2), "done")


def test_what_goes_on_is_told_by_files(experiment, store, capsys):
    seen = []

    def look(trial, folder, places, report):
        result = stand_in({0: "raise"}, trial, folder, places, report)
        seen.append(status.of(store.root))
        return result

    run(experiment, store, {0: "raise"})
    run(experiment, store, run_trial=look, only=".s1.")
    capsys.readouterr()
    assert not seen  # both were done
    for path in store.root.glob("trials/*.s[12].*/result.json"):
        path.unlink()
        path.with_name("log.txt").unlink()
        path.parent.rmdir()
    run(experiment, store, run_trial=look, only=".s1.")
    (found,) = seen
    (sweep_,) = found.sweeps
    assert (sweep_.done, len(sweep_.failed), sweep_.running, sweep_.waiting) == (0, 1, 1, 1)
    (running,) = found.running
    assert running.told["step"] == 1 and running.told["pid"] == os.getpid() and not running.gone
    lines = found.text().splitlines()
    assert lines[0].startswith(f"at work in {store.root}: experiment stand_in host ")
    assert any("train  epoch 1/2  loss 0.250" in line for line in lines)
    assert any(line.startswith("failed: refcoco.") and "RuntimeError: no luck; see " in line for line in lines)
    assert json.dumps(found.record())

    # Left behind by a process that is no more.
    trial = experiment.trials()[2]
    folder = store.begin(trial)
    (folder / "progress.json").write_text(json.dumps({**told(trial, 5)._asdict(), **this_process(), "pid": 2**22 + 1}))
    later = status.of(store.root / "stand_in")
    assert later.driver is None and later.running[0].gone and later.sweeps[0].running == 0
    assert "its process is gone" in later.text() and later.text().startswith("nobody starts trials in ")
    with pytest.raises(UserError, match="is no results folder"):
        status.of(store.root / "nowhere")


def test_status_needs_no_torch():
    code = "import sys, ris_bench.cli; print({'torch', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "set()\n"


@pytest.mark.ray
def test_ray_ends_what_hangs_and_what_is_stopped(experiment, store, ray_here, capfd):
    results = run(experiment, store, {1: "hang once"}, executor=executors.through_ray(patience=3))
    assert statuses(results) == dict.fromkeys((0, 1, 2), "done")
    assert "starts again: its process died" in capfd.readouterr().out

    other = Store(store.root / "stopped")
    pressed = []

    def press() -> None:
        while not list(other.root.glob("trials/.*.partial/progress.json")):
            time.sleep(0.1)
        pressed.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run(experiment, other, dict.fromkeys((0, 1, 2), "work on"), executor=executors.through_ray())
    assert time.monotonic() - pressed[0] < executors.GRACE_SECONDS
    assert "stops after the step that is running" in capfd.readouterr().err
    assert kept(other) == {} and not list(other.root.glob("trials/.stop*"))
    # Each was told, and what it had is there for the next attempt.
    assert 1 <= len(list(other.root.glob("trials/.*.partial/progress.json"))) <= 3


@pytest.mark.ray
def test_ray_relays_progress_and_agrees_with_in_process(experiment, store, ray_here, capsys, monkeypatch):
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0)
    through_ray = run(experiment, store, executor=executors.through_ray(max_concurrent=1))
    said = [line.split("  ")[-1] for line in capsys.readouterr().out.splitlines()[1:]]
    assert [line[-6:] for line in said if line] == ["starts", "1 left", "l 99.9"] * 3  # one after another
    in_process = run(experiment, Store(store.root / "again"))
    assert {key: result.scores for key, result in through_ray.items()} == {
        key: result.scores for key, result in in_process.items()
    }


@pytest.mark.ray
def test_ray_refuses_what_no_node_has(experiment, store, ray_here):
    with pytest.raises(UserError, match="1 CPU and 1 GPUs, which no node has .*--gpus-per-trial"):
        run(experiment, store, run_trial=never, executor=executors.through_ray(gpus_per_trial=1))
    assert not store.root.exists()


@pytest.mark.ray
def test_ray_is_told_what_memory_trials_take(experiment, store, ray_here):
    """A node has room for fewer trials of a backbone than it has processors, and for none that is too large."""
    import ray

    room = ray.cluster_resources()["memory"] / 1e9
    at_work = store.root / "at_work"

    def alone(trial, folder, places, report):
        at_work.mkdir()  # it fails if another trial is at work
        time.sleep(1)
        at_work.rmdir()
        return stand_in({}, trial, folder, places, report)

    store.root.mkdir()
    needs = {"": 0.1, "tiny-clip-vit": 0.6 * room}
    results = run(experiment, store, run_trial=alone, executor=executors.through_ray(memory_gb=needs))
    assert statuses(results) == dict.fromkeys((0, 1, 2), "done"), [result.error for result in results.values()]
    with pytest.raises(UserError, match=r"1 CPU and 0 GPUs and .* GB of memory, which no node has .* GB\); lower"):
        too_much = executors.through_ray(memory_gb={"": 2 * room})
        run(experiment, Store(store.root / "2"), run_trial=never, executor=too_much)


def test_the_largest_trials_begin_first(experiment):
    trial = experiment.trials()[0]
    longer = replace(trial, train=replace(trial.train, epochs=5), seed=7)
    full = replace(trial, method=METHODS.resolve("full", {}))
    impossible = replace(trial, method=METHODS.resolve("conv-adapter", {}))
    wider = replace(
        trial, backbone=BACKBONES.resolve("tiny-clip-vit", {"image_size": 2 * trial.backbone.options["image_size"]})
    )
    given = [impossible, *experiment.trials(), full, longer, wider]
    assert executors.largest_first(given) == [wider, longer, full, *experiment.trials(), impossible]


def test_an_address_without_a_cluster_is_refused_at_once():
    with pytest.raises(UserError, match="no Ray cluster at 127.0.0.1:1 .*HOST:PORT or auto"):
        executors._connect("127.0.0.1:1")
