"""The scores of trials by other protocols: kept only where they are the trial's own, and tabulated as what they are."""

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import STAND_IN

from ris_bench import cli, rescored, sweep
from ris_bench.errors import UserError
from ris_bench.experiment import Experiment, load
from ris_bench.protocols import CRIS, RELA
from ris_bench.records import Scores
from ris_bench.results import Store
from ris_bench.scoring import Score

TEXT = (
    STAND_IN.replace("splits: [val]", "splits: [val, testA]")
    + """\
grid:
  method: [frozen, lora]
  train.lr: [0.5, 1.0]
choose: [train.lr]
table:
  rows: method
  labels: {lora: LoRA}
  columns:
    - {header: Scores, value: miou, splits: [val, testA], best: max}
    - {header: Scores, value: oiou, splits: [testA]}
    - {header: Precise, value: pr@0.9, splits: [testA]}
"""
)
OWN = {"frozen": 0.25, "lora": 0.5}


@pytest.fixture
def experiment(tmp_path, monkeypatch) -> Experiment:
    (tmp_path / "stand_in.yaml").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    experiment, store = load(Path("stand_in.yaml")), Store(tmp_path / "results")
    for run in experiment.runs:
        miou = OWN[run.trial.method.name] + run.trial.train.lr / 10
        scores = Scores(oiou=0.5, miou=miou, precision_at={"0.9": 0.125}, num_expressions=7)
        result = replace(sweep.failure(run.trial, ""), status="done", error=None)
        store.finish(store.begin(run.trial), replace(result, scores={"val": scores, "testA": scores}))
    return experiment


def folder(experiment: Experiment, method: str, lr: float) -> Path:
    return next(
        Path("results/trials") / run.trial.id
        for run in experiment.runs
        if (run.trial.method.name, run.trial.train.lr) == (method, lr)
    )


def scored(own: float, other: float, split: str = "testA", dataset: str = "refcoco", by: str = "cris") -> list[Score]:
    """What `scoring.score` gives for a split of which ris-bench makes the mIoU `own`."""

    def one(protocol: str, kind: str, value: float, *marks: str) -> Score:
        return Score(
            **{"protocol": protocol, "metric": kind, "kind": kind, "dataset": dataset, "split": split, "value": value},
            **{"difference": None, "num_expressions": 7, "marks": marks},
        )

    found = [one("ris-bench", "overall", 0.5), one("ris-bench", "mean", own)]
    return [*found, one(by, "overall", other / 2, "geometry"), one(by, "mean", other), one(by, "Pr@0.9", 0.25)]


def test_a_report_by_another_protocol(experiment, capsys):
    # The rate was chosen by the trial's own score on val, which nobody has to score again.
    rescored.keep(folder(experiment, "lora", 1.0), scored(0.6, 0.7))
    assert cli.main(["report", "stand_in.yaml", "--protocol", "etris"]) == 0
    out, err = capsys.readouterr()
    rows = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in out.splitlines()[4:6]}
    assert rows == {"frozen": ["–"] * 4, "LoRA": ["–", "**70.00**", "35.00", "25.00"]}
    assert "- By the protocol cris: every sentence (\\`sent\\`), compared in the original image; letterbox-exact" in out
    assert "- Of some scores, the maps were made in another geometry than the protocol's" in out
    assert "by the protocol ris-bench" not in out
    # Of the trials that the table shows, LoRA's val is not scored either.
    lacking = ", ".join(folder(experiment, method, 1.0).name for method in OWN)
    assert (
        f"not scored by cris: {lacking}; " in err and "`ris-bench score F --protocol cris --trial TRIAL` do that" in err
    )
    made = sorted(path.name for path in Path("results/stand_in/cris").iterdir())
    assert made == ["table.csv", "table.md", "table.tex"]


def test_what_is_kept_grows_split_by_split(experiment):
    place = folder(experiment, "frozen", 0.5)
    rescored.keep(place, scored(0.3, 0.4))
    rescored.keep(place, scored(0.3, 0.2, split="val"))
    rescored.keep(place, scored(0.3, 0.1, by="rela"))
    results, _ = Store(Path("results").absolute()).collect(run.trial for run in experiment.runs)
    found = rescored.rescored(results, Store(Path("results").absolute()), CRIS)
    assert found.results[place.name].scores["testA"] == Scores(
        oiou=0.2, miou=0.4, precision_at={"0.9": 0.25}, num_expressions=7
    )
    assert found.results[place.name].scores["val"].miou == 0.2
    assert place.name not in found.lacking and len(found.lacking) == 3
    assert place.name in rescored.rescored(results, Store(Path("results").absolute()), RELA).lacking


@pytest.mark.parametrize(
    "scores, message",
    [
        (scored(0.302, 0.4), "the predictions have 30.20 mIoU on testA, and the trial in .* has 30.00: they are not"),
        (scored(0.3, 0.4, dataset="refcoco+"), "has no scores of refcoco\\+ testA: the predictions are not of this"),
        (scored(0.3, 0.4, split="testB"), "has no scores of refcoco testB"),
    ],
)
def test_predictions_of_something_else_are_refused(experiment, scores, message):
    place = folder(experiment, "frozen", 0.5)
    with pytest.raises(UserError, match=message):
        rescored.keep(place, scores)
    assert not (place / rescored.FILE).exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"cris": {"testA": {"oiou": 2, "miou": 0}}}', '{"cris": {"testA": {}}}'])
def test_a_damaged_file_is_named(experiment, text, capsys):
    path = folder(experiment, "lora", 1.0) / rescored.FILE
    path.write_text(text)
    assert cli.main(["report", "stand_in.yaml", "--protocol", "cris"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"{path.name} holds no scores by protocols" in err


def test_differences_between_rows_are_those_of_ris_bench(experiment, capsys):
    assert cli.main(["report", "stand_in.yaml", "--protocol", "cris", "--against", "frozen"]) == 2
    assert "leave out --protocol" in capsys.readouterr().err
    assert cli.main(["report", "stand_in.yaml", "--protocol", "criss"]) == 2
    assert "there is no protocol 'criss'" in capsys.readouterr().err
