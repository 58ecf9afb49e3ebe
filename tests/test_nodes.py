"""A cluster of two nodes on this machine, with nothing in common but it: each has a cache folder of its own."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ris_bench import sweep
from ris_bench.code import checkout
from ris_bench.errors import UserError
from ris_bench.records import Result
from ris_bench.remote import store_at

ROOT = Path(__file__).parent.parent
EXPERIMENT = """\
name: two_nodes
title: Two nodes
plugins: [sent]
defaults:
  dataset: {scenes: {num_train: 24, num_eval: 8}}
  backbone: tiny-clip-rn
  method: sent
  head: {etris: {width: 16, layers: 1, heads: 2, ffn: 16}}
  train: {epochs: 1, batch_size: 8, lr: 1.0e-3, milestones: [], gamma: 0.1, precision: fp32}
  eval: {select_on: val, splits: [val], threshold: 0.5}
  seed: 0
grid:
  dataset: [{scenes: {num_train: 24, num_eval: 8}}, refcoco]
  seed: [0, 1]
table:
  rows: seed
  columns:
    - {header: val, value: miou, where: {dataset: scenes}, splits: [val]}
"""
PLUGIN = """\
import os

import ris_bench
from ris_bench.methods.base import METHODS
from ris_bench.methods.frozen import Frozen


@METHODS("sent")
class Sent(Frozen):
    def __init__(self, backbone):
        super().__init__(backbone)
        if "NODE" in os.environ:  # neither is installed where the nodes look, or an older one would be
            assert all("working_dir_files" in path for path in (__file__, ris_bench.__file__)), (__file__, ris_bench)
"""


@pytest.fixture(scope="module")
def amazon():
    """An S3 of our own, where moto and s3fs are installed; the environment in which it is found."""
    if not all(map(importlib.util.find_spec, ("moto", "s3fs"))):
        yield {}
        return
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    yield {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    server.stop()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, amazon):
    """The address of a cluster that was started without a word of ours."""
    from ray.cluster_utils import Cluster

    caches = [str(tmp_path_factory.mktemp("cache")) for _ in range(2)]
    environments = [{"NODE": str(i), "RIS_BENCH_CACHE": cache, **amazon} for i, cache in enumerate(caches)]
    nodes = [{"num_cpus": 1, "object_store_memory": 2**27, "env_vars": each} for each in environments]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        cluster = Cluster(initialize_head=True, head_node_args={**nodes[0], "include_dashboard": False})
        try:
            cluster.add_node(**nodes[1])
            yield cluster.address
        finally:
            cluster.shutdown()


@pytest.fixture(params=["file", "s3"])
def url(request, amazon, tmp_path, monkeypatch) -> str:
    """Where results go, as the nodes see it too, and nothing is yet."""
    if request.param == "file":
        return f"file://{tmp_path}/results"
    if not amazon:
        pytest.skip("moto and s3fs are not installed")
    import s3fs

    for name, value in amazon.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem().mkdir("bucket")
    return "s3://bucket/results"


@pytest.fixture
def bench(cluster, url, tmp_path):
    """Runs run_bench.py on the cluster as a process of its own, which finds the plug-in."""
    (tmp_path / "sent.py").write_text(PLUGIN)
    (tmp_path / "two_nodes.yaml").write_text(EXPERIMENT)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        places = {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT))), "RIS_BENCH_CACHE": str(tmp_path / "cache")}
        command = [
            sys.executable,
            ROOT / "run_bench.py",
            "two_nodes.yaml",
            *arguments,
            "--address",
            cluster,
            "--results",
            url,
        ]
        return subprocess.run(
            command, cwd=tmp_path, env={**os.environ, **places}, capture_output=True, text=True, timeout=240
        )

    return run


@pytest.mark.ray
def test_nodes_are_sent_the_code_look_for_data_and_leave_results_at_a_url(bench, url, tmp_path, monkeypatch):
    done = bench("--data", "/nowhere")
    assert done.returncode == 1, done.stderr
    monkeypatch.setenv("RIS_BENCH_CACHE", str(tmp_path / "another"))
    store = store_at(url)
    there = store.objects.versions()
    results = [Result.from_json(store.objects.read(name)) for name in there if name.endswith("/result.json")]
    assert sorted((result.trial.dataset.name, result.status) for result in results) == [
        ("refcoco", "failed"), ("refcoco", "failed"), ("scenes", "done"), ("scenes", "done")
    ], done.stderr  # fmt: skip
    assert {(result.provenance.commit, result.provenance.dirty) for result in results} == {checkout()}
    errors = [result.error for result in results if result.error]
    assert all("/nowhere" in error and error.endswith(f"(on {socket.gethostname()})") for error in errors)
    assert f"see {url}/trials/refcoco." in done.stderr
    # A trial leaves all that it leaves in a folder, and the sweep its tables; of attempts and drivers nothing is left.
    trial = next(result.trial.id for result in results if result.status == "done")
    left = {name.removeprefix(f"trials/{trial}/") for name in there}
    assert {"expressions.parquet", "tuned.safetensors", "log.txt", "result.json"} <= left
    assert "two_nodes/table.md" in there and not [name for name in there if "/." in f"/{name}"]

    again = bench("--data", "/nowhere", "--only", "scenes")
    assert again.returncode == 0 and "scenes" not in again.stdout.split("**")[0], again.stdout


def test_another_software_on_a_node_is_named():
    driver = sweep.Driver.here()
    driver.check_versions()
    built_otherwise = {**driver.versions, "torch": driver.versions["torch"].partition("+")[0] + "+cu999"}
    replace(driver, versions=built_otherwise).check_versions()
    with pytest.raises(UserError, match=r"this node has timm .* instead of 0\.0: install what"):
        replace(driver, versions={**driver.versions, "timm": "0.0"}).check_versions()
