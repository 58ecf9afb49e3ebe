"""ris-bench report: what an experiment came to, from the files of its results alone."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import STAND_IN

from ris_bench import cli, plan, sweep
from ris_bench.errors import UserError
from ris_bench.experiment import load
from ris_bench.records import Result, Scores
from ris_bench.results import Store

ROOT = Path(__file__).parent.parent
GRID = """\
grid:
  method: [frozen, lora]
  seed: [0, 1]
table:
  rows: method
  labels: {lora: LoRA}
  columns:
    - {header: Scores, value: miou, splits: [val], best: max}
    - {header: Precise, value: pr@0.9, splits: [val]}
"""
TEXT = STAND_IN + GRID
FILES = ["--format", "md,tex,csv"]


def done(trial, *rest) -> Result:
    miou = 0.25 + 0.25 * (trial.method.name == "lora") + 0.125 * trial.seed
    scores = Scores(oiou=0.5, miou=miou, precision_at={"0.9": 0.125}, num_expressions=1)
    return replace(sweep.failure(trial, ""), status="done", error=None, scores={"val": scores})


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys):
    """Calls the command line where an experiment was run, and gives (code, stdout, stderr)."""
    (tmp_path / "stand_in.yaml").write_text(TEXT)
    (tmp_path / "datasets/images/train2014").mkdir(parents=True)
    (tmp_path / "datasets/refcoco").mkdir()
    for name in ("instances.json", "refs(unc).p"):
        (tmp_path / "datasets/refcoco" / name).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ris_bench.trial.run_trial", done)

    def call(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    assert call("run", "stand_in.yaml", "--executor", "local")[0] == 0
    return call


def rows(markdown: str) -> dict[str, list[str]]:
    cells = (line.strip("| ").split("|") for line in markdown.splitlines() if line.startswith("| "))
    return {label.strip(): [cell.strip() for cell in row] for label, *row in cells}


WITHOUT = """
import sys
sys.modules.update(torch=None, ray=None)
from ris_bench.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("named", ["stand_in.yaml", "results/stand_in"])
def test_tables_are_made_anew_without_torch_ray_or_data(bench, tmp_path, named):
    folder = tmp_path / "results" / "stand_in"
    files = {path: path.read_bytes() for path in folder.iterdir()}
    assert {path.name for path in files} == {"table.md", "table.tex", "table.csv", plan.FILE}
    for path in folder.glob("table.*"):
        path.unlink()
    shutil.rmtree(tmp_path / "datasets")
    command = [sys.executable, "-c", WITHOUT, "report", named, *FILES]
    ran = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert {path: path.read_bytes() for path in folder.iterdir()} == files
    assert ran.stdout.startswith((folder / "table.md").read_text()) and "table.csv" in ran.stdout


def test_an_experiment_that_was_not_run_as_it_stands_is_read_with_torch(bench, tmp_path):
    Path("stand_in.yaml").write_text(TEXT.replace("LoRA", "Low rank"))
    command = [sys.executable, "-c", WITHOUT, "report", "stand_in.yaml", *FILES]
    ran = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (2, "", 1)
    assert "torch, which is not installed" in ran.stderr
    code, out, err = bench("report", "stand_in.yaml", *FILES)
    assert (code, err) == (0, "") and "Low rank" in out
    # It is the folder's plan from now on.
    assert plan.read(Path("results/stand_in")).source == Path("stand_in.yaml").read_text()


def test_a_folder_is_of_the_experiment_as_it_was_run_and_the_file_as_it_stands(bench):
    assert bench("run", "stand_in.yaml", "--executor", "local", "--set", "method=lora")[0] == 0
    assert set(rows(bench("report", "results/stand_in", *FILES)[1])) == {"Method", "LoRA"}
    assert set(rows(bench("report", "stand_in.yaml", *FILES)[1])) == {"Method", "frozen", "LoRA"}


def test_a_copy_of_the_folder_writes_into_itself(bench, tmp_path):
    shutil.copytree("results", "elsewhere/results")
    before = Path("results/stand_in/table.md").stat().st_mtime_ns
    shutil.move("elsewhere/results/stand_in", "elsewhere/mine")
    code, out, err = bench("report", "elsewhere/mine", "--results", "elsewhere/results", *FILES)
    assert (code, err) == (0, "") and Path("elsewhere/mine/table.md").is_file()
    assert Path("results/stand_in/table.md").stat().st_mtime_ns == before


