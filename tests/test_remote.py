"""Results at a URL, on machines that have nothing else in common: each is a cache folder of its own."""

from __future__ import annotations

import json
import os
import time
from functools import partial
from pathlib import Path

import fsspec
import pytest
from conftest import STAND_IN

from ris_bench import executors, remote, status, sweep
from ris_bench.cli import main
from ris_bench.errors import UserError
from ris_bench.experiment import Experiment, load
from ris_bench.records import Places, Progress, Result, Scores, Trial
from ris_bench.remote import UrlStore, store_at
from ris_bench.results import Store, this_process

TEXT = f"""{STAND_IN}
grid:
  seed: [0, 1]
table:
  rows: seed
  columns:
    - {{header: val, value: miou, splits: [val]}}
"""


@pytest.fixture
def experiment(tmp_path) -> Experiment:
    path = tmp_path / "stand_in.yaml"
    path.write_text(TEXT)
    return load(path)


@pytest.fixture
def trial(experiment) -> Trial:
    return experiment.trials()[0]


@pytest.fixture(params=["memory", "file"])
def url(request, tmp_path) -> str:
    return f"{request.param}://{tmp_path}/bucket/results"


@pytest.fixture
def on(url, tmp_path, monkeypatch):
    """The results as a machine sees them."""
    monkeypatch.setattr(remote, "PAUSES", ())

    def machine(name: str) -> UrlStore:
        monkeypatch.setenv("RIS_BENCH_CACHE", str(tmp_path / name))
        return store_at(url)

    return machine


def names(store: UrlStore) -> set[str]:
    return set(store.objects.versions())


def done(trial: Trial) -> Result:
    scores = Scores(oiou=0.5, miou=0.75, precision_at={}, num_expressions=1)
    record = json.loads(sweep.failure(trial, "").to_json()) | {"status": "done", "error": None}
    return Result.from_json(json.dumps(record | {"scores": {"val": vars(scores)}}))


def stand_in(ran: list[int], trial: Trial, folder: Path, places: Places, report) -> Result:
    ran.append(trial.seed)
    (folder / "log.txt").write_text("it began\n")
    (folder / "overlays").mkdir()
    (folder / "overlays" / "0.png").write_bytes(b"")
    report(Progress(trial.id, "train", 1, 2, 1, 9, 0.25, 100.0, 61.0, 0.5))
    return done(trial)


def run(experiment: Experiment, store: Store) -> list[int]:
    """The seeds that were run."""
    ran: list[int] = []
    job = sweep.Job(partial(stand_in, ran), store, Places(data=Path("/nowhere"), weights=None))
    sweep.run(experiment, job, executors.in_process(), check=lambda *places: None)
    return ran


def saved(folder: Path, *checkpoints: str) -> None:
    (folder / "checkpoints").mkdir(exist_ok=True)
    for path in (folder / "checkpoints").iterdir():
        path.unlink()
    for name in checkpoints:
        (folder / "checkpoints" / name).write_text(name)


def cut_off(store: UrlStore, trial: Trial, *checkpoints: str) -> Path:
    """An attempt that was stopped when it had these."""
    folder = store.begin(trial)
    with pytest.raises(KeyboardInterrupt), store.shared(trial, folder):
        (folder / "log.txt").write_text("so far\n")
        saved(folder, *checkpoints)
        raise KeyboardInterrupt
    return folder


def test_what_one_machine_has_run_another_knows(experiment, on, tmp_path):
    assert run(experiment, on("a")) == [0, 1]
    assert run(experiment, on("b")) == []
    found = names(on("b"))
    assert {f"stand_in/{name}" for name in ("plan.jsonl", "table.md", "table.csv", "table.tex")} <= found
    assert len(found) == 4 + 2 * 3, found  # nothing is left of attempts and drivers
    assert b"75.0" in on("b").objects.read("stand_in/table.md")

    store = on("c")
    store.objects.fs.get(store.objects.url, str(tmp_path / "copy"), recursive=True)
    assert {trial.id for trial in experiment.trials()} == set(Store(tmp_path / "copy").collect(experiment.trials())[0])
    # What is deleted there is run again, wherever it was known.
    for name in store.objects.versions(f"trials/{experiment.trials()[1].id}/"):
        store.objects.delete([name])
    assert run(experiment, on("a")) == [1]


