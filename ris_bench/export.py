"""A trained trial as a folder to pass on: its tuned tensors, or a whole model that needs the method no more.

model.json names backbone, method and head with all their options, and what a model is to be fed with. Beside it lies
tuned.safetensors, which fits the pretrained weights whose sha256 it names, or model.safetensors with every tensor.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ris_bench.backbones.base import BACKBONES
from ris_bench.backbones.weights import Weights
from ris_bench.data.dataset import DATASETS
from ris_bench.errors import UserError
from ris_bench.head import HEADS
from ris_bench.methods.base import METHODS
from ris_bench.model import RISModel, build
from ris_bench.official import describe, new_folder, restore, write
from ris_bench.records import Choice, Result, plain
from ris_bench.results import read_done
from ris_bench.transforms import CLIP_MEAN, CLIP_STD

TUNED = "tuned.safetensors"

TOLERANCE = 1e-3
"""Of logits: more than rounding makes of a merge, less than a merge that leaves something out."""


def trained(folder: Path) -> tuple[Result, Path]:
    """The result in the folder of a trial, and its tuned tensors. UserError where it is not done or has none."""
    result, tuned = read_done(folder), folder / TUNED
    if not tuned.is_file():
        raise UserError(f"{folder} has no {TUNED}: use it where the trial was run, or run it again")
    return result, tuned


def rebuild(result: Result, tuned: Path, weights: Path | None) -> RISModel:
    """The model of a trial as trained, in evaluation mode; `weights` is where the pretrained ones lie.

    Raises UserError where these are not those that the trial started from, or the tuned tensors do not fit.
    """
    model = build(result.trial, loaded := Weights(weights))
    _check_weights(loaded, result.provenance.weights)
    model.load_tuned(tuned)
    return model.eval()


def export(folder: Path, out: Path, *, merge: bool = False, weights: Path | None = None) -> dict[str, Any]:
    """Write the trial in `folder` to the folder `out`, which appears whole or not at all; return its description.

    With `merge`, what the method tuned is folded into the pretrained weights, and the model is one of method `frozen`;
    what has been written is read back, and its logits are compared with those of the trial's own model.

    Raises UserError where `out` exists, the pretrained weights are not the trial's, or the method cannot be merged.
    """
    result, tuned = trained(folder)
    trial = result.trial
    backbone, method, head = (plain(choice) for choice in (trial.backbone, trial.method, trial.head))
    description = {
        "backbone": backbone,
        "method": {"name": "frozen", "options": {}} if merge else method,
        "head": head,
        "input": {
            "images": "(B, 3, H, W), letterboxed, values from 0 to 1 less the mean, divided by the deviation",
            "mean": CLIP_MEAN,
            "deviation": CLIP_STD,
            "tokens": "(B, L) of CLIP's tokenizer, padded with 0",
            "length": DATASETS.build(trial.dataset).word_len,
        },
        "output": {"logits": "(B, 1, h, w)", "threshold": trial.eval.threshold},
        "source": {"trial": trial.id, "method": method, "weights": dict(result.provenance.weights)},
        "load": "ris_bench.export.load(FOLDER)",
    }
    with new_folder(out) as partial:
        if merge:
            _write_merged(rebuild(result, tuned, weights), result, partial, description)
        else:
            write(partial, description)
            shutil.copyfile(tuned, partial / TUNED)
    return description


def load(folder: Path, weights: Path | None = None) -> RISModel:
    """The model of an exported folder, in evaluation mode; `weights` is where the pretrained ones lie, if it needs any.

    Raises UserError where the folder holds none, or the pretrained weights are not those that the trial started from.
    """
    if not (folder / TUNED).exists():
        return restore(folder)
    choices, record = describe(folder)
    backbone = BACKBONES.build(choices.backbone, loaded := Weights(weights))
    _check_weights(loaded, record.get("source", {}).get("weights", {}))
    model = RISModel(backbone, METHODS.build(choices.method, backbone), HEADS.build(choices.head, backbone))
    model.load_tuned(folder / TUNED)
    return model.eval()


def _check_weights(loaded: Weights, expected: dict[str, str]) -> None:
    # By content: another library may have given the same numbers another file name, but not another hash.
    for name, sha256 in loaded.sha256.items():
        if sha256 not in expected.values():
            known = ", ".join(f"{file} with sha256 {digest}" for file, digest in expected.items())
            raise UserError(f"the pretrained weights {name} have the sha256 {sha256}; the trial started from {known}")


@torch.no_grad()
def _write_merged(model: RISModel, result: Result, folder: Path, description: dict[str, Any]) -> None:
    images, tokens = _sample(model)
    expected = model(images, tokens)
    name = result.trial.method.name
    model.method.merge(model.backbone)
    with torch.device("meta"):
        own = build(replace(result.trial, method=Choice(name="frozen")), None).state_dict()
    state = model.state_dict()
    if beside := [key for key in state if key not in own]:
        raise UserError(
            f"method {name!r} cannot be merged: what it tunes is no mere change of weights, it leaves {beside[0]} and "
            f"{len(beside) - 1} other tensors that a plain backbone has not; export without --merge"
        )
    write(folder, description, state)
    error = (restore(folder)(images, tokens) - expected).abs().max().item()
    if not error <= TOLERANCE:
        raise UserError(
            f"method {name!r} cannot be merged: the logits of the merged model differ by {error:.2g}; export without "
            "--merge"
        )


def _sample(model: RISModel) -> tuple[Tensor, Tensor]:
    """Noise, and sentences of two lengths."""
    generator = torch.Generator().manual_seed(0)
    size, vocabulary = model.backbone.image_size, model.backbone.vocab_size
    tokens_BL = torch.randint(1, vocabulary - 2, (2, 17), generator=generator)
    tokens_BL[:, 0] = vocabulary - 2
    for i, length in enumerate((5, 12)):
        tokens_BL[i, length], tokens_BL[i, length + 1 :] = vocabulary - 1, 0
    return torch.randn(2, 3, size, size, generator=generator), tokens_BL