def test_what_is_no_result_is_named_and_left_out(bench, tmp_path):
    trials = tmp_path / "results" / "trials"
    ids = {(t.method.name, t.seed): t.id for t in load(Path("stand_in.yaml")).trials()}
    assert rows(bench("report", "stand_in.yaml", *FILES)[1])["LoRA"] == ["**56.25** ± 8.84", "12.50 ± 0.00"]

    path = trials / ids["lora", 0] / "result.json"
    text = path.read_text()
    record = json.loads(text)
    # A second result of it, under another name, and a half-written attempt.
    for name in (f"{ids['lora', 0]} (copy)", f".{ids['lora', 0]}.12ab.partial"):
        shutil.copytree(path.parent, trials / name)
    code, out, err = bench("report", "stand_in.yaml", *FILES)
    assert code == 0 and rows(out)["LoRA"] == ["**56.25** ± 8.84", "12.50 ± 0.00"]
    assert err.count("\n") == 2 and err.count(f"it is the result of {ids['lora', 0]}, which its folder is not") == 2
    for name in (f"{ids['lora', 0]} (copy)", f".{ids['lora', 0]}.12ab.partial"):
        shutil.rmtree(trials / name)

    record["scores"]["val"]["miou"] = 100
    foreign = json.loads((trials / ids["frozen", 0] / "result.json").read_text())
    whole = json.loads(text) | {"status": "perfect"}
    for content, message in (
        (text[: len(text) // 2], "it is no whole result (JSONDecodeError"),
        ("", "it is no whole result"),
        ("[" * 100_000, "it is no whole result"),
        ("null", "it is no whole result (TypeError"),
        (json.dumps(record), "it has a number that cannot be"),
        (json.dumps(record).replace("100", "NaN"), "it has a number that cannot be"),
        (json.dumps(record).replace("100", '"much"'), "it is no whole result (TypeError"),
        (json.dumps(whole), "it has a number that cannot be"),
        (json.dumps(foreign), f"it is the result of {ids['frozen', 0]}, which its folder is not named after"),
    ):
        path.write_text(content)
        code, out, err = bench("report", "stand_in.yaml", *FILES)
        assert code == 0 and rows(out)["LoRA"] == ["**62.50** ∗", "12.50 ∗"]
        assert rows(out)["frozen"] == ["31.25 ± 8.84", "12.50 ± 0.00"]
        assert err.splitlines()[0].startswith(f"warning: {path} is left out: {message}")
        assert err.splitlines()[1:] == [f"warning: without a result: {ids['lora', 0]}"]

    path.unlink()
    assert bench("report", "stand_in.yaml", *FILES)[2] == f"warning: without a result: {ids['lora', 0]}\n"
    # A score that was not measured is open.
    record["scores"]["val"] = json.loads(text)["scores"]["val"] | {"precision_at": {}}
    path.write_text(json.dumps(record))
    code, out, err = bench("report", "stand_in.yaml", *FILES)
    assert (code, err, rows(out)["LoRA"]) == (0, "", ["**56.25** ± 8.84", "12.50 ∗"])


def test_sound_results_of_other_experiments_are_not_named(bench):
    other = next(iter(load(Path("stand_in.yaml"), ("train.epochs=3",)).trials()))
    store = Store(Path("results").absolute())
    store.finish(store.begin(other), done(other))
    assert bench("report", "stand_in.yaml", *FILES)[2] == ""


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["results/trials"], "results/trials holds no plan.jsonl"),
        (["absent.yaml"], "absent.yaml cannot be read"),
        (["stand_in.yaml", "--results", "elsewhere"], "elsewhere has no result of stand_in.yaml"),
        (["stand_in.yaml", "--against", "nobody"], "'nobody' is no row"),
    ],
)
def test_bad_input_exits_2_with_one_line(bench, arguments, message):
    code, out, err = bench("report", *arguments, *FILES)
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_an_unknown_format_exits_2(bench):
    with pytest.raises(SystemExit) as caught:
        bench("report", "stand_in.yaml", "--format", "md,docx")
    assert caught.value.code == 2


CHOOSE = TEXT.replace("table:", "  train.lr: [1.0e-3, 1.0e-4]\nchoose: [train.lr]\ntable:")


@pytest.mark.parametrize("text, sets", [(TEXT, ()), (CHOOSE, ()), (CHOOSE, ("train.lr=0.01", "method=lora"))])
def test_a_plan_is_the_experiment_that_it_was_made_of(tmp_path, text, sets):
    path = tmp_path / "stand_in.yaml"
    path.write_text(text.replace("Stand-ins", 'Stand-ins \N{LINE SEPARATOR} "\N{GRINNING FACE}"'))
    experiment = load(path, sets)
    plan.write(experiment, tmp_path)
    assert plan.read(tmp_path) == replace(experiment, path=Path("stand_in.yaml"))
    assert [run.trial.id for run in plan.read(tmp_path).runs] == [run.trial.id for run in experiment.runs]


def test_half_a_plan_is_none(tmp_path):
    (tmp_path / "stand_in.yaml").write_text(TEXT)
    plan.write(load(tmp_path / "stand_in.yaml"), tmp_path)
    path = tmp_path / plan.FILE
    text = path.read_text()
    first, *lines = text.splitlines(keepends=True)
    for damaged in (
        "",
        "null\n",
        "\xff",
        text[:-20],
        first + lines[0],
        first.replace('"name": "stand_in"', '"name": "../stand_in"') + "".join(lines),
        first.replace('"rows": ["method"]', '"rows": ["backbone"]') + "".join(lines),
        first.replace('"value": "miou"', '"value": "bleu"') + "".join(lines),
        first.replace('"digits": null', '"digits": "many"') + "".join(lines),
        text.replace('"method": "lora"', '"method": "other"'),
    ):
        assert damaged != text
        path.write_text(damaged, encoding="latin-1")
        with pytest.raises(UserError, match=r"plan.jsonl is no whole plan of an experiment \(.*\); name its") as caught:
            plan.read(tmp_path)
        assert "\n" not in str(caught.value)


def test_figures_and_the_page_are_written_without_torch_too(bench, tmp_path):
    command = [sys.executable, "-c", WITHOUT, "report", "results/stand_in", "--format", "svg,html"]
    ran = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert ran.returncode == 0
    # Each figure is there, or said not to be.
    assert "no figure breakdown-" in ran.stderr and "Traceback" not in ran.stderr
    figures = list((tmp_path / "results/stand_in/figures").iterdir())
    assert figures and {path.suffix for path in figures} == {".svg"}
    page = (tmp_path / "results/stand_in/report.html").read_text(encoding="utf-8")
    assert "LoRA" in page and "56.25" in page
    assert all(str(path.relative_to(tmp_path)) in ran.stdout for path in figures)