def test_a_result_counts_only_when_all_of_it_is_there(trial, on, monkeypatch):
    """The upload is cut off after every number of files."""
    upload, uploaded = remote.Objects.upload, []

    def after(files: int):
        left = [None] * files

        def cut(objects: remote.Objects, file: Path, name: str) -> None:
            if not left:
                raise ConnectionError("the network is gone")
            left.pop()
            upload(objects, file, name)
            uploaded.append(name)

        return cut

    store = on("a")
    folder = store.begin(trial)
    for name in ("log.txt", "expressions.parquet", "tuned.safetensors"):
        (folder / name).write_text(name)
    for files in range(4):
        monkeypatch.setattr(remote.Objects, "upload", after(files))
        with pytest.raises(OSError, match="the network is gone"):
            store.finish(folder, done(trial))
        assert folder.exists() and f"trials/{trial.id}/result.json" not in names(store)
        other = on("b")
        other.refresh()
        assert other.read(trial) is None
    monkeypatch.setattr(remote.Objects, "upload", after(4))
    result = store.finish(folder, done(trial))
    assert uploaded[-1] == f"trials/{trial.id}/result.json"
    other.refresh()
    assert other.read(trial) == result


def test_what_is_done_is_not_replaced_and_what_failed_is(trial, on):
    late, first = on("a"), on("b")
    slow, failed = late.begin(trial), first.begin(trial)
    saved(failed, "000001-a.safetensors")
    (failed / "log.txt").write_text("it failed\n")
    first.finish(failed, sweep.failure(trial, "no luck"))
    store = on("c")
    folder = store.begin(trial)
    assert (folder / "checkpoints" / "000001-a.safetensors").exists()  # it goes on from there
    result = store.finish(folder, done(trial))
    assert names(store) == {f"trials/{trial.id}/result.json"}  # neither the log of the failure nor its checkpoints
    assert late.finish(slow, sweep.failure(trial, "too late")) == result
    assert not slow.exists()


def test_an_attempt_goes_on_on_another_machine(trial, on):
    remains = f"trials/.{trial.id}.shared.partial/"
    cut_off(on("a"), trial, "000001-a.safetensors", "000002-b.safetensors")
    second = on("b")
    folder = cut_off(second, trial, "000002-b.safetensors", "000003-c.safetensors")
    there = {name.removeprefix(remains) for name in names(second)}
    assert there == {"begun_by", "log.txt", "checkpoints/000002-b.safetensors", "checkpoints/000003-c.safetensors"}
    # So does one whose machine is this one, and one whose process is lost keeps its log.
    job = sweep.Job(stand_in, on("c"), Places(data=Path("/nowhere"), weights=None))
    assert job.lost(trial, "its node was lost").status == "failed"
    log = second.objects.read(f"trials/{trial.id}/log.txt")
    assert log.startswith(b"so far\nits node was lost")
    assert not [name for name in names(second) if name.startswith(remains)]
    again = on("b").begin(trial)
    assert {path.name for path in (again / "checkpoints").iterdir()} == {"000002-b.safetensors", "000003-c.safetensors"}
    assert not folder.exists()


def test_a_process_that_was_given_up_leaves_nothing(trial, on):
    ghost, store = on("a"), on("b")
    given_up, folder = ghost.begin(trial), store.begin(trial)
    with pytest.raises(OSError, match="another process has begun this trial since"):
        ghost.finish(given_up, done(trial))
    assert f"trials/{trial.id}/result.json" not in names(ghost)
    assert store.finish(folder, done(trial)).status == "done"


def test_how_far_an_attempt_is_is_told_elsewhere(experiment, trial, on, url, monkeypatch):
    monkeypatch.setattr(remote, "SHARE_SECONDS", 0.05)
    store, seen = on("a"), []

    def look(trial, folder, places, report):
        report(Progress(trial.id, "train", 1, 2, 5, 9, 0.25, 100.0, 61.0, 0.5))
        name = f"trials/.{trial.id}.shared.partial/progress.json"
        while store.objects.read(name) is None:
            pass
        monkeypatch.setenv("RIS_BENCH_CACHE", os.environ["RIS_BENCH_CACHE"] + "-elsewhere")
        seen.append(status.of(url))
        return done(trial)

    job = sweep.Job(look, store, Places(data=Path("/nowhere"), weights=None))
    sweep.run(experiment, job, executors.in_process(), only=".s0.", check=lambda *places: None)
    (found,) = seen
    assert found.root == url and found.driver["experiment"] == "stand_in"
    (running,) = found.running
    assert running.trial_id == trial.id and running.told["step"] == 5 and running.silent_seconds < 60
    later = status.of(f"{url}/stand_in")
    assert not later.running and later.driver is None and later.sweeps[0].done == 1


