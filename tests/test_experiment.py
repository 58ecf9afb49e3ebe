import dataclasses
from pathlib import Path

import pytest

from ris_bench.errors import UserError
from ris_bench.experiment import Experiment, load
from ris_bench.records import Choice, Provenance, Result, Scores, Trial

EXPERIMENTS = Path(__file__).parent.parent / "experiments"

TEXT = """\
name: trial_run
title: A title
defaults:
  dataset: refcoco
  backbone:
    clip-r101: {image_size: 416, norm_stats: batch}
  method: frozen
  head: etris
  train:
    epochs: 50
    batch_size: 32
    lr: 1.0e-4
    milestones: [35]
    gamma: 0.1
    precision: fp16
  eval:
    select_on: val
  seed: 0
grid:
  dataset: [refcoco, refcoco+]
  method: [full, lora]
  seed: [0, 1]
table:
  rows: method
  labels: {full: Full, lora: LoRA}
  columns:
    - {header: Params, value: params.tunable_backbone}
    - {header: RefCOCO, value: miou, where: {dataset: refcoco}, splits: [val, testA], best: max}
    - {header: RefCOCO+, value: oiou, where: {dataset: refcoco+}, splits: [val]}
"""

CHOOSE = "  train.lr: [1.0e-3, 1.0e-4]\nchoose: [train.lr]\ntable:"


def read(tmp_path: Path, *replacements: tuple[str, str], text: str = TEXT, sets: tuple[str, ...] = ()) -> Experiment:
    for old, new in replacements:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = tmp_path / "experiment.yaml"
    path.write_text(text, encoding="utf-8")
    return load(path, sets)


