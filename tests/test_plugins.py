"""Plug-ins take part like what the project has: in an experiment, in other processes, in the identity of a trial."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import STAND_IN

from ris_bench import cli, executors, plugins, sweep
from ris_bench.backbones.weights import Weights
from ris_bench.errors import UserError
from ris_bench.experiment import load
from ris_bench.methods.base import METHODS
from ris_bench.model import build, count_parameters
from ris_bench.records import Places, Result, Scores, Trial, plain
from ris_bench.results import Store

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BITFIT = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
TEXT = (
    STAND_IN.replace("stand_in", "plugged").replace("defaults:", "plugins: [bias.py]\ndefaults:")
    + """\
grid:
  method: [frozen, {bitfit: {towers: [text, image]}}]
table:
  rows: method
  columns:
    - {header: Parameters, value: params.tunable_backbone}
"""
)
# Two biases a block: 3 text blocks and 6 image blocks of width 64, each with 256 + 64.
TUNED = 9 * 320


@pytest.fixture(autouse=True)
def unplugged():
    """No test leaves a plug-in behind."""
    kept = [
        (registry, dict(registry._factories), dict(registry._code)) for registry in plugins.REGISTRIES if set(registry)
    ]
    loaded, modules = dict(plugins.LOADED), set(sys.modules)
    yield
    for registry, factories, code in kept:
        registry._factories, registry._code = factories, code
    plugins.LOADED.clear()
    plugins.LOADED.update(loaded)
    for name in set(sys.modules) - modules:
        if name.startswith(("plugin_", "my_package")):
            del sys.modules[name]


def forget() -> None:
    """As in a process that has loaded nothing yet."""
    plugins.LOADED.clear()
    for registry in plugins.REGISTRIES:
        for name in registry._code:
            del registry._factories[name]
        registry._code.clear()


@pytest.fixture
def path(tmp_path) -> Path:
    (tmp_path / "bias.py").write_text(BITFIT, encoding="utf-8")
    (tmp_path / "plugged.yaml").write_text(TEXT, encoding="utf-8")
    # Data that can be located, for what is checked before anything runs.
    (tmp_path / "datasets/images/train2014").mkdir(parents=True)
    (tmp_path / "datasets/refcoco").mkdir()
    for name in ("instances.json", "refs(unc).p"):
        (tmp_path / "datasets/refcoco" / name).touch()
    return tmp_path / "plugged.yaml"


def trained(trial: Trial, folder: Path, places: Places, report) -> Result:
    """Stands in for the training: the model is built, as it would be."""
    params = build(trial, Weights(None)).count()
    result = sweep.failure(trial, "")
    scores = {"val": Scores(oiou=0.5, miou=0.5, precision_at={}, num_expressions=1)}
    return replace(result, status="done", error=None, scores=scores, params=params)


def test_the_method_of_the_readme_is_a_plug_in(path, monkeypatch, capsys):
    assert len([line for line in BITFIT.splitlines() if line.strip()]) <= 15
    monkeypatch.chdir(path.parent)
    monkeypatch.setattr("ris_bench.trial.run_trial", trained)
    assert cli.main(["run", "plugged.yaml", "--executor", "local"]) == 0
    assert f"{TUNED:,}" in capsys.readouterr().out
    [frozen, bitfit] = load(path).trials()
    store = Store(path.parent / "results")
    digest = plugins.LOADED["bias.py"].sha256
    assert store.read(bitfit).trial.method.code == digest == store.read(bitfit).provenance.plugins["bias.py"]
    assert store.read(frozen).trial.method.code is None
    assert count_parameters(bitfit).tunable_backbone == TUNED


def test_it_is_loaded_in_other_processes(path):
    """A job is pickled, and needs neither the file nor an import in the process that it comes to."""
    experiment = load(path)
    bitfit = experiment.trials()[1]
    (path.parent / "bias.py").unlink()
    job = sweep.Job(count_there, Store(path.parent / "results"), Places(path.parent, None), experiment.plugins)
    (path.parent / "job").write_bytes(pickle.dumps((job, bitfit)))
    code = (
        "import pickle, sys; sys.path.insert(0, sys.argv[1]); job, trial = pickle.load(open(sys.argv[2], 'rb'));"
        "result = job(trial, print); print(result.status, result.error)"
    )
    arguments = [sys.executable, "-c", code, str(Path(__file__).parent), str(path.parent / "job")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["done", "None"]
    assert job.store.read(bitfit).params.tunable_backbone == TUNED


def count_there(trial: Trial, folder: Path, places: Places, report) -> Result:
    return replace(sweep.failure(trial, ""), status="done", error=None, params=count_parameters(trial))


@pytest.mark.ray
def test_ray_loads_it_too(path):
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # its processes cannot import this file
    try:
        experiment = load(path)
        job = sweep.Job(count_there, Store(path.parent / "results"), Places(path.parent, None), experiment.plugins)
        results = sweep.run(experiment, job, executors.through_ray(), check=lambda *places: None)
    finally:
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    tuned = {result.trial.method.name: result.params.tunable_backbone for result in results.values()}
    assert tuned == {"frozen": 0, "bitfit": TUNED}


def test_another_code_is_another_trial(path):
    frozen, bitfit = load(path).trials()
    assert "code" not in json.dumps(plain(frozen))
    forget()
    (path.parent / "bias.py").write_text(BITFIT + "\n# a remark\n", encoding="utf-8")
    same, other = load(path).trials()
    assert same.id == frozen.id
    assert other.id != bitfit.id
    with pytest.raises(UserError, match=f"sha256 {bitfit.method.code}; what is loaded under this name differs"):
        build(bitfit, None)
    forget()
    with pytest.raises(UserError, match="name that plug-in"):
        build(bitfit, None)


def test_a_plug_in_that_changes_while_it_is_used_is_refused(path, tmp_path, monkeypatch):
    load(path)
    (path.parent / "bias.py").write_text(BITFIT + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="not what it was when the experiment was read: start again"):
        load(path)

    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_package_one.py").write_text(BITFIT.replace("bitfit", "one"), encoding="utf-8")
    found = plugins.find("my_package_one", tmp_path)
    (tmp_path / "my_package_one.py").write_text(BITFIT.replace("bitfit", "two"), encoding="utf-8")
    with pytest.raises(UserError, match="start again"):
        found.load()


def test_modules_and_packages(path, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").write_text("from my_package import method\n", encoding="utf-8")
    (tmp_path / "my_package" / "method.py").write_text(BITFIT, encoding="utf-8")
    path.write_text(TEXT.replace("bias.py", "my_package"), encoding="utf-8")
    whole = load(path).trials()[1].method.code
    assert METHODS["bitfit"].__module__ == "my_package.method"
    # What a package is made of counts, not its first file alone.
    (tmp_path / "my_package" / "method.py").write_text(BITFIT + "\n", encoding="utf-8")
    assert plugins.find("my_package", tmp_path).sha256 != whole


def test_a_module_whose_package_imports_it(path, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").write_text("from my_package import method\n", encoding="utf-8")
    (tmp_path / "my_package" / "method.py").write_text(BITFIT, encoding="utf-8")
    found = plugins.find("my_package.method", tmp_path)
    assert "my_package" not in sys.modules
    found.load()
    assert METHODS.resolve("bitfit", {}).code == found.sha256 == hashlib.sha256(BITFIT.encode()).hexdigest()


def test_backbones_heads_and_data_sets(path):
    (path.parent / "parts.py").write_text(PARTS, encoding="utf-8")
    text = TEXT.replace("bias.py", "parts.py").replace("{bitfit: {towers: [text, image]}}", "lora")
    text = text.replace("tiny-clip-vit", "{mine: {image_size: 64}}")
    path.write_text(re.sub(r"head: .*", "head: plainest", text), encoding="utf-8")
    trials = load(path).trials()
    assert trials[0].backbone.options == {"image_size": 64}
    assert trials[0].backbone.code == trials[0].head.code != trials[0].method.code
    assert count_parameters(trials[0]).tunable_head == 64 + 1
    sweep.check(trials, Store(path.parent / "results"), Places(path.parent / "datasets", None))


PARTS = """
from torch import nn