def test_only_one_process_starts_trials(on):
    store = on("a")
    with store.held("mine"):
        with pytest.raises(UserError, match=r"at work in .*bucket/results \(experiment mine, host .*, pid \d+, since"):
            on("b").held("yours").__enter__()
        assert store.driver()["experiment"] == "mine"
    assert store.driver() is None and not names(store)


@pytest.mark.parametrize("died", ["here", "elsewhere"])
def test_a_process_that_was_killed_holds_nothing_for_long(on, died, monkeypatch):
    store = on("a")
    told = {**this_process(), "pid": 2**22 + 1} if died == "here" else {**this_process(), "host": "node-7"}
    store.objects.write(".drivers/dead.json", told)
    if died == "elsewhere":
        with pytest.raises(UserError, match="host node-7.*forgotten after"):
            store.held("mine").__enter__()
        monkeypatch.setattr(remote, "GONE_SECONDS", 0.5)
        time.sleep(0.6)
    with store.held("mine"):
        monkeypatch.setattr(remote, "GONE_SECONDS", 200)
        assert len(names(store)) == 1
        assert status.of(store.place).driver["experiment"] == "mine"  # before there is anything else


@pytest.mark.parametrize("name", ["../../evil/result.json", "/evil", "a//b", "trials/./b", ".mirrored.json", "a\\b"])
def test_foreign_names_lead_nowhere(name):
    assert not remote._is_plain(name)
    assert remote._is_plain("trials/refcoco+.clip-r101.lora.s0.4de1a2c6/checkpoints/000001-0.safetensors")


def test_foreign_files_are_no_results(experiment, on):
    store = on("a")
    for name in ("trials/other/result.json", f"trials/{experiment.trials()[1].id}/result.json", "notes.txt"):
        store.objects.write(name, {"no": "result"})
    with pytest.warns(UserWarning, match="run again"):
        assert run(experiment, store) == [0, 1]
    assert {"trials/other/result.json", "notes.txt"} <= names(store)


def test_tables_that_cannot_be_uploaded_end_no_sweep(experiment, on, monkeypatch):
    def fail(objects, file, name):
        if name.endswith("table.md"):
            raise ConnectionError("the network is gone")
        return upload(objects, file, name)

    upload = remote.Objects.upload
    monkeypatch.setattr(remote.Objects, "upload", fail)
    with pytest.warns(UserWarning, match="the tables are not at .*the network is gone"):
        assert run(experiment, on("a")) == [0, 1]


def test_reports_and_trials_are_read_from_a_url(experiment, on, url, capsys):
    run(experiment, on("a"))
    on("b")
    assert main(["report", f"{url}/stand_in", "--format", "md"]) == 0
    assert "75.0" in capsys.readouterr().out
    assert main(["report", str(experiment.path), "--results", url, "--format", "md"]) == 0
    trial = experiment.trials()[0]
    folder = on("d").find(trial.id[:-2])
    assert {path.name for path in folder.iterdir()} == {"result.json", "log.txt", "overlays"}
    with pytest.raises(UserError, match="0 trials of .* begins"):
        on("d").find("nothing")


@pytest.mark.parametrize(
    ("place", "message"),
    [("nowhere://a/b", "cannot be opened"), ("hdfs3x://a", "cannot be opened"), ("file:///proc/none/r", "written to")],
)
def test_a_url_that_cannot_be_used_is_refused_in_a_line(place, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RIS_BENCH_CACHE", str(tmp_path))
    (tmp_path / "stand_in.yaml").write_text(TEXT)
    assert main(["run", str(tmp_path / "stand_in.yaml"), "--executor", "local", "--results", place]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(fsspec, "url_to_fs", lambda *a, **k: exec('raise ImportError("Install s3fs to access S3")'))
    with pytest.raises(UserError, match="s3://bucket takes another package .Install s3fs to access S3.: install it"):
        store_at("s3://bucket")


def test_memory_is_not_shared_with_other_processes(tmp_path, capsys):
    (tmp_path / "stand_in.yaml").write_text(TEXT)
    assert main(["run", str(tmp_path / "stand_in.yaml"), "--results", "memory://a"]) == 2
    assert "--executor local" in capsys.readouterr().err
