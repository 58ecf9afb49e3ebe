"""The models of the papers as their own code computes them, with random weights.

From clones of github.com/kkakkkka/ETRIS and github.com/jiaqihuang01/DETRIS, whose code is run as it stands, and which
need the packages loguru and fvcore.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

import torch
import yaml
from torch import Tensor, nn

from ris_bench.backbones.clip import openai_clip
from ris_bench.errors import UserError
from ris_bench.official import UNUSED


class Paper(NamedTuple):
    name: str
    """Of the class in its model/segmenter.py."""
    config: str
    """In its repository."""
    clip: str
    """As open_clip calls it."""
    bridger_width: int = 64
    """The paper's counts need another one for a transformer than its configuration has."""


ETRIS_R101 = Paper("ETRIS", "config/refcoco/bridge_r101.yaml", "RN101")
ETRIS_VIT_B = Paper("ETRIS", "config/refcoco/bridge_v16.yaml", "ViT-B-16", bridger_width=128)
DETRIS_B = Paper("DETRIS", "config/refcoco/DETRIS_base.yaml", "ViT-B-16")


def clone_of(paper: Paper, clones: Sequence[Path]) -> Path:
    """Which of the clones is that paper's. Raises UserError where none is."""
    for clone in clones:
        if (clone / paper.config).is_file():
            return clone
    listed = ", ".join(map(str, clones))
    raise UserError(f"none of {listed} has {paper.config}: name a clone of the repository of {paper.name}")


def released(paper: Paper, clone: Path, state: Mapping[str, Tensor]) -> nn.Module:
    """The paper's model with the tensors of a checkpoint. Raises UserError where a package is missing that it needs."""
    parts = yaml.safe_load((clone / paper.config).read_text(encoding="utf-8")).values()
    config = {name: value for part in parts for name, value in part.items()} | {"ladder_dim": paper.bridger_width}
    with (
        # What it would load is replaced below; an archive for it would have to be traced first.
        patch.object(torch, "load", lambda path: {}),
        patch.object(torch.jit, "load", lambda path, map_location: openai_clip(paper.clip)),
        imported(clone) as module,
    ):
        model = getattr(module, paper.name)(SimpleNamespace(**config))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and {*missing} <= {*UNUSED}, (missing, unexpected)
    return model


@contextmanager
def imported(clone: Path) -> Iterator[ModuleType]:
    """Its model/segmenter.py; both repositories call their package `model`."""
    sys.path.insert(0, str(clone))
    try:
        yield importlib.import_module("model.segmenter")
    except ModuleNotFoundError as error:
        raise UserError(f"{clone} needs the package {error.name}: pip install {error.name}") from None
    finally:
        sys.path.remove(str(clone))
        for name in [name for name in sys.modules if name.split(".")[0] == "model"]:
            del sys.modules[name]
