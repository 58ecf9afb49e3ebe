"""A search: what it suggests, that this follows from the results alone, and what is kept of it."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from conftest import STAND_IN

from ris_bench import cli, executors, plan, status, sweep
from ris_bench.errors import UserError
from ris_bench.experiment import load
from ris_bench.plan import Experiment
from ris_bench.records import Cost, Epoch, Params, Places, Provenance, Result, Scores, Trial
from ris_bench.report import drawing, figures, folder
from ris_bench.results import Store
from ris_bench.search import NONE, NUMBER, Halving, Suggestion, score

TEXT = (
    STAND_IN.replace("splits: [val]", "splits: [val, testA]").replace("epochs: 2", "epochs: 9")
    + """\
search:
  space:
    method.lora.text_rank: [2, 4, 8]
    train.lr: {low: 1.0e-4, high: 1.0e-2, log: true}
    method: [frozen, lora, {adapter: {image_hidden: 8}}]
    method.adapter.text_hidden: {low: 8, high: 64, step: 8}
    head.etris.dropout: {low: 0, high: 0.3, step: 0.1}
  trials: 20
  seed: 1
  parallel: 4
  asha: {eta: 3}
"""
)
PREFERENCE = {"frozen": 0.2, "lora": 0.4, "adapter": 0.3}


@cache
def made_by() -> Provenance:
    return sweep.failure(None, "").provenance


def failed(trial: Trial) -> Result:
    return Result(
        trial=trial,
        status="failed",
        error="no luck",
        scores={},
        selected_epoch=None,
        history=(),
        params=None,
        cost=None,
        provenance=made_by(),
    )


def quality(trial: Trial) -> float:
    """In [0, 1], the better the nearer lr is to 3e-3, and best with lora of rank 4."""
    rank = 0.2 if trial.method.options.get("text_rank") == 4 else 0.0
    return PREFERENCE[trial.method.name] + rank + 0.3 - 30 * abs(trial.train.lr - 3e-3)


def outcome(trial: Trial, seconds: float = 3600.0) -> Result:
    """As a training that approaches its quality would come to."""
    history = []
    for epoch in range(1, trial.train.epochs + 1):
        miou = quality(trial) * (1 - 0.5**epoch)
        history.append(Epoch(epoch=epoch, loss=1.0, lr=trial.train.lr, miou=miou, oiou=0.5))
        if miou < dict(trial.train.stop_below).get(epoch, 0):
            break
    scores = Scores(oiou=0.5, miou=history[-1].miou, precision_at={}, num_expressions=1)
    return replace(
        failed(trial),
        status="done",
        error=None,
        scores={"val": scores},
        selected_epoch=len(history),
        history=tuple(history),
        params=Params(tunable_backbone=5, tunable_head=5, moving_statistics=0, total=100),
        cost=Cost(
            train_seconds=seconds,
            eval_seconds=0.0,
            train_images_per_second=1.0,
            peak_memory_bytes=1,
            tuned_bytes=1,
            device="a machine",
        ),
    )


def read(tmp_path: Path, *replacements: tuple[str, str], sets: tuple[str, ...] = ()) -> Experiment:
    text = TEXT
    for old, new in replacements:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = tmp_path / "search.yaml"
    path.write_text(text, encoding="utf-8")
    return load(path, sets)


@pytest.fixture
def experiment(tmp_path) -> Experiment:
    return read(tmp_path)


def played(experiment: Experiment, find=outcome) -> list[Suggestion]:
    return experiment.search.replay(find)


# ---- what is suggested


def test_suggestions_are_of_the_space_and_conditional(experiment):
    made = played(experiment)
    assert [one.number for one in made] == list(range(1, 21))
    for one in made:
        labels, trial = one.labels, one.trial
        assert list(labels)[0] == "method"
        assert labels["method"].split("(")[0] == trial.method.name
        assert (labels["method.lora.text_rank"] == NONE) == (trial.method.name != "lora")
        assert (labels["method.adapter.text_hidden"] == NONE) == (trial.method.name != "adapter")
        assert 1e-4 <= trial.train.lr <= 1e-2
        assert str(trial.train.lr) == labels["train.lr"]
        assert trial.head.options["dropout"] in (0.0, 0.1, 0.2, 0.3)
        if trial.method.name == "adapter":
            assert trial.method.options["image_hidden"] == 8
            assert trial.method.options["text_hidden"] in range(8, 65, 8)
        assert trial.eval.splits == ("val",)  # no other split is looked at
    assert {one.trial.method.name for one in made} == {"frozen", "lora", "adapter"}


def test_it_learns_from_what_it_sees(tmp_path):
    made = {
        sampler: played(read(tmp_path, ("trials: 20", f"trials: 40\n  sampler: {sampler}"), ("asha: {eta: 3}", "")))
        for sampler in ("tpe", "random")
    }
    late = {sampler: sum(quality(one.trial) for one in each[20:]) / 20 for sampler, each in made.items()}
    assert late["tpe"] > late["random"] + 0.05


def test_it_is_a_function_of_the_results(experiment):
    """What comes after a wave depends on the waves up to it, on nothing else, and is the same every time."""
    whole = played(experiment)
    assert played(experiment) == whole
    for waves in range(5):
        known = {one.trial.id for one in whole[: 4 * waves]}
        assert (
            played(experiment, lambda t, known=known: outcome(t) if t.id in known else None) == whole[: 4 * waves + 4]
        )
    # One result missing of a wave: it is asked for, and nothing beyond.
    lacking = whole[6].trial.id
    assert played(experiment, lambda trial: None if trial.id == lacking else outcome(trial)) == whole[:8]
    other = replace(experiment.search, seed=2)
    assert [one.trial for one in other.replay(outcome)] != [one.trial for one in whole]


def test_a_longer_search_begins_as_a_shorter_one(experiment):
    longer = replace(experiment.search, trials=30).replay(outcome)
    assert longer[:20] == played(experiment)


def test_what_is_suggested_twice_is_run_once(tmp_path):
    experiment = read(
        tmp_path, (TEXT[TEXT.index("    method.lora") : TEXT.index("  trials")], "    method: [frozen, lora]\n")
    )
    asked = []
    made = experiment.search.replay(lambda trial: asked.append(trial) or outcome(trial))
    assert len(made) == 20
    assert {one.trial.method.name for one in made if one.first} == {"frozen", "lora"}
    assert sum(one.first for one in made) == len({one.trial.id for one in made}) == 2  # cut-offs make no other trial
    grown = experiment.after(outcome)
    assert len(grown.runs) == len(grown.trials()) == 2


def test_a_failure_is_no_end(experiment):
    def find(trial):
        return failed(trial) if trial.method.name == "lora" else outcome(trial)

    made = played(experiment, find)
    assert len(made) == 20
    assert (
        experiment.search.best([one.trial for one in made], {o.trial.id: find(o.trial) for o in made}).method.name
        != "lora"
    )


def test_hours_are_a_budget(tmp_path):
    """Every trial takes one; a wave that has begun is finished."""
    experiment = read(tmp_path, ("trials: 20", "gpu_hours: 10"))
    assert len(played(experiment)) == 12
    in_two = played(experiment, lambda trial: replace(one := outcome(trial), cost=replace(one.cost, processes=2)))
    assert len(in_two) == 8
    experiment = read(tmp_path, ("trials: 20", "trials: 6\n  gpu_hours: 10"))
    assert len(played(experiment)) == 6
    # What costs nothing does not go on for ever.
    experiment = read(tmp_path, ("trials: 20", "gpu_hours: 10"))
    assert len(played(experiment, lambda trial: failed(trial))) == 12


# ---- early stopping


def reached(trial: Trial, *scores: float, status: str = "done") -> Result:
    """After as many epochs."""
    history = tuple(Epoch(epoch=k + 1, loss=1.0, lr=1.0, miou=s, oiou=0.0) for k, s in enumerate(scores))
    return replace(outcome(trial), history=history, status=status)


def test_cut_offs_by_hand(experiment):
    trial = experiment.runs[0].trial
    halving = Halving(eta=3, first=1)
    assert list(halving.rungs(9)) == [1, 3]
    assert list(halving.rungs(10)) == [1, 3, 9]
    assert list(Halving(eta=2, first=2).rungs(9)) == [2, 4, 8]
    assert halving.cut_offs(trial, [reached(trial, 0.5)]) == ()  # of two, a third is none
    two = [reached(trial, 0.5), reached(trial, 0.4)]
    assert halving.cut_offs(trial, two) == ((1, 0.5),)
    five = [
        *two,
        reached(trial, 0.6, 0.3, 0.55),  # its best within three epochs was in the first
        reached(trial, 0.1, 0.2, 0.70009, 0.9),
        reached(trial, 0.9, 0.9, 0.9, status="failed"),
        reached(trial, 0.3, 0.3, 0.3),
    ]
    # Of six the best two; of four at epoch 3 the best one.
    assert halving.cut_offs(trial, five) == ((1, 0.5), (3, 0.7))
    assert halving.cut_offs(replace(trial, train=replace(trial.train, epochs=3)), five) == ((1, 0.5),)


def test_trials_are_stopped_and_the_best_is_none_of_them(experiment):
    made = played(experiment)
    assert all(one.trial.train.stop_below == () for one in made[:4])
    assert all([epoch for epoch, _ in one.trial.train.stop_below] == [1, 3] for one in made[4:8])
    results = {one.trial.id: outcome(one.trial) for one in made}
    stopped = [result for result in results.values() if result.stopped]
    assert 3 < len(stopped) < 17
    assert {result.history[-1].epoch for result in stopped} == {1, 3}
    best = experiment.search.best([one.trial for one in made], results)
    assert not results[best.id].stopped
    assert score(results[best.id]) == max(map(score, results.values()))


# ---- what is refused; "#!" marks the line that the message must name

REFUSED = [
    ("trials: 20", "trails: 20 #!", "search has no key 'trails'", "gpu_hours"),
    ("trials: 20", "trials: 0 #!", "search.trials is 0", "at least 1"),
    ("trials: 20", "gpu_hours: 0 #!", "search.gpu_hours is 0", "greater than 0"),
    ("  trials: 20\n", "", "says not when it ends", "trials, gpu_hours"),
    ("seed: 1", "seed: -1 #!", "search.seed is -1"),
    ("parallel: 4", "parallel: 0 #!", "search.parallel is 0"),
    ("parallel: 4", "sampler: best #!", "'best'", "'tpe', 'random'"),
    ("asha: {eta: 3}", "asha: {eta: 1} #!", "search.asha.eta is 1", "at least 2"),
    ("asha: {eta: 3}", "asha: {first: 9} #!", "search.asha.first is 9", "less than 9"),
    ("asha: {eta: 3}", "asha: {rungs: 3} #!", "search.asha has no key 'rungs'"),
    ("select_on: val", "every: 2, select_on: val", "search.asha.first is 1", "multiple of 2"),
    ("precision: fp32", "precision: fp32, stop_below: [[1, 0.5]]", "asha decides on train.stop_below"),
    ("select_on: val", "select_on: testA", "a search sees no test split"),
    ("{low: 1.0e-4, high: 1.0e-2, log: true}", "{low: 1.0e-2, high: 1.0e-2} #!", "not less than high"),
    ("{low: 1.0e-4, high: 1.0e-2, log: true}", "{low: 0.0, high: 1.0} #!", "train.lr is 0.0", "greater than 0"),
    ("{low: 0, high: 0.3, step: 0.1}", "{low: 0.0, high: 0.3, log: true} #!", "needs more than 0"),
    ("{low: 0, high: 0.3, step: 0.1}", "{low: 0.1, high: 0.3, log: true, step: 0.1} #!", "no step"),
    ("{low: 0, high: 0.3, step: 0.1}", "{low: 0, high: 0.3, step: 0.2} #!", "is not reached"),
    ("{low: 0, high: 0.3, step: 0.1}", "{low: 0, high: 0.3, step: 0} #!", "step is 0"),
    ("{low: 0, high: 0.3, step: 0.1}", "{low: 0, top: 0.3} #!", "has no key 'top'"),
    ("{low: 0, high: 0.3, step: 0.1}", "{low: 0} #!", "lacks high"),
    ("{low: 0, high: 0.3, step: 0.1}", "0.1 #!", "a list of values, or {low: A, high: B}"),
    ("{low: 8, high: 64, step: 8}", "{low: 8, high: 64, step: 0.5} #!", "0.5"),
    ("[2, 4, 8]", "[] #!", "at least one item"),
    ("[2, 4, 8]", "[2, 2] #!", "twice"),
    ("[2, 4, 8]", "[2, x] #!", "'text_rank'", "'x'"),
    ("method.lora.text_rank: [2, 4, 8]", "method.lora.rank: [2] #!", "has no option 'rank'"),
    ("method.lora.text_rank: [2, 4, 8]", "method.coop.num_tokens: [2] #!", "method is never coop"),
    ("method.lora.text_rank: [2, 4, 8]", "method.lora.targets: {low: 1, high: 2} #!", "'targets'"),
    ("method.lora.text_rank: [2, 4, 8]", "train.precision: {low: fp16, high: fp32} #!", "is no number"),
    ("method.lora.text_rank: [2, 4, 8]", "train.speed: [1] #!", "has no key 'speed'"),
    ("method.lora.text_rank: [2, 4, 8]", "eval.threshold: [0.5] #!", "eval.threshold cannot be searched"),
    ("method.lora.text_rank: [2, 4, 8]", "seed: [0, 1] #!", "seed cannot be searched"),
    ("method.lora.text_rank: [2, 4, 8]", "method.lora: [1] #!", "method.lora cannot be searched"),
    ("method.lora.text_rank: [2, 4, 8]", "train.split: [val] #!", "train.split cannot be searched"),
    ("[frozen, lora, {adapter: {image_hidden: 8}}]", "{low: 1, high: 2} #!", "it must be a list"),
    ("[frozen, lora, {adapter: {image_hidden: 8}}]", "[lora, nothing, adapter] #!", "no method 'nothing'"),
    ("search:", "grid: {seed: [0]} #!\nsearch:", "has no grid"),
    ("search:", "table: {rows: seed} #!\nsearch:", "has no table"),
]


@pytest.mark.parametrize(("old", "new", "words"), [(old, new, words) for old, new, *words in REFUSED])
def test_it_is_refused_where_it_stands(tmp_path, old, new, words):
    with pytest.raises(UserError) as caught:
        read(tmp_path, (old, new))
    message = str(caught.value)
    assert all(word in message for word in words) and "\n" not in message, message
    lines = (tmp_path / "search.yaml").read_text().splitlines()
    marked = next((k for k, line in enumerate(lines, 1) if "#!" in line), "")
    assert message.startswith(f"{tmp_path / 'search.yaml'}:{marked}"), message


def test_a_setting_of_the_command_line_reaches_every_trial_or_is_refused(tmp_path):
    experiment = read(tmp_path, sets=("train.epochs=6", "head.etris.layers=2"))
    assert {one.trial.train.epochs for one in played(experiment)} == {6}
    for key in ("train.lr", "method", "method.lora.scale"):
        with pytest.raises(UserError, match=f"--set {key}=1: {key} would not act"):
            read(tmp_path, sets=(f"{key}=1",))


# ---- what is kept


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "results")


def run(experiment: Experiment, store: Store, find=outcome) -> dict[str, Result]:
    def run_trial(trial, folder, places, report):
        (folder / "log.txt").write_text("it ran\n")
        return find(trial)

    job = sweep.Job(run_trial, store, Places(data=Path("/nowhere"), weights=None))
    return sweep.run(experiment, job, executors.in_process(), check=lambda *places: None)


def keep(experiment: Experiment, store: Store, results: dict[str, Result]) -> tuple[Experiment, Path]:
    """As `run` does at its end."""
    grown = experiment.after(lambda trial: results.get(trial.id))
    place = store.root / experiment.name
    folder.keep(grown, results, place)
    return grown, place


def test_a_sweep_runs_the_whole_search_and_shows_the_best_first(experiment, store, capsys):
    results = run(experiment, store)
    made = played(experiment)
    assert set(results) == {one.trial.id for one in made}
    assert run(experiment, store, find=lambda trial: pytest.fail("there is nothing to run")) == results
    grown, place = keep(experiment, store, results)
    rows = [line.split("|") for line in (place / "table.md").read_text().splitlines() if line.startswith("| ")]
    header, *rows = [[cell.strip() for cell in row[1:-1]] for row in rows]
    keys = ["method", "train.lr", "method.lora.text_rank", "method.adapter.text_hidden", "head.etris.dropout"]
    assert header == ["Trial", *keys, "RefCOCO mIoU val", "Params (K)", "Epochs"]
    shown = [float(row[-3].strip("*").split()[0].strip("*")) for row in rows]
    assert shown == sorted(shown, reverse=True)
    assert rows[0][-3].startswith("**") and rows[0][-1] == "9"
    by_number = {str(one.number): one for one in made}
    for row in rows:
        result = results[by_number[row[0]].trial.id]
        assert row[-1] == str(result.history[-1].epoch)
        assert row[-3].endswith("◦") == result.stopped
        assert row[2] == str(result.trial.train.lr)
    text = (place / "table.md").read_text()
    assert "Searched by TPE (Optuna) with seed 1, in waves of 4: 20 suggestions." in text
    assert "◦ The training was stopped early." in text


def test_a_trial_that_failed_is_tried_again_and_the_rest_follows(tmp_path, store, capsys):
    experiment = read(tmp_path, ("trials: 20", "trials: 8"))

    def at_first(trial):
        return failed(trial) if trial.method.name == "lora" else outcome(trial)

    assert "failed" in {result.status for result in run(experiment, store, at_first).values()}
    assert {result.status for result in run(experiment, store).values()} == {"done"}
    assert run(experiment, store) == run(experiment, Store(store.root.with_name("fresh")))


def test_the_best_one_is_an_experiment_of_its_own(tmp_path, store, capsys):
    experiment = read(tmp_path, ("title: Stand-ins", "title: 'A: \"title\" # of é'"))
    results = run(experiment, store)
    grown, place = keep(experiment, store, results)
    best = grown.search.best([one.trial for one in grown.runs], results)
    written = load(place / "best.yaml")
    [trial] = written.trials()
    assert trial == grown.search.whole(best)
    assert (trial.train.stop_below, trial.eval.splits) == ((), ("val", "testA"))
    assert replace(trial, eval=best.eval, train=best.train) == best
    assert written.name == "stand_in-best"
    text = (place / "best.yaml").read_text()
    number = next(run.axes[NUMBER] for run in grown.runs if run.trial == best)
    assert f"The best of the search stand_in: trial {number}, {100 * score(results[best.id]):.2f} mIoU on val." in text
    keep(experiment, store, results)
    assert (place / "best.yaml").read_text() == text
    # Where every split is reported, it is so by default.
    every = read(tmp_path, (", splits: [val, testA]", ""))
    _, place = keep(every, store, run(every, store))
    assert load(place / "best.yaml").trials()[0].eval.splits == ()


def test_there_is_no_best_one_where_all_failed(experiment, store, capsys):
    _, place = keep(experiment, store, run(experiment, store, failed))
    assert not (place / "best.yaml").exists()
    assert (place / "table.md").read_text().count(" failed |") == 60  # score, parameters, epochs


def test_files_alone_tell_what_goes_on(experiment, store, capsys):
    made = played(experiment)
    early = {one.trial.id: outcome(one.trial) for one in made[:6]}
    grown, place = keep(experiment, store, early)
    assert plan.read(place).runs == grown.runs
    assert plan.read(place).search == experiment.search
    for one in made[:6]:
        store.finish(store.begin(one.trial), early[one.trial.id])
    [sweep_] = status.of(store.root).sweeps
    assert (sweep_.done, sweep_.waiting) == (6, 14)
    # The file that was not run into the folder is played as far as results go.
    found, _, _ = plan.find(experiment.path, store.root.with_name("other"))
    assert found.runs == experiment.runs
    (place / plan.FILE).unlink()
    assert plan.find(experiment.path, store.root)[0].runs == grown.runs


@pytest.mark.parametrize(
    "damage",
    [
        lambda shared: shared["search"]["asha"].update(eta=1),
        lambda shared: shared["search"].update(parallel=0),
        lambda shared: shared["search"].update(sampler="x"),
        lambda shared: shared["search"]["space"][1].update(low="x"),
        lambda shared: shared["search"]["space"].pop(),
        lambda shared: shared["search"]["space"][1].update(high=1e-9),
        lambda shared: shared["axes"].update({NUMBER: ["x"] * 4}),
        lambda shared: shared["search"].pop("base"),
    ],
)
def test_a_damaged_plan_is_refused(experiment, store, damage):
    _, place = keep(experiment, store, {})
    first, *lines = (place / plan.FILE).read_text().splitlines()
    shared = json.loads(first)
    damage(shared)
    (place / plan.FILE).write_text("\n".join([json.dumps(shared), *lines]))
    with pytest.raises(UserError, match="is no whole plan"):
        plan.read(place)


def test_a_report_needs_no_torch(experiment, store, capsys):
    _, place = keep(experiment, store, run(experiment, store))
    before = (place / "table.md").read_bytes()
    code = (
        "import sys; sys.modules['torch'] = sys.modules['ray'] = None; from ris_bench import cli; "
        f"sys.exit(cli.main(['report', {str(place)!r}, '--format', 'md']))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert (place / "table.md").read_bytes() == before


def test_a_dry_run_tells_the_space_and_the_budget(experiment, store, capsys):
    assert cli.main(["run", str(experiment.path), "--dry-run", "--results", str(store.root)]) == 0
    out = capsys.readouterr().out
    assert "train.lr: 0.0001 to 0.01 (logarithmic)" in out
    assert "20 suggestions" in out and "4 trials, 4 to run; more as their results tell" in out
    assert all(run.trial.id in out for run in experiment.runs)
    assert cli.main(["run", str(experiment.path), "--dry-run", "--json", "--results", str(store.root)]) == 0
    assert [row["id"] for row in json.loads(capsys.readouterr().out)] == [run.trial.id for run in experiment.runs]


# ---- figures and the page


def drawn(experiment: Experiment, find) -> tuple[dict[str, drawing.Drawing], list[str]]:
    grown = experiment.after(find)
    made, absent = figures.draw(grown, {run.trial.id: find(run.trial) for run in grown.runs})
    return {each.name: each for each in made}, absent


def test_history_and_importances_are_drawn(experiment):
    def find(trial):
        return failed(trial) if trial.train.lr < 3e-4 else outcome(trial)

    made, absent = drawn(experiment, find)
    assert (list(made), absent) == (["history", "importances"], [])
    [axes] = made["history"].figure.axes
    whole = [one for one in played(experiment, find)]
    best, *points, crosses = [line.get_xydata() for line in axes.lines]
    kinds = (
        [o for o in whole if find(o.trial).status == "done" and find(o.trial).stopped == stopped] for stopped in (0, 1)
    )
    for line, shown in zip(points, kinds, strict=True):
        expected = [(one.number, 100 * score(find(one.trial))) for one in shown]
        assert line.tolist() == [pytest.approx(point) for point in expected]
    assert list(crosses[:, 0]) == [one.number for one in whole if find(one.trial).status == "failed"]
    assert list(best[:, 1]) == sorted(best[:, 1])
    assert best[-1, 1] == 100 * max(score(find(one.trial)) or 0 for one in whole)
    [axes] = made["importances"].figure.axes
    shown = {label.get_text() for label in axes.get_yticklabels()}
    assert {"method", "train.lr", "head.etris.dropout"} <= shown <= {axis.key for axis in experiment.search.space}
    shares = [bar.get_width() for bar in axes.patches]
    assert sum(shares) == pytest.approx(1) and shares == sorted(shares)


def test_what_matters_is_called_important(tmp_path):
    """Of two values one decides; a random sample shows which."""
    space = "    train.lr: {low: 1.0e-4, high: 1.0e-2, log: true}\n    head.etris.dropout: {low: 0.0, high: 0.3}\n"
    random = read(
        tmp_path,
        (TEXT[TEXT.index("    method.lora") : TEXT.index("  trials")], space),
        ("trials: 20", "trials: 60\n  sampler: random"),
    )
    made, _ = drawn(random, outcome)
    [axes] = made["importances"].figure.axes
    shares = dict(
        zip([t.get_text() for t in axes.get_yticklabels()], [b.get_width() for b in axes.patches], strict=True)
    )
    assert shares["train.lr"] > 0.8


def test_few_trials_have_no_importances(tmp_path):
    made, absent = drawn(read(tmp_path, ("trials: 20", "trials: 4")), outcome)
    assert list(made) == ["history"]
    assert absent == ["no figure importances: fewer than 10 trials have a score"]
    made, absent = drawn(read(tmp_path), failed)
    assert not made and len(absent) == 2


def test_the_page_has_it_all(experiment, store, capsys):
    results = run(experiment, store)
    grown, place = keep(experiment, store, results)
    _, written, _ = folder.write(grown, results, store, place)
    names = {path.relative_to(place).as_posix() for path in written}
    assert {"figures/history.svg", "figures/importances.png", "report.html", "table.tex"} <= names
    page = (place / "report.html").read_text()
    assert "Selected on val by mIoU: checkpoints and method and train.lr" in page
    assert r"$^\circ$" in (place / "table.tex").read_text()


# ---- a real one, which is killed

REAL = """\
name: short
title: A short search
defaults:
  dataset: {scenes: {num_train: 4, num_eval: 2}}
  backbone: tiny-clip-vit
  method: lora
  head: {etris: {width: 16, layers: 1, heads: 2, ffn: 16}}
  train: {epochs: 4, batch_size: 4, lr: 1.0e-3, milestones: [3], gamma: 0.3, precision: fp32}
  eval: {select_on: val, threshold: 0.5, splits: [val, testA]}
  seed: 0
