"""A module imports only from its own floor and those below; what reads data or results needs neither torch nor Ray."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "ris_bench"
FLOORS = [
    ("errors", "code", "files", "cache", "records", "registry", "located", "published", "results", "remote"),
    ("allocator", "data", "metrics", "protocols"),
    ("parallel", "kept", "onednn", "transforms", "pixels", "loading", "audit", "predictions", "resampling", "scoring"),
    ("speed", "attention", "backbones"),
    ("methods",),
    ("head",),
    ("model", "plugins"),
    ("checkpoints", "training", "evaluation", "features", "pretrain", "official"),
    ("trial", "search", "layout", "plan", "experiment", "export", "rescored"),
    ("report", "progress", "trackers", "status", "sweep", "packing", "executors", "params", "predict"),
    ("cli",),
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
    if path.parent != PACKAGE or path.name != "__init__.py"
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} is a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down(name):
    ours = [found.split(".")[1] for found in imports(MODULES[name]) if found.startswith("ris_bench.")]
    above = [found for found in ours if found in FLOOR and FLOOR[found] > FLOOR[name.split(".")[0]]]
    assert not above


def test_only_one_module_imports_ray():
    importers = {name for name, path in MODULES.items() if any(i.split(".")[0] == "ray" for i in imports(path))}
    assert importers == {"executors"}


def test_data_records_and_reports_import_no_torch():
    floors = (*FLOORS[0], *FLOORS[1], "report", "progress", "cli")
    light = [f"ris_bench.{name}" for name in MODULES if name.split(".")[0] in floors]
    code = f"import sys, {', '.join(light)}; assert not {{'torch', 'ray'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


def test_nothing_underneath_reports_home():
    code = """
import ris_bench, huggingface_hub.constants, ray._common.usage.usage_lib as ray_usage
assert huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY
assert not ray_usage.usage_stats_enabled()
"""
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("HF_HUB_", "RAY_"))}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent, env=outside)
