"""What trackers are told, by one that writes it down, and by the packages themselves where they are installed."""

import sys
import time
from dataclasses import replace

import pytest
from conftest import TINY_HEAD

from ris_bench import sweep, trackers
from ris_bench.errors import UserError
from ris_bench.records import Choice, Cost, Epoch, Evaluation, Progress, Scores, Training, Trial

TRIAL = Trial(
    dataset=Choice(name="scenes"),
    backbone=Choice(name="tiny-clip-rn"),
    method=Choice(name="lora", options={"rank": 4}),
    head=Choice(name="etris", options=TINY_HEAD),
    train=Training(epochs=2, batch_size=2, lr=1e-3, milestones=(1,), gamma=0.1, precision="fp32"),
    eval=Evaluation(select_on="val"),
    seed=0,
)
SCORES = Scores(oiou=0.5, miou=0.25, precision_at={"0.5": 0.125}, num_expressions=8)
FAILED = sweep.failure(TRIAL, "no luck")
DONE = replace(
    FAILED,
    status="done",
    error=None,
    scores={"testA": SCORES},
    history=(Epoch(epoch=1, loss=0.5, lr=1e-3), Epoch(epoch=2, loss=0.25, lr=1e-4, miou=0.3, oiou=0.4)),
    cost=Cost(
        train_seconds=8.0,
        eval_seconds=2.0,
        train_images_per_second=16.0,
        peak_memory_bytes=1,
        tuned_bytes=1,
        device="CPU",
    ),
)


class Diary(trackers.Tracker):
    def __init__(self, fails: str = "") -> None:
        super().__init__("an experiment")
        self.lines, self.fails = [], fails

    def note(self, what: str, *more) -> None:
        if what == self.fails:
            raise ConnectionError("nobody answers\nin detail")
        self.lines.append((what, *more))

    def open(self, trial, settings):
        self.note("open", settings["train.lr"], settings["method.options.rank"])
        return trial.id

    def log(self, run, numbers, axis, at) -> None:
        assert run == TRIAL.id
        self.note("log", numbers, axis, at)

    def close(self, run, status) -> None:
        self.note("close", status)


def tell(tracker: trackers.Tracker, result=DONE) -> None:
    with tracker:
        tracker.started(TRIAL)
        tracker.progress(Progress(TRIAL.id, "load", 1, 2, 0, 9, None, None, None, None))
        tracker.progress(Progress(TRIAL.id, "train", 1, 2, 3, 9, 0.75, 100.0, 61.0, None))
        if result:
            tracker.finished(result)


def test_a_run_holds_settings_curves_and_scores():
    tell(diary := Diary())
    final = {"final/testA/mIoU": 0.25, "final/testA/oIoU": 0.5, "final/testA/Pr_0.5": 0.125}
    cost = {"train_seconds": 8.0, "eval_seconds": 2.0, "train_images_per_second": 16.0}
    cost |= {"peak_memory_bytes": 1, "tuned_bytes": 1, "processes": 1}
    assert diary.lines == [
        ("open", 1e-3, 4),
        ("log", {"train/step_loss": 0.75, "train/images_per_second": 100.0}, "step", 3),
        ("log", {"train/loss": 0.5, "train/lr": 1e-3}, "epoch", 1),
        ("log", {"train/loss": 0.25, "train/lr": 1e-4, "val/mIoU": 0.3, "val/oIoU": 0.4}, "epoch", 2),
        ("log", final | {f"cost/{name}": number for name, number in cost.items()}, "epoch", 2),
        ("close", "done"),
    ]


@pytest.mark.parametrize(("result", "status"), [(FAILED, "failed"), (None, "stopped")])
def test_how_a_trial_ended(result, status):
    tell(diary := Diary(), result)
    assert diary.lines[-1] == ("close", status)


@pytest.mark.parametrize("fails", ["open", "log", "close"])
def test_one_that_does_not_answer_is_left_alone(fails, capsys):
    diary = Diary(fails)
    tell(diary)
    tell(diary)
    assert capsys.readouterr().err == "warning: Diary is told nothing more (nobody answers)\n"


def test_weights_and_biases(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    tell(tracker := trackers.named("wandb", "an experiment"))
    assert not tracker.mute
    [kept] = tmp_path.glob(f"wandb/offline-run-*/run-{TRIAL.id}.wandb")
    over = time.monotonic() + 60  # wandb's own process writes in its own time
    while b"final/testA/mIoU" not in kept.read_bytes():
        assert time.monotonic() < over, kept.read_bytes()
        time.sleep(0.1)


def test_mlflow(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # what needs no database
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tmp_path.as_uri())
    tell(trackers.named("mlflow", "an experiment"), None)
    tell(tracker := trackers.named("mlflow", "an experiment"))
    assert not tracker.mute
    client = mlflow.MlflowClient()
    [run] = client.search_runs([client.get_experiment_by_name("an experiment").experiment_id])
    assert (run.info.run_name, run.info.status, run.data.params["train.lr"]) == (TRIAL.id, "FINISHED", "0.001")
    assert run.data.metrics["final/testA/oIoU"] == 0.5
    assert [point.value for point in client.get_metric_history(run.info.run_id, "train/loss")] == [0.5, 0.25]


def test_mlflow_says_what_it_does_not_take(monkeypatch):
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://else")
    with pytest.raises(UserError, match="--track mlflow does not work: "):
        trackers.named("mlflow", "an experiment")


@pytest.mark.parametrize("name", trackers.TRACKERS)
def test_one_that_is_not_installed(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f"--track {name} needs a package .*pip install {name}"):
        trackers.named(name, "an experiment")