from ris_bench.backbones.base import BACKBONES
from ris_bench.head import HEADS


@BACKBONES("mine")
def mine(weights, *, image_size: int = 64):
    return BACKBONES["tiny-clip-vit"](weights, image_size=image_size)


@HEADS("plainest")
class Plainest(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.layer = nn.Conv2d(backbone.image.out_channels[1], 1, 1)

    def forward(self, features):
        return self.layer(features.maps_BCHW[1])
"""


@pytest.mark.parametrize(
    "entry, code, message",
    [
        ("missing.py", "", "plug-in 'missing.py': .*missing.py cannot be read .*; a path begins there"),
        ("my_package_missing", "", "'my_package_missing': there is no such module of Python code; name one that can"),
        ("ris_bench.missing.method", "", "there is no such module"),
        ("math", "", "there is no such module of Python code"),
        ("bad.py", "x = 1\nraise OSError('no luck\\nat all')", r"cannot be imported: OSError: no luck \(line 2\)"),
        ("bad.py", "raise SystemExit(3)", "cannot be imported: SystemExit: 3"),
        ("bad.py", "def", r"cannot be imported: SyntaxError: .*line 1"),
        ("bad.py", "import nothing_of_this_name", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("bad.py", "x = 1", "registers nothing that was not there before"),
        ("bad.py", BITFIT.replace("bitfit", "lora"), "two methods are called 'lora'"),
        ("bad.py", f"{BITFIT}\nraise ValueError('too late')", "ValueError: too late"),
        ("bias.py, bad.py", BITFIT, "plug-in 'bad.py' cannot be imported: ValueError: two methods are called 'bitfit'"),
    ],
)
def test_what_is_no_plug_in_is_told_in_one_line(path, entry, code, message, monkeypatch, capsys):
    monkeypatch.chdir(path.parent)
    (path.parent / "bad.py").write_text(code, encoding="utf-8")
    path.write_text(TEXT.replace("bias.py", entry), encoding="utf-8")
    assert cli.main(["run", "plugged.yaml", "--dry-run"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(rf"error: plugged.yaml:3: .*{message}.*\n", captured.err), captured.err
    if "bias.py" not in entry:
        assert "bitfit" not in METHODS


def test_the_key_is_a_list_of_names(path):
    for value, message in (("bias.py", "must be a list"), ("[3]", "plugins is 3"), ("[]", "at least one item")):
        path.write_text(TEXT.replace("[bias.py]", value), encoding="utf-8")
        with pytest.raises(UserError, match=f"plugged.yaml:3: .*{message}"):
            load(path)


def test_results_from_before_plug_ins_are_read(path):
    frozen = load(path).trials()[0]
    record = json.loads(sweep.failure(frozen, "").to_json())
    del record["provenance"]["plugins"]
    result = Result.from_json(json.dumps(record))
    assert result.trial == frozen and result.provenance.plugins == {}
