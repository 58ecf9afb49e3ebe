"""Trials come to the same with what is kept on disk as without it, and say what they had to leave out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import STAND_IN

from ris_bench import cli, experiment, features, pixels, trial
from ris_bench.progress import Display, describe_scores
from ris_bench.records import Places, Progress, Result, plain
from ris_bench.trial import run_trial

pytestmark = pytest.mark.usefixtures("cache")

FILE = Path(__file__).parents[1] / "experiments" / "quickstart.yaml"
SHORT = ["train.epochs=1", "eval.every=1", "dataset={scenes: {num_train: 12, num_eval: 4}}", "train.batch_size=8"]
SHORT += ["eval.splits=[val, testA]", "eval.threshold=0.1"]


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    """They take most of the time of so small a trial."""
    monkeypatch.setattr(trial.evaluation, "overlays", lambda *_, **given: None)


def short(method: str, *assignments: str):
    return next(t for t in experiment.load(FILE, [*SHORT, *assignments]).trials() if t.method.name == method)


def run(one, folder: Path, feature_bytes: int, report=lambda progress: None) -> Result:
    folder.mkdir(parents=True)
    result = run_trial(one, folder, Places(Path("nowhere"), None, feature_bytes=feature_bytes), report)
    assert result.status == "done", result.error
    return result


def same(tmp_path: Path, results: dict[str, Result]) -> bool:
    """Scores, curves, weights and predictions."""
    first, *others = results.values()
    files = ("tuned.safetensors", "expressions.parquet")
    return all(one.scores == first.scores and one.history == first.history for one in others) and all(
        len({(tmp_path / name / file).read_bytes() for name in results}) == 1 for file in files
    )


def kinds(folder: Path) -> list[str]:
    return sorted(path.name.partition("-")[0] for path in folder.iterdir() if path.is_dir())


@pytest.fixture
def kept(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(trial.cache, "folder", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "features"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_kept_or_not_a_trial_comes_to_the_same(precision, kept, tmp_path, monkeypatch):
    one = short("frozen", f"train.feature_precision={precision}")
    results = {name: run(one, tmp_path / name, bytes) for name, bytes in (("live", 0), ("made", 10**9))}
    assert kinds(kept) == ["features", "images", "images", "masks"]  # images of the evaluation's splits only
    for module in (features, pixels):
        monkeypatch.setattr(module, "chunks", lambda *_: pytest.fail("it was made again"))
    results["found"] = run(one, tmp_path / "found", 10**9)
    assert same(tmp_path, results)

    live, rounded = results["made"].scores["val"], results["made"].scores["val"].rounded
    lines = [line for line in (tmp_path / "made" / "log.txt").read_text().splitlines() if "rounded to" in line]
    assert "rounded" not in plain(results["made"])["scores"]["testA"]
    if precision == "fp32":
        assert not rounded and not lines and "feature_precision" not in plain(one)["train"]  # the same trial as before
        return
    assert one.id != short("frozen").id
    assert 0 < abs(rounded["miou"] - live.miou) < 0.01 and 0 < abs(rounded["oiou"] - live.oiou) < 0.01
    for name, metric in (("miou", "mIoU"), ("oiou", "oIoU")):
        before = getattr(live, name)
        assert f"{metric} {rounded[name]:.6f} instead of {before:.6f} ({rounded[name] - before:+.6f})" in lines[0]
    difference = 100 * (rounded["miou"] - live.miou)
    assert f"({difference:+.2f} with image features in bf16)  testA" in describe_scores(results["made"])
    assert Result.from_json(results["made"].to_json()) == results["made"]


def test_a_tower_that_is_tuned_has_images_kept(kept, tmp_path):
    one = short("full")
    assert same(tmp_path, {name: run(one, tmp_path / name, bytes) for name, bytes in (("live", 0), ("made", 10**9))})
    assert kinds(kept) == ["images", "images", "images", "masks"]


def test_what_there_is_no_room_for_is_said(kept, tmp_path):
    seen = []
    run(short("frozen"), tmp_path / "t", 1000, seen.append)
    assert seen[0].warning is None
    [warning] = {progress.warning for progress in seen if progress.phase != "load"}
    assert "frozen features of 12 images are not kept" in warning and "--feature-cache allows 1e-06 GB" in warning
    log = (tmp_path / "t" / "log.txt").read_text()
    assert warning in log and "letterboxed masks of" in log and "letterboxed images of 4 photos" in log


def test_a_sweep_warns_once(capsys):
    with Display() as display:
        for one in (short("frozen"), short("full")):
            display.started(one)
            display.progress(Progress(one.id, "train", 1, 2, 1, 9, 0.25, 100.0, 61.0, 0.5, "the features take 94 GB"))
    assert capsys.readouterr().out.count("warning: the features take 94 GB\n") == 1


def test_no_more_is_taken_than_the_flag_allows(kept, tmp_path, capfd, monkeypatch):
    """Through the command, whose default is 50 GB."""
    monkeypatch.chdir(tmp_path)
    head, _, rest = STAND_IN.partition("  dataset: refcoco\n")
    Path("small.yaml").write_text(
        head
        + "  dataset: {scenes: {num_train: 12, num_eval: 4}}\n"
        + rest.replace("tiny-clip-vit", "tiny-clip-rn")
        + "grid: {seed: [0, 1]}\ntable: {rows: seed, columns: [{header: val, value: miou, splits: [val]}]}\n"
    )
    arguments = ["run", "small.yaml", "--executor", "local", "--feature-cache"]
    assert cli.main([*arguments, "0.001"]) == 0
    out = capfd.readouterr().out
    assert out.count("warning: frozen features of 12 images are not kept") == 1
    assert "--feature-cache allows 0.001 GB" in out
    assert sum(os.path.getsize(file) for file in kept.rglob("*") if file.is_file()) <= 10**6
    assert "features" not in kinds(kept)
    with pytest.raises(SystemExit):
        cli.main(["run", "--help"])
    assert "(default: 50)" in capfd.readouterr().out
