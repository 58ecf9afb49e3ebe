"""What is exported computes what the trial's model computes: merged where that is possible, and refused where not."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import PAIRS, inputs, trained
from torch.nn.utils import parametrize

from ris_bench import cli, sweep
from ris_bench.errors import UserError
from ris_bench.export import export, load
from ris_bench.methods.lora import LoRA
from ris_bench.model import RISModel, build
from ris_bench.records import Choice
from ris_bench.results import Store


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "results")


@torch.no_grad()
def difference(one: RISModel, other: RISModel) -> float:
    images, tokens = inputs(one)
    return (one(images, tokens) - other(images, tokens)).abs().max().item()


MERGED = {"frozen", "full", "lora", "peft"}


@pytest.mark.parametrize("backbone, method", [pair for pair in PAIRS if pair[0] != "tiny-dino"], ids="-".join)
def test_a_method_is_merged_exactly_or_refused(backbone, method, store, tmp_path):
    model, result = trained(store, backbone, method)
    try:
        export(store.folder(result.trial), tmp_path / "out", merge=True)
    except UserError as error:
        assert method not in MERGED
        assert f"method {method!r} cannot be merged" in str(error)
        assert not list(tmp_path.glob("*out*"))
        return
    merged = load(tmp_path / "out")
    assert difference(model, merged) <= 1e-5
    plain = build(replace(result.trial, method=Choice(name="frozen")), None)
    assert {n: t.shape for n, t in merged.state_dict().items()} == {n: t.shape for n, t in plain.state_dict().items()}
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"model.safetensors", "model.json"}


@pytest.mark.parametrize(
    "backbone, options",
    [
        ("tiny-clip-vit", {"tuner": "lora", "config": {"use_dora": True, "bias": "lora_only"}}),
        ("tiny-clip-vit", {"tuner": "oft", "config": {"oft_block_size": 16}}),
        ("tiny-clip-vit", {"tuner": "ia3", "targets": ["k", "fc2"], "config": {"feedforward_modules": ["fc2"]}}),
        ("tiny-clip-vit", {"tuner": "vera", "config": {"r": 16}}),
        ("tiny-clip-rn", {"tuner": "loha", "targets": ["kernel", "out"]}),
        ("tiny-clip-rn", {"tuner": "boft", "targets": ["kernel"]}),
    ],
)
def test_tuners_of_peft_are_merged(backbone, options, store, tmp_path):
    model, result = trained(store, backbone, "peft", options)
    export(store.folder(result.trial), tmp_path / "out", merge=True)
    assert difference(model, load(tmp_path / "out")) <= 1e-5


def test_a_tuner_that_is_no_change_of_weights_is_refused(store, tmp_path):
    _, result = trained(store, "tiny-clip-vit", "peft", {"tuner": "lily", "config": {"r": 4}})
    with pytest.raises(UserError, match="method 'peft' cannot be merged: .*Lily"):
        export(store.folder(result.trial), tmp_path / "out", merge=True)


def test_moving_statistics_are_merged_too(store, tmp_path):
    model, result = trained(store, "tiny-clip-rn", "lora", norm_stats="batch")
    model.train()
    model(*inputs(model))
    model.save_tuned(store.folder(result.trial) / "tuned.safetensors")
    export(store.folder(result.trial), tmp_path / "out", merge=True)
    assert difference(model.eval(), load(tmp_path / "out")) <= 1e-5


def test_a_merge_that_computes_something_else_is_refused(store, tmp_path, monkeypatch):
    def forgets(method, backbone):
        for module in list(backbone.modules()):
            if parametrize.is_parametrized(module):
                parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)

    _, result = trained(store, "tiny-clip-vit", "lora")
    monkeypatch.setattr(LoRA, "merge", forgets)
    with pytest.raises(UserError, match="cannot be merged: the logits of the merged model differ by"):
        export(store.folder(result.trial), tmp_path / "out", merge=True)
    assert not list(tmp_path.glob("*out*"))


def test_the_tuned_tensors_alone_are_the_default(store, tmp_path):
    model, result = trained(store, "tiny-clip-vit", "lora")
    description = export(store.folder(result.trial), tmp_path / "out")
    tuned = (store.folder(result.trial) / "tuned.safetensors").read_bytes()
    assert (tmp_path / "out" / "tuned.safetensors").read_bytes() == tuned
    assert difference(model, load(tmp_path / "out")) == 0
    assert json.loads((tmp_path / "out" / "model.json").read_text()) == json.loads(json.dumps(description))
    assert description["method"]["options"]["text_rank"] == 1 and description["input"]["length"] == 17

    path = tmp_path / "out" / "model.json"
    path.write_text(path.read_text().replace(result.provenance.weights["tiny-clip-vit.safetensors"], "0" * 64))
    with pytest.raises(UserError, match="tiny-clip-vit.safetensors have the sha256 .*; the trial started from .* 0000"):
        load(tmp_path / "out")


def test_a_folder_that_needs_a_plug_in_says_so(store, tmp_path):
    _, result = trained(store, "tiny-clip-vit", "lora")
    export(store.folder(result.trial), tmp_path / "out")
    path = tmp_path / "out" / "model.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"method": record["method"] | {"code": "0" * 64}}))
    with pytest.raises(UserError, match="method 'lora' is of a plug-in whose code has the sha256 0000"):
        load(tmp_path / "out")
    path.write_text("{")
    with pytest.raises(UserError, match="does not describe a model"):
        load(tmp_path / "out")


def test_other_pretrained_weights_are_not_merged(store, tmp_path):
    _, result = trained(store, "tiny-clip-vit", "lora")
    other = replace(result, provenance=replace(result.provenance, weights={"tiny-clip-vit.safetensors": "0" * 64}))
    (folder := store.folder(result.trial)).joinpath("result.json").write_text(other.to_json())
    with pytest.raises(UserError, match="the trial started from"):
        export(folder, tmp_path / "out", merge=True)


def test_the_command(store, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _, result = trained(store, "tiny-clip-vit", "lora")
    assert cli.main(["export", result.trial.id[:-4], "--out", "small"]) == 0
    assert cli.main(["export", result.trial.id, "--out", "whole", "--merge"]) == 0
    sizes = {name: Path(name).stat().st_size for name in ("small/tuned.safetensors", "whole/model.safetensors")}
    out = capsys.readouterr().out
    assert all(f"{name}  {size:,} bytes\n" in out for name, size in sizes.items())
    # LoRA and the head against a whole model.
    assert sizes["small/tuned.safetensors"] < sizes["whole/model.safetensors"] / 2


def test_what_cannot_be_exported_is_told_in_one_line(store, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _, one = trained(store, "tiny-clip-vit", "lora")
    _, two = trained(store, "tiny-clip-vit", "lora", {"scale": 2.0})
    failed = sweep.failure(replace(one.trial, seed=7), "the loss is nan")
    store.finish(store.begin(failed.trial), failed)
    (tmp_path / "there").mkdir()
    bare = store.folder(two.trial)
    (bare / "tuned.safetensors").unlink()
    for arguments, message in (
        (["nothing"], "0 trials of .* begins with 'nothing'"),
        (["refcoco.tiny-clip-vit.lora.s0"], f"2 trials of .*{one.trial.id}.*write more of it"),
        ([failed.trial.id], "failed .the loss is nan.: it left neither"),
        ([two.trial.id], "has no tuned.safetensors: use it where the trial was run"),
        ([one.trial.id, "--out", "there"], "there exists already: name a new folder"),
        ([one.trial.id, "--plugin", "missing.py"], "plug-in 'missing.py'"),
    ):
        assert cli.main(["export", "--out", "out", *arguments]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert re.search(message, err), err
    assert not (tmp_path / "out").exists()
