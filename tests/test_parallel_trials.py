"""A trial of several processes from start to end: they are gone with it, and what goes wrong in one ends it."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY_HEAD

from ris_bench import cli, experiment, parallel
from ris_bench.data.dataset import DATASETS
from ris_bench.parallel import Team
from ris_bench.records import Places, Result, plain
from ris_bench.trial import run_trial

EXPERIMENT = f"""\
name: two
title: Two processes
defaults:
  dataset: {{scenes: {{num_train: 3, num_eval: 5}}}}
  backbone: tiny-clip-vit
  method: frozen
  head: {json.dumps({"etris": {**TINY_HEAD, "dropout": 0.0}})}
  train: {{epochs: 2, batch_size: 3, lr: 1.0e-4, milestones: [], gamma: 0.1, precision: fp32}}
  eval: {{select_on: val, splits: [val]}}
  seed: 0
grid: {{method: [frozen]}}
table:
  rows: method
  columns: [{{header: val, value: miou, splits: [val]}}]
"""
RUN = """
import json, multiprocessing, signal, sys
from pathlib import Path
from ris_bench.records import Trial
from ris_bench.records import Places
from ris_bench.trial import run_trial

asked = []

def report(progress):
    if asked:
        raise KeyboardInterrupt
    if progress.step == 1:
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *event: asked.append(event))
    trial, folder = Trial.from_dict(json.loads(sys.argv[1])), Path(sys.argv[2])
    run_trial(trial, folder, Places(Path("nowhere"), None, checkpoint_seconds=3600, processes=2), report)
"""


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Scenes are generated once for all tests of this file, and other processes find them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RIS_BENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "two.yaml"
    path.write_text(EXPERIMENT)
    return path


def test_from_the_command_line(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    results = {}
    for number in ("1", "2"):
        flags = ["--executor", "local", "--processes-per-trial", number, "--results", number]
        assert cli.main(["run", "two.yaml", *flags]) == 0
        [file] = Path(number).glob("trials/*/result.json")
        results[number] = Result.from_json(file.read_text())
    one, two = results["1"], results["2"]
    assert two.trial == one.trial and two.params == one.params
    assert two.cost.device == f"2 x {one.cost.device}"
    assert [epoch.loss for epoch in two.history] == pytest.approx([epoch.loss for epoch in one.history], abs=1e-4)
    assert two.scores["val"].num_expressions == one.scores["val"].num_expressions
    assert two.scores["val"].miou == pytest.approx(one.scores["val"].miou, abs=0.01)


def test_what_goes_wrong_in_one_process_is_the_failure_of_the_trial(path, tmp_path):
    [trial] = experiment.load(path, ["dataset={scenes: {num_train: 3, num_eval: 6}}"]).trials()
    samples = DATASETS.build(trial.dataset).read(Path("nowhere"), "val")
    assert 32 < len(samples) <= 64  # the second process has the second batch
    samples[-1].image_path.write_bytes(b"no image")
    result = run_trial(trial, tmp_path, Places(Path("nowhere"), None, processes=2), lambda progress: None)
    assert result.status == "failed" and result.params is not None
    assert result.error.startswith("UserError: ") and samples[-1].image_path.name in result.error
    assert "in process 2 of 2" in (tmp_path / "log.txt").read_text()


def die(team: Team) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_death_of_one_process_is_noticed():
    with (
        pytest.raises(parallel.ProcessDiedError, match=r"process 2 of 2 .* died \(by SIGKILL\)"),
        parallel.team(2, die) as team,
    ):
        team.gather(None)


def test_a_trial_of_which_one_process_was_killed_begins_again(path, tmp_path):
    [trial] = experiment.load(path).trials()
    killed = []

    def report(progress) -> None:
        if progress.step == 3 and not killed:
            [other] = multiprocessing.active_children()
            other.kill()
            killed.append(other.pid)

    result = run_trial(trial, tmp_path, Places(Path("nowhere"), None, checkpoint_seconds=1e-9, processes=2), report)
    assert result.status == "done" and killed
    log = (tmp_path / "log.txt").read_text()
    assert "process 2 of 2 of the trial died (by SIGKILL)" in log and "goes on from the checkpoint" in log


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "stopped"])
def test_no_process_outlives_the_one_that_leads(killed, path, tmp_path):
    """Nor does Ctrl-C, which all of them receive, end another before it: it saves where the trial stands."""
    [trial] = experiment.load(path, ["train.epochs=10000"]).trials()
    (tmp_path / "main.py").write_text(RUN)
    command = [sys.executable, tmp_path / "main.py", json.dumps(plain(trial)), tmp_path]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as leader:
        other = int(leader.stdout.readline())
        os.kill(other, 0)
        if killed:
            leader.kill()
        else:
            os.killpg(leader.pid, signal.SIGINT)
        said = leader.stderr.read()
    if not killed:
        assert said.strip().endswith("KeyboardInterrupt") and list((tmp_path / "checkpoints").iterdir())
    deadline = time.monotonic() + 20
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.kill(other, 0)
            time.sleep(0.05)
