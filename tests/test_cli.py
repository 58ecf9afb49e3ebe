"""The promises of `run_bench.py`: exit codes, streams, what is left behind. Trials are stand-ins."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import STAND_IN

from ris_bench import cli, experiment, sweep
from ris_bench import code as identity
from ris_bench.errors import UserError
from ris_bench.records import Result, Scores

ROOT = Path(__file__).parent.parent
TEXT = (
    STAND_IN
    + """\
grid:
  method: [frozen, lora]
  seed: [0, 1]
table:
  rows: method
  columns:
    - {header: val, value: miou, splits: [val]}
"""
)


def done(trial, folder, places, report) -> Result:
    scores = {"val": vars(Scores(oiou=0.5, miou=0.25, precision_at={}, num_expressions=1))}
    record = json.loads(sweep.failure(trial, "").to_json())
    return Result.from_json(json.dumps(record | {"status": "done", "error": None, "scores": scores}))


def second_seed_fails(trial, folder, places, report) -> Result:
    if trial.seed == 1:
        raise ArithmeticError("the loss is nan")
    return done(trial, folder, places, report)


def stops(trial, folder, places, report) -> Result:
    raise KeyboardInterrupt


def never(trial, folder, places, report) -> Result:
    raise AssertionError("there is nothing to run")


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys):
    """Calls the command line in an empty folder with data that can be located, and gives (code, stdout, stderr)."""
    (tmp_path / "stand_in.yaml").write_text(TEXT)
    (tmp_path / "datasets/images/train2014").mkdir(parents=True)
    (tmp_path / "datasets/refcoco").mkdir()
    for name in ("instances.json", "refs(unc).p"):
        (tmp_path / "datasets/refcoco" / name).touch()
    monkeypatch.chdir(tmp_path)

    def call(*arguments, run_trial=never, executor="local"):
        monkeypatch.setattr("ris_bench.trial.run_trial", run_trial)
        code = cli.main(["run", "stand_in.yaml", "--executor", executor, *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_exit_0_and_a_second_run_only_renders(bench, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)  # it cannot be imported: neither run needs it
    code, out, err = bench(run_trial=done)
    table = (tmp_path / "results/stand_in/table.md").read_text()
    assert (code, err) == (0, "") and out.endswith(f"\n\n{table}") and "25.00" in table
    assert bench(executor="ray") == (0, table, "")


def test_a_second_run_reads_the_file_where_it_may_mean_something_else(bench, tmp_path, monkeypatch):
    def read(*arguments):
        raise UserError("it is read")

    code, out, err = bench(run_trial=done)
    load = experiment.load
    monkeypatch.setattr(experiment, "load", read)
    assert bench()[0] == 0 and bench("--only", ".lora.")[0] == 0  # with neither PyTorch nor the registries
    again = [("--set", "train.lr=1.0e-4"), ("--only", "unheard"), ("--dry-run",), ("--results", "elsewhere")]
    assert all(bench(*arguments)[0] == 2 for arguments in again)
    monkeypatch.setattr(identity, "digest", lambda: "of other code")
    assert bench()[2] == "error: it is read\n"
    monkeypatch.setattr(experiment, "load", load)
    assert bench()[0] == 0
    monkeypatch.setattr(experiment, "load", read)
    assert bench()[0] == 0
    (tmp_path / "results/stand_in/plan.jsonl").write_text("{")
    assert bench()[2] == "error: it is read\n"


def test_exit_1_names_the_failed_trials_and_their_logs(bench, tmp_path):
    code, out, err = bench(run_trial=second_seed_fails)
    lines = [line for line in err.splitlines() if line.startswith("failed: ")]
    assert code == 1 and len(lines) == 2 and "25.00" in out
    for line in lines:
        message, log = line.split("; see ")
        assert message.endswith("ArithmeticError: the loss is nan")
        assert "Traceback" in (tmp_path / log).read_text()
    assert bench(run_trial=done)[0] == 0


def test_exit_130_keeps_what_is_finished(bench, tmp_path):
    code, out, err = bench(run_trial=stops)
    assert (code, err) == (130, "stopped: what has finished is kept; the same command goes on with the rest\n")
    assert not list(tmp_path.glob("results/trials/*/result.json"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data", "elsewhere"], "elsewhere"),
        (["--set", "nonsense=1"], "nonsense"),
        (["--set", "train.lr=1e-4"], "1.0e-4"),
        (["--set", "method={bridger: {width: 7}}"], ""),
        (["--set", "backbone=clip-r101", "--weights", "."], "RN101.pt"),
        (["--only", "unheard"], "'unheard'"),
        (["--results", "stand_in.yaml"], "stand_in.yaml"),
    ],
)
def test_bad_input_exits_2_with_one_line_and_leaves_nothing(bench, tmp_path, arguments, message):
    before = sorted(tmp_path.rglob("*"))
    code, out, err = bench(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert sorted(tmp_path.rglob("*")) == before


def test_without_ray_the_way_out_is_named(bench, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    code, out, err = bench(executor="ray")
    assert (code, out) == (2, "") and "--executor local" in err and not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--json"],
        ["--max-concurrent", "2"],
        ["--address", "auto"],
        ["--gpus-per-trial", "1.5"],
        ["--executor", "threads"],
        ["--recompute", "--speed", "compiled"],
        ["--frobnicate"],
    ],
)
def test_bad_flags_exit_2(bench, arguments):
    with pytest.raises(SystemExit) as caught:
        bench(*arguments)
    assert caught.value.code == 2


@pytest.mark.parametrize("shares", [("2", "3"), ("0.5", "2"), ("auto", "2")])
def test_each_process_has_one_gpu_or_none(bench, shares, capsys):
    with pytest.raises(SystemExit):
        bench("--gpus-per-trial", shares[0], "--processes-per-trial", shares[1], executor="ray")
    assert ("not with" if shares[0] == "auto" else "one GPU or none") in capsys.readouterr().err


def test_dry_run_lists_trials_without_data_and_leaves_nothing(bench, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    code, out, err = bench("--dry-run", "--json", "--data", "elsewhere", "--weights", "elsewhere")
    trials = json.loads(out)
    assert (code, err) == (0, "")
    assert [set(trial) for trial in trials] == [{"id", "backbone", "method", "dataset", "seed", "params"}] * 4
    frozen, lora = (next(t for t in trials if t["method"] == name) for name in ("frozen", "lora"))
    assert frozen["id"].startswith("refcoco.tiny-clip-vit.frozen.s0.") and frozen["backbone"] == "tiny-clip-vit"
    assert frozen["params"]["tunable_backbone"] == 0 < lora["params"]["tunable_backbone"]
    assert frozen["params"]["tunable_head"] == lora["params"]["tunable_head"]

    code, out, err = bench("--dry-run", "--only", ".lora.")
    assert code == 0 and f"{lora['params']['total']:,}" in out and "frozen" not in out
    assert out.endswith("2 trials, 2 to run\n")
    assert sorted(tmp_path.rglob("*")) == before


SCRIPT = """
import signal, sys, time
import ris_bench.trial
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it
from ris_bench import cli, executors
executors.GRACE_SECONDS = 1
sys.path.insert(0, sys.argv[1])
from test_cli import done

