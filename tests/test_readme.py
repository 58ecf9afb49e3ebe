"""What the README says can be done, is done."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import torch
from conftest import TINY_HEAD, inputs

from ris_bench.backbones.base import BACKBONES
from ris_bench.head import HEADS
from ris_bench.methods.base import METHODS
from ris_bench.model import RISModel

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_opens_with_the_two_commands():
    block = re.search(r"```\n(.*?)```", README, re.DOTALL).group(1)
    assert [line.split("#")[0].strip() for line in block.splitlines()] == ["make quickstart", "make test"]
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_files_that_it_names_are_there():
    names = set(re.findall(r"`(experiments/[\w./]+)`", README)) | set(re.findall(r"ris_bench/\w+\.py", README))
    names -= {"ris_bench/methods/bias.py"}
    assert names
    assert [name for name in names if not (ROOT / name).is_file()] == []


def test_its_tables_are_those_that_came_out():
    table = (ROOT / "results" / "pet_tiny" / "table.md").read_text(encoding="utf-8")
    assert table.split("\n\n", 1)[1] in README
    quickstart = (ROOT / "results" / "quickstart" / "table.md").read_text(encoding="utf-8")
    rows = [re.findall(r"[^|]+", line) for line in quickstart.splitlines() if line.startswith("|")][2:]
    assert len(rows) == 9
    for row in rows:
        assert f"| {' | '.join(cell.strip() for cell in row)} |\n" in README


def test_the_new_method_runs(tmp_path):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    (tmp_path / "bias.py").write_text(code, encoding="utf-8")
    list(METHODS)  # the project's own first
    try:
        spec = importlib.util.spec_from_file_location("bias", tmp_path / "bias.py")
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
        choice = METHODS.resolve("bitfit", {"towers": ["text", "image"]})
        torch.manual_seed(0)
        backbone = BACKBONES["tiny-clip-vit"](None)
        model = RISModel(backbone, METHODS.build(choice, backbone), HEADS["etris"](backbone, **TINY_HEAD))
        # Two biases a block: 3 text blocks and 6 image blocks of width 64, each with 256 + 64.
        assert model.count().tunable_backbone == 9 * 320
        model(*inputs(model)).sum().backward()
        tuned = {name for name, p in model.backbone.named_parameters() if p.grad is not None}
        assert tuned
        assert all(name.endswith("bias") for name in tuned)
    finally:
        METHODS._factories.pop("bitfit", None)


def test_its_ratios_are_those_that_were_measured():
    rows = json.loads((ROOT / "results" / "speed.json").read_text(encoding="utf-8"))["rows"]
    section = README.split("### Speed\n")[1].split("\n### ")[0]
    printed = re.findall(r"(\d+\.\d\d) \[(\d+\.\d\d), (\d+\.\d\d)\]", section.split("results/speed.json")[0])
    measured = {tuple(f"{row[name]:.2f}" for name in ("ratio", "least", "most")) for row in rows}
    assert len(printed) == 30 and set(printed) <= measured