def refusal(tmp_path: Path, *replacements: tuple[str, str], **arguments) -> str:
    with pytest.raises(UserError) as caught:
        read(tmp_path, *replacements, **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def result(trial: Trial, miou: float | None, oiou: float = 0.5) -> Result:
    """A result with this score on every split, or a failed one."""
    scores = Scores(oiou=oiou, miou=miou or 0, precision_at={}, num_expressions=1)
    return Result(
        trial=trial,
        status="failed" if miou is None else "done",
        error="it failed" if miou is None else None,
        scores={} if miou is None else {"val": scores, "testA": dataclasses.replace(scores, miou=1 - scores.miou)},
        selected_epoch=None,
        history=(),
        params=None,
        cost=None,
        provenance=Provenance(commit=None, dirty=None, versions={}, weights={}, precision="fp32", started="2026-01-01"),
    )


# ---- what a file says


def test_the_trials_are_the_product_of_the_axes_in_their_order(tmp_path):
    experiment = read(tmp_path)
    expected = [(d, m, s) for d in ("refcoco", "refcoco+") for m in ("full", "lora") for s in (0, 1)]
    assert [(t.dataset.name, t.method.name, t.seed) for t in experiment.trials()] == expected
    assert len({trial.id for trial in experiment.trials()}) == 8
    assert experiment.axes == {"dataset": ("refcoco", "refcoco+"), "method": ("full", "lora"), "seed": ("0", "1")}
    assert experiment.runs[1].axes == {"dataset": "refcoco", "method": "full", "seed": "1"}
    assert experiment.runs[0].splits == ("val", "testA", "testB")
    assert (experiment.name, experiment.title, experiment.notes) == ("trial_run", "A title", ())


def test_a_trial_is_complete_with_the_defaults_of_every_option(tmp_path):
    trial = read(tmp_path).trials()[2]
    options = {"text_rank": 1, "image_rank": 1, "scale": 1.0, "targets": ("q", "v")}
    assert trial.method == Choice(name="lora", options=options)
    assert trial.head.options["width"] == 512
    assert (trial.train.milestones, trial.train.accumulate, trial.train.split) == ((35,), 1, "train")
    assert (trial.eval.metric, trial.eval.threshold) == ("miou", 0.35)


def test_the_id_of_a_trial_is_pinned():
    """Another id is another trial: results that users have would no longer count."""
    trial = load(EXPERIMENTS / "pet_r101.yaml").trials()[1]
    assert trial.id == "refcoco.clip-r101.frozen.s0.2fcfdaec"


def test_writing_out_a_default_changes_no_id(tmp_path):
    spelt_out = read(
        tmp_path,
        ("method: [full, lora]", "method: [full, lora: {text_rank: 1}]"),
        ("head: etris", "head: {etris: {ffn: 512, dropout: 0.1}}"),
        ("select_on: val", "select_on: val\n    threshold: 0.35\n    metric: miou"),
        ("gamma: 0.1", "gamma: 1.0e-1\n    dice: 0"),
    )
    assert spelt_out.trials() == read(tmp_path).trials()


def test_values_of_one_name_are_labelled_by_what_differs(tmp_path):
    variants = "[lora: {text_rank: 2}, lora: {scale: 2}, frozen]"
    labels = read(
        tmp_path, ("[full, lora]", variants), ("{full: Full, lora: LoRA}", '{"lora(text_rank=2, scale=1.0)": two}')
    )
    assert labels.axes["method"] == ("lora(text_rank=2, scale=1.0)", "lora(text_rank=1, scale=2.0)", "frozen")


def test_any_key_of_the_defaults_can_be_an_axis(tmp_path):
    text = TEXT[: TEXT.index("  columns")] + "  columns: [{header: Parts, value: train.accumulate}]\n"
    axes = "backbone.clip-r101.image_size: [224, 416]\n  train.accumulate: [1, 2]"
    experiment = read(tmp_path, ("dataset: [refcoco, refcoco+]", axes), text=text)
    trials = experiment.trials()
    assert [t.backbone.options["image_size"] for t in trials] == [224] * 8 + [416] * 8
    assert [t.train.accumulate for t in trials[:8]] == [1] * 4 + [2] * 4


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_committed_experiment_can_be_read(path):
    experiment = load(path)
    assert experiment.name == path.stem
    assert experiment.trials()


def test_a_column_need_not_be_limited_to_the_only_value_of_an_axis(tmp_path):
    column = "{header: All, value: miou, splits: [val]}"
    text = TEXT[: TEXT.index("    - {header: RefCOCO,")] + f"    - {column}\n"
    assert read(tmp_path, ("[refcoco, refcoco+]", "[refcoco]"), text=text).table.columns[1].where == {}


# ---- what is refused, and where it says so; "#!" marks the line that the message must name

REFUSED = [
    ("title: A title", "titel: A title #!", "has no key 'titel'", "title"),
    ("title: A title", "title: 3 #!", "title is 3", "str"),
    ("title: A title", "title: A title\nnotes: text #!", "notes is 'text'", "list of str"),
    ("    epochs: 50", "    epoch: 50 #!", "train has no key 'epoch'", "epochs"),
    ("  train:\n    epochs: 50", "  train: #!", "train lacks epochs"),
    ("  head: etris\n", "", "defaults lacks head"),
    ("lr: 1.0e-4", "lr: 1e-4 #!", "'1e-4'", "float", "write 1.0e-4"),
    ("epochs: 50", "epochs: 50.0 #!", "train.epochs is 50.0", "int"),
    ("epochs: 50", "epochs: true #!", "train.epochs is True", "int"),
    ("epochs: 50", "epochs: 0 #!", "train.epochs is 0", "at least 1"),
    ("batch_size: 32", "batch_size: 1 #!", "train.batch_size is 1", "at least 2"),
    ("batch_size: 32", "batch_size: 32\n    accumulate: 17 #!", "train.accumulate is 17", "from 1 to 16"),
    ("batch_size: 32", "batch_size: 32\n    accumulate: 0 #!", "train.accumulate is 0", "from 1 to 16"),
    ("batch_size: 32", "batch_size: 32\n    expressions_per_image: 33 #!", "image is 33", "from 1 to 32"),
    ("batch_size: 32", "batch_size: 32\n    dice: -1 #!", "train.dice is -1"),
    ("lr: 1.0e-4", "lr: 0 #!", "train.lr is 0.0", "greater than 0"),
    ("lr: 1.0e-4", "lr: .nan #!", "train.lr is nan"),
    ("lr: 1.0e-4", "lr: .inf #!", "train.lr is inf"),
    ("[35]", "[35, 35] #!", "train.milestones is [35, 35]", "ascending"),
    ("[35]", "[0] #!", "train.milestones is [0]", "at least 1"),
    ("[35]", "35 #!", "train.milestones is 35", "list of int"),
    ("gamma: 0.1", "gamma: 1.5 #!", "train.gamma is 1.5", "at most 1"),
    ("fp16", "fp8 #!", "train.precision is 'fp8'", "'fp32', 'tf32', 'fp16', 'bf16'"),
    ("gamma: 0.1", "gamma: 0.1\n    split: trian #!", "train.split is 'trian'", "train, val, testA, testB"),
    ("gamma: 0.1", "gamma: 0.1\n    split: testA #!", "train.split is 'testA'", "no test split"),
    ("select_on: val", "select_on: dev #!", "eval.select_on is 'dev'", "val, testA, testB"),
    ("select_on: val", "select_on: val\n    every: 0 #!", "eval.every is 0"),
    ("select_on: val", "select_on: val\n    threshold: 1 #!", "eval.threshold is 1.0", "between 0 and 1"),
    ("select_on: val", "select_on: val\n    metric: iou #!", "eval.metric is 'iou'", "'miou', 'oiou'"),
    ("select_on: val", "select_on: val\n    splits: [val, test] #!", "['val', 'test']", "val, testA, testB"),
    ("select_on: val", "select_on: val\n    splits: [val, val] #!", "without repetition"),
    ("  seed: 0", "  seed: -1 #!", "seed is -1"),
    ("  seed: 0", "  seed: '0' #!", "seed is '0'", "int"),
    ("  seed: 0", "  seed: 0\n  sede: 0 #!", "defaults has no key 'sede'", "seed"),
    ("  dataset: refcoco\n", "  dataset: refcocoo #!\n", "no dataset 'refcocoo'", "refcocog-umd"),
    ("  method: frozen", "  method: frozne #!", "no method 'frozne'", "frozen"),
    ("  method: frozen", "  method: {full: {}, lora: {}} #!", "write a name"),
    ("  method: frozen", "  method: off #!", "method is False", "write a name"),
    ("  method: frozen", "  method: {lora: 4} #!", "method.lora is 4", "mapping"),
    ("clip-r101: {", "clip-r102: { #!\n      ", "no backbone 'clip-r102'", "clip-r101"),
    ("norm_stats: batch", "\n      norm_stats: bath #!\n      ", "'norm_stats'", "'bath'", "'frozen', 'batch'"),
    ("norm_stats: batch", "\n      norm: batch #!\n      ", "no option 'norm'", "norm_stats"),
    ("[full, lora]", "\n    - full\n    - lora: {rank: 2} #!", "no option 'rank'", "text_rank"),
    ("[full, lora]", "[full, lora: {scale: 1e1}] #!", "'1e1'", "float"),
    ("[full, lora]", "[full, lora, full] #!", "the value 'full' twice"),
    ("[full, lora]", "[lora, lora: {scale: 1}] #!", "twice"),
    ("seed: [0, 1]", "seed: [0]\n  train.lr: [1, 1.0] #!", "the value 1.0 twice"),
    ("[full, lora]", "[] #!", "method is []", "at least one"),
    ("[full, lora]", "full #!", "method is 'full'", "list"),
    ("seed: [0, 1]", "seed: [0, 1]\n  train.lrr: [1.0] #!", "train has no key 'lrr'", "lr"),
    ("seed: [0, 1]", "seed: [0, 1]\n  trian.lr: [1.0] #!", "defaults has no key 'trian'", "train"),
    ("seed: [0, 1]", "seed: [0, 1]\n  seed.x: [1] #!", "seed.x is a part of seed"),
    ("seed: [0, 1]", "seed: [0, 1]\n  train.lr: [1.0e-4, 1e-3] #!", "'1e-3'", "as a string"),
    ("seed: [0, 1]", "seed: [0, 1]\n  method.lora: [{}] #!", "method.lora is a part of method"),
    ("seed: [0, 1]", "seed: [0, 1]\n  eval.splits:\n    - [val]\n    - [test] #!", "['test']", "val, testA, testB"),
    ("table:", "choose: [seed] #!\ntable:", "seed cannot be chosen"),
    ("table:", "choose: [train.lr] #!\ntable:", "choose has 'train.lr'", "dataset, method, seed"),
    ("table:", "choose: train.lr #!\ntable:", "choose is 'train.lr'", "list"),
    ("rows: method", "rows: head #!", "table.rows is 'head'", "dataset, method, seed"),
    ("rows: method", "rows: [method, method] #!", "table.rows is ['method', 'method']", "each once"),
    ("rows: method", "rows: [] #!", "table.rows is []", "an axis of the grid"),
    ("{full: Full, lora: LoRA}", "{ful: Full} #!", "'ful'", "full, lora"),
    ("{full: Full, lora: LoRA}", "{full: 1} #!", "table.labels.full is 1", "str"),
    ("value: miou", "\n       value: mious #!\n       ", "value is 'mious'", "miou, oiou, pr@0.5", "params.total"),
    ("value: miou", "\n       valeu: miou #!\n       ", "column has no key 'valeu'", "value"),
    ("value: params.tunable_backbone", "value: 1 #!\n     ", "column.value is 1"),
    ("header: RefCOCO,", "header: RefCOCO oIoU, #!\n     ", "names oiou", "the value is miou"),
    ("header: RefCOCO,", "header: IoU, #!\n     ", "names iou", "the value is miou"),
    ("{dataset: refcoco}", "{head: etris} #!\n     ", "'head'", "no axis"),
    ("{dataset: refcoco}", "{dataset: refcocog-umd} #!\n     ", "dataset 'refcocog-umd'", "refcoco, refcoco+"),
    ("{dataset: refcoco}", "refcoco #!\n     ", "column.where is 'refcoco'"),
    ("where: {dataset: refcoco}, ", "#!\n     ", "average over every dataset", "where: {dataset: refcoco}"),
    ("[val, testA]", "[val, test] #!\n     ", "names test", "refcoco reports val, testA, testB"),
    (", splits: [val, testA]", " #!\n     ", "name some"),
    ("value: params.tunable_backbone", "value: params.total, splits: [val] #!\n     ", "remove splits"),
    ("value: params.tunable_backbone", "value: cost.train_seconds #!\n     ", "average over every dataset"),
    ("value: params.tunable_backbone", "value: cost.device #!\n     ", "value is 'cost.device'"),
    ("value: params.tunable_backbone", "value: params.total, scale: 0 #!\n     ", "scale must be"),
    ("value: params.tunable_backbone", "value: params.total, digits: -1 #!\n     ", "digits must be"),
    ("value: params.tunable_backbone", "value: seed, best: max #!\n     ", "remove best"),
    ("best: max", "best: most #!\n     ", "'most'", "'max', 'min'"),
    ("best: max", "scale: 100 #!\n     ", "in percent"),
    ("name: trial_run", "name: ../up #!", "name is '../up'"),
    ("name: trial_run", "name: trials #!", "name is 'trials'"),
    ("name: trial_run", "name: trial_run\nname: again #!", "'name' is given twice"),
    ("  seed: 0\n", "  seed: 0\n  train: {} #!\n", "'train' is given twice"),
    ("  method: frozen", "  method: !!python/object/apply:os.system [exit] #!", "!!python/object/apply:os.system"),
    ("  method: frozen", "  method: !custom frozen #!", "the tag !custom"),
    ("  seed: 0", "  seed: 2024-01-01 #!", "the tag !!timestamp"),
    ("  seed: 0", "  seed: !!int x #!", "'x'"),
    ("  method: frozen", "  method: &a frozen\n  head: *a #!", "alias"),
    ("  method: frozen", "  {a: b}: frozen #!", "not a name"),
    ("  method: frozen", "\tmethod: frozen #!", "not YAML"),
    ("title: A title", "title: a: b #!", "not YAML"),
    ("title: A title", "title: a\x07b #!", "not YAML"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "parts"), [(old, new, parts) for old, new, *parts in REFUSED])
def test_what_cannot_be_run_is_refused_with_its_line(tmp_path, old, new, parts):
    message = refusal(tmp_path, (old, new))
    lines = TEXT.replace(old, new).splitlines()
    expected = next((i for i, line in enumerate(lines, 1) if "#!" in line), 3)
    assert message.startswith(f"{tmp_path}/experiment.yaml:{expected}: "), message
    for part in parts:
        assert part in message


def test_a_tag_runs_nothing(tmp_path):
    target = tmp_path / "touched"
    refusal(tmp_path, ("title: A title", f"title: !!python/object/apply:os.mkdir ['{target}']"))
    assert not target.exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ":1: the experiment is None"),
        ("- a\n", ":1: the experiment is ['a']"),
        ("name: x\n", ":1: the experiment lacks title, defaults, grid, table"),
        ("a: 1\n---\nb: 2\n", ":2: this is not YAML"),
        ("a: " + "[" * 5000, ":1: this is nested too deeply"),
        (TEXT.replace("grid:", "grid: {}\nrest:", 1), ":20: the experiment has no key 'rest'"),
        (
            TEXT[: TEXT.index("grid:")] + "grid: {}\n" + TEXT[TEXT.index("table:") :],
            ":21: table.rows is 'method'; it must be an axis of the grid, or a list of some, each once: it has none",
        ),
        (TEXT[: TEXT.index("columns:")] + "columns: []\n", ":26: table.columns is []"),
    ],
)
def test_other_shapes_are_refused(tmp_path, text, expected):
    assert refusal(tmp_path, text=text).startswith(f"{tmp_path}/experiment.yaml{expected}")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"absent\.yaml cannot be read \(No such file or directory\)"):
        load(tmp_path / "absent.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("name: x\ntitle: é\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.yaml:2: this is not UTF-8"):
        load(tmp_path / "latin.yaml")


# ---- settings from the command line


def test_an_assignment_replaces_a_default(tmp_path):
    experiment = read(tmp_path, sets=("train.epochs=2", "train.milestones=[1]", "eval.splits=[val]"))
    assert len(experiment.trials()) == 8
    for trial in experiment.trials():
        assert (trial.train.epochs, trial.train.milestones, trial.eval.splits) == (2, (1,), ("val",))
    assert experiment.assignments == ("train.epochs=2", "train.milestones=[1]", "eval.splits=[val]")


def test_an_assignment_replaces_an_axis_by_one_value(tmp_path):
    experiment = read(tmp_path, sets=("method={lora: {text_rank: 3}}", "seed=5", "dataset=refcoco"))
    [trial] = experiment.trials()
    assert (trial.method.options["text_rank"], trial.seed) == (3, 5)
    assert [column.header for column in experiment.table.columns] == ["Params", "RefCOCO"]


def test_an_assignment_keeps_the_label_of_a_value_that_is_on_the_axis(tmp_path):
    variants = ("[full, lora]", "[lora: {scale: 2}, lora]"), ("{full: Full, lora: LoRA}", "{}")
    assert read(tmp_path, *variants, sets=("method=lora",)).axes["method"] == ("lora(scale=1.0)",)


GRIDS = """\
grid:
  - dataset: [refcoco, refcoco+]
    method: [full, lora: {text_rank: 4}]
    seed: [0, 1]
  - dataset: [refcoco]
    method: [full, lora, bridger]
    seed: [0]
table:"""
"""The list of grids in place of the one of TEXT."""


def read_grids(tmp_path, grids: str = GRIDS, sets: tuple[str, ...] = ()) -> Experiment:
    start, end = TEXT.index("grid:"), TEXT.index("table:")
    return read(tmp_path, (TEXT[start:end] + "table:", grids), ("{full: Full, lora: LoRA}", "{}"), sets=sets)


def combinations(experiment: Experiment) -> list[tuple[str, ...]]:
    return [tuple(run.axes.values()) for run in experiment.runs]


LORA4, LORA1 = "lora(text_rank=4)", "lora(text_rank=1)"


def test_a_list_of_grids_holds_what_any_of_them_holds(tmp_path):
    experiment = read_grids(tmp_path)
    assert experiment.axes["method"] == ("full", LORA4, LORA1, "bridger")
    both = [(d, m, s) for d in ("refcoco", "refcoco+") for m in ("full", LORA4) for s in "01"]
    assert combinations(experiment) == [*both, ("refcoco", LORA1, "0"), ("refcoco", "bridger", "0")]
    assert len({trial.id for trial in experiment.trials()}) == 10


def test_of_several_grids_an_assignment_keeps_those_that_have_the_value(tmp_path):
    assert combinations(read_grids(tmp_path, sets=("seed=1", "dataset=refcoco"))) == [
        ("refcoco", "full", "1"),
        ("refcoco", LORA4, "1"),
    ]
    assert combinations(read_grids(tmp_path, sets=("method=bridger",))) == [("refcoco", "bridger", "0")]
    # What none has, all get, and what is then the same is run once.
    frozen = read_grids(tmp_path, sets=("method=frozen",))
    assert combinations(frozen) == [(d, "frozen", s) for d in ("refcoco", "refcoco+") for s in "01"]


def test_a_cell_may_differ_from_others_but_not_in_itself(tmp_path):
    epochs = GRIDS.replace("seed: [0, 1]", "seed: [0, 1]\n    train.epochs: [9]")
    one = epochs.replace("[full, lora, bridger]\n", "[lora, bridger]\n    train.epochs: [5]\n")
    assert len(read_grids(tmp_path, one).runs) == 10
    several = epochs.replace("[full, lora, bridger]\n", "[full]\n    train.epochs: [5]\n")
    with pytest.raises(
        UserError, match="it would average over every train.epochs; limit it, as in where: {train.epochs: 9}"
    ):
        read_grids(tmp_path, several)


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("    seed: [0]\n", "", (":23: this grid lacks seed", "the same axes")),
        ("    seed: [0]\n", "    seed: [0]\n    head: [etris]\n", (":20: this grid lacks head",)),
        ("  - dataset: [refcoco]\n    method", "  - 3\n  - method", ("grid is 3",)),
        ("[full, lora, bridger]", "[full, full]", (":24: method has the value 'full' twice",)),
    ],
)
def test_a_list_of_grids_that_do_not_fit_is_refused(tmp_path, old, new, parts):
    with pytest.raises(UserError) as caught:
        read_grids(tmp_path, GRIDS.replace(old, new, 1))
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize(
    ("assignment", "part"),
    [
        ("train.lr=1e-4", "write 1.0e-4"),
        ("train.lr", "write --set key=value"),
        ("=3", "write --set key=value"),
        ("train.lr=", "train.lr is None"),
        ("train.lr=[1", "not YAML"),
        ("epochs=3", "defaults has no key 'epochs'"),
        ("trian.epochs=3", "defaults has no key 'trian'"),
        ("head.etris.width=3", "defaults.head has no key 'etris'"),
        ("train.epochs.x=3", "defaults.train.epochs has no key 'x'"),
        ("train.epochs=0", "at least 1"),
        ("name=other", "defaults has no key 'name'"),
        ("method=loar", "no method 'loar'"),
        ("method.lora.text_rank=2", "varies method"),
        ("seed=[0, 1]", "seed is [0, 1]"),
        ("eval.select_on=test", "a split of refcoco: val, testA, testB"),
        ("title=!!python/name:os.system", "the tag !!python/name:os.system"),
    ],
)
def test_a_bad_assignment_is_named(tmp_path, assignment, part):
    message = refusal(tmp_path, sets=("train.epochs=9", assignment))
    assert message.startswith(f"--set {assignment}: ")
    assert part in message


