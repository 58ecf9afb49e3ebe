"""Fixtures shared by the tests: tiny models of every registered pair."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from ris_bench import code, sweep
from ris_bench.backbones.base import BACKBONES
from ris_bench.backbones.weights import Weights
from ris_bench.data import index
from ris_bench.head import HEADS
from ris_bench.methods.base import METHODS
from ris_bench.model import RISModel, build
from ris_bench.records import Choice, Evaluation, Result, Training, Trial
from ris_bench.results import Store

# As trials do: more threads than cores, when several tests run at once, take many times as long.
torch.set_num_threads(1)
# Ray's workers give way to all other processes, of which several tests at once have many.
os.environ.update(RAY_worker_niceness="0")

TINY = [name for name in BACKBONES if name.startswith("tiny-")]
OPTIONS = {"bridger": {"width": 16}, "detris": {"image_width": 32, "text_width": 16, "attention_width": 32}}
"""Options without which a method does not fit a tiny backbone's size."""
IMPOSSIBLE = {("tiny-clip-vit", "conv-adapter"), ("tiny-dino", "conv-adapter"), ("tiny-clip-rn", "detris")}
"""Pairs that are refused, because the backbone has no place for the method."""
PAIRS = [(backbone, method) for backbone in TINY for method in METHODS if (backbone, method) not in IMPOSSIBLE]
TINY_HEAD = {"width": 16, "layers": 1, "heads": 2, "ffn": 16}
STAND_IN = """\
name: stand_in
title: Stand-ins
defaults:
  dataset: refcoco
  backbone: tiny-clip-vit
  method: frozen
  head: {etris: {width: 16, layers: 1, heads: 2, ffn: 16}}
  train: {epochs: 2, batch_size: 4, lr: 1.0e-3, milestones: [], gamma: 0.1, precision: fp32}
  eval: {select_on: val, splits: [val]}
  seed: 0
"""
"""An experiment without its grid and table, of which trials are stood in for."""


def tiny_model(
    backbone_name: str, method_name: str, seed: int = 0, head: dict | None = None, **backbone_options
) -> RISModel:
    """A model with the shipped weights."""
    backbone = BACKBONES[backbone_name](Weights(None), **backbone_options)
    torch.manual_seed(seed)
    method = METHODS[method_name](backbone, **OPTIONS.get(method_name, {}))
    torch.manual_seed(seed)
    return RISModel(backbone, method, HEADS["etris"](backbone, **{**TINY_HEAD, **(head or {})}))


def inputs(model: RISModel, batch: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images, and tokens of expressions of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    size, vocabulary = model.backbone.image_size, model.backbone.vocab_size
    images = torch.randn(batch, 3, size, size, generator=generator)
    tokens = torch.randint(1, vocabulary - 2, (batch, 17), generator=generator)
    for i in range(batch):
        length = 4 + 3 * i % 12
        tokens[i, 0], tokens[i, length], tokens[i, length + 1 :] = vocabulary - 2, vocabulary - 1, 0
    return images, tokens


def trained(store: Store, backbone: str, method: str, options: dict | None = None, **more) -> tuple[RISModel, Result]:
    """A trial of which noise stands for what it has learnt, in evaluation mode, and its result in the store."""
    trial = Trial(
        dataset=Choice(name="refcoco"),
        backbone=BACKBONES.resolve(backbone, more),
        method=METHODS.resolve(method, OPTIONS.get(method, {}) if options is None else options),
        head=HEADS.resolve("etris", TINY_HEAD),
        train=Training(epochs=1, batch_size=2, lr=1e-3, milestones=(), gamma=0.1, precision="fp32"),
        eval=Evaluation(select_on="val"),
        seed=0,
    )
    model = build(trial, weights := Weights(None))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.tuned_tensors().values():
            if tensor.requires_grad:
                tensor += 0.02 * torch.randn(tensor.shape, generator=generator)
    folder = store.begin(trial)
    model.save_tuned(folder / "tuned.safetensors")
    failed = sweep.failure(trial, "")
    provenance = replace(failed.provenance, weights=weights.sha256)
    result = replace(failed, status="done", error=None, provenance=provenance)
    return model.eval(), store.finish(folder, result)


@pytest.fixture(autouse=True, scope="session")
def _indices(tmp_path_factory):
    """Those of the replicas are of no use to anyone later."""
    folder = tmp_path_factory.mktemp("indices")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "folder", lambda: folder)
        yield


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Scenes are generated once for all tests of a file, and other processes find them; what is edited meanwhile is
    no other code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RIS_BENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(code, "digest", lambda: "the same")
        yield


@pytest.fixture(params=PAIRS, ids="-".join)
def pair(request) -> tuple[str, str]:
    return request.param


@pytest.fixture
def backbone_name(pair) -> str:
    return pair[0]


@pytest.fixture
def method_name(pair) -> str:
    return pair[1]


@pytest.fixture
def model(pair) -> RISModel:
    return tiny_model(*pair)