search:
  space:
    method: [lora, adapter]
    train.lr: {low: 1.0e-3, high: 3.0e-2, log: true}
    method.lora.text_rank: [2, 4, 8]
  trials: 20
  parallel: 4
  asha: {eta: 2}
"""
DRIVER = """\
import sys
from ris_bench import cli, evaluation
evaluation.overlays = lambda *arguments, **settings: None  # they take most of the time of so short a trial
sys.exit(cli.main(["run", *sys.argv[1:], "--executor", "local"]))
"""


@pytest.mark.faults
def test_a_search_that_is_killed_twice_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    monkeypatch.setenv("RIS_BENCH_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "short.yaml"
    path.write_text(REAL)

    def start(experiment: Path, results: Path) -> subprocess.Popen:
        command = [sys.executable, "-c", DRIVER, str(experiment), "--results", str(results)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def finished(results: Path) -> set[str]:
        return {file.parent.name for file in results.glob("trials/*/result.json")}

    disturbed, undisturbed = tmp_path / "disturbed", tmp_path / "undisturbed"
    moments = random.Random(5)
    for first, last in ((2, 8), (9, 16)):
        driver, least = start(path, disturbed), moments.randint(first, last)
        while len(finished(disturbed)) < least and driver.poll() is None:
            time.sleep(0.02)
        time.sleep(moments.uniform(0, 1.5))  # anywhere in a trial
        driver.kill()
        assert driver.wait() == -signal.SIGKILL
        assert first <= len(finished(disturbed)) < 20
    for results in (disturbed, undisturbed):
        assert start(path, results).wait() == 0

    assert finished(disturbed) == finished(undisturbed)
    for name in ("table.md", "table.csv", "table.tex", "best.yaml", plan.FILE):
        whole, other = (
            re.sub(rb"20\d\d-\d\d-\d\d", b"", (r / "short" / name).read_bytes()) for r in (disturbed, undisturbed)
        )
        assert whole == other, name
    results = {i: Result.from_json((disturbed / "trials" / i / "result.json").read_text()) for i in finished(disturbed)}
    assert 0 < sum(result.stopped for result in results.values()) < len(results)

    assert start(disturbed / "short" / "best.yaml", disturbed).wait() == 0
    [again] = finished(disturbed) - set(results)
    again = Result.from_json((disturbed / "trials" / again / "result.json").read_text())
    assert set(again.scores) == {"val", "testA"}
    assert score(again) == max(map(score, results.values()))


def test_the_example_of_the_readme(tmp_path):
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    path = tmp_path / "stand_in.yaml"
    path.write_text(STAND_IN + re.search(r"```yaml\n(search:.*?)```", readme, re.DOTALL).group(1))
    assert len(load(path).search.space) == 3