def test_assignments_do_not_excuse_the_file(tmp_path):
    assert ":12: " in refusal(tmp_path, ("lr: 1.0e-4", "lr: 1e-4"), sets=("train.lr=1.0e-4",))


# ---- values that are chosen on the validation split


def by_lr(experiment: Experiment, results: dict[str, Result]) -> list[tuple[str, str, float, int]]:
    return [(t.dataset.name, t.method.name, t.train.lr, t.seed) for t in experiment.trials(results)]


def test_choosing_first_runs_every_value_with_the_first_seed(tmp_path):
    experiment = read(tmp_path, ("table:", CHOOSE))
    pairs = [(d, m) for d in ("refcoco", "refcoco+") for m in ("full", "lora")]
    assert by_lr(experiment, {}) == [(d, m, lr, 0) for d, m in pairs for lr in (1e-3, 1e-4)]
    assert experiment.reported({}) == []


def test_the_best_value_on_the_selection_split_gets_the_other_seeds(tmp_path):
    experiment = read(tmp_path, ("table:", CHOOSE))
    first = experiment.trials()
    # The score on testA is 1 - miou: who looks there chooses the other value.
    results = {first[0].id: result(first[0], 0.4)}
    assert len(experiment.trials(results)) == 8
    results[first[1].id] = result(first[1], 0.6, oiou=0.1)
    assert [t for t in by_lr(experiment, results) if t[3] == 1] == [("refcoco", "full", 1e-4, 1)]
    assert [(run.trial.train.lr, run.trial.seed) for run in experiment.reported(results)] == [(1e-4, 0), (1e-4, 1)]
    assert [run.axes["train.lr"] for run in experiment.reported(results)] == ["0.0001", "0.0001"]