def waits(trial, folder, places, report):
    if trial.seed == 0:
        return done(trial, folder, places, report)
    (folder / "waiting").touch()
    time.sleep(600)

ris_bench.trial.run_trial = waits
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    "executor, stop", [("local", signal.SIGTERM), pytest.param("ray", signal.SIGINT, marks=pytest.mark.ray)]
)
def test_a_signal_stops_the_sweep_and_keeps_what_is_finished(bench, tmp_path, executor, stop):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, script, str(ROOT / "tests"), "run", "stand_in.yaml", "--executor", executor]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes) as process:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("results/trials/.*/waiting")) or not list(tmp_path.glob("results/trials/*/r*")):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.1)
        # A terminal's Ctrl-C reaches every process of the command, a SIGTERM only the one that is named.
        (os.killpg if stop == signal.SIGINT else os.kill)(process.pid, stop)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert err.splitlines()[-1].startswith("stopped: what has finished is kept")
    results = [Result.from_json(path.read_text()) for path in tmp_path.glob("results/trials/*/result.json")]
    assert results and all(result.trial.seed == 0 and result.status == "done" for result in results)
    assert (tmp_path / "results/stand_in/table.md").exists()


@pytest.mark.ray
def test_executors_agree_to_the_last_bit(tmp_path, monkeypatch):
    monkeypatch.setenv("RIS_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(TEXT)
    sets = ["dataset={scenes: {num_train: 12, num_eval: 2}}", "method=lora", "seed=0", "train.dice=0.5"]
    for executor in ("local", "ray"):
        chosen = ["--executor", executor, "--results", executor, *(a for s in sets for a in ("--set", s))]
        assert cli.main(["run", "small.yaml", *chosen]) == 0
    ours, theirs = (next(Path(executor, "trials").glob("[!.]*")) for executor in ("local", "ray"))
    assert ours.name == theirs.name
    for name in ("tuned.safetensors", "expressions.parquet"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    first, second = (Result.from_json((folder / "result.json").read_text()) for folder in (ours, theirs))
    assert (first.scores, first.history) == (second.scores, second.history)


def test_run_bench_is_the_same_command():
    done = subprocess.run([sys.executable, "run_bench.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: run_bench.py ") and "exit code" in done.stdout