def test_the_metric_of_the_experiment_decides(tmp_path):
    experiment = read(tmp_path, ("table:", CHOOSE), ("select_on: val", "select_on: val\n    metric: oiou"))
    first = experiment.trials()
    results = {t.id: result(t, miou, oiou) for t, miou, oiou in zip(first, (0.1, 0.9), (0.9, 0.1), strict=False)}
    assert {run.trial.train.lr for run in experiment.reported(results)} == {1e-3}


@pytest.mark.parametrize(
    ("scores", "chosen"), [((0.5, 0.5), {1e-3}), ((None, 0.1), {1e-4}), ((0.1, None), {1e-3}), ((None, None), None)]
)
def test_ties_go_to_the_first_value_and_failures_are_passed_over(tmp_path, scores, chosen):
    experiment = read(tmp_path, ("table:", CHOOSE))
    first = experiment.trials()
    results = {t.id: result(t, score) for t, score in zip(first, scores, strict=False)}
    assert {t[2] for t in by_lr(experiment, results) if t[3] == 1} == (chosen or set())
    reported = experiment.reported(results)
    assert {run.trial.train.lr for run in reported} == (chosen or {1e-3, 1e-4})
    assert all(run.trial.dataset.name == "refcoco" and run.trial.method.name == "full" for run in reported)


def test_what_is_to_be_run_grows_only(tmp_path):
    """A sweep asks again after each round: no trial that has run may leave, and it must come to an end."""
    experiment = read(tmp_path, ("table:", CHOOSE))
    results: dict[str, Result] = {}
    rounds = []
    while todo := [trial for trial in experiment.trials(results) if trial.id not in results]:
        results |= {trial.id: result(trial, trial.train.lr) for trial in todo}
        assert {trial.id for trial in experiment.trials(results)} >= set(results)
        rounds.append(len(todo))
    assert rounds == [8, 4]
    assert len(experiment.reported(results)) == 8


def test_a_value_that_is_set_is_not_chosen(tmp_path):
    experiment = read(tmp_path, ("table:", CHOOSE), sets=("train.lr=0.5",))
    assert len(experiment.trials()) == len(experiment.reported({})) == 8
    assert {trial.train.lr for trial in experiment.trials()} == {0.5}
    assert experiment.choose == ()


def test_choosing_needs_a_score_to_choose_by(tmp_path):
    message = refusal(tmp_path, ("table:", CHOOSE), ("select_on: val", "select_on: val\n    splits: [testA]"))
    assert ":18: " in message
    assert "train.lr is chosen on val" in message


def test_only_an_axis_of_the_grid_spans_the_table(tmp_path):
    assert "table.rows is 'train.lr'" in refusal(tmp_path, ("table:", CHOOSE), ("rows: method", "rows: train.lr"))
