"""The files for clusters: what bash, YAML and our command line can say of them without one."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from ris_bench.cli import run

ROOT = Path(__file__).parent.parent
SLURM, KUBERAY = (ROOT / "experiments" / "cluster" / name for name in ("slurm.sh", "kuberay.yaml"))


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    run.add(parser.add_subparsers())
    return parser.parse_args(["run", *arguments])


def test_the_manifest_of_kuberay():
    job = yaml.safe_load(KUBERAY.read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    python, script, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert python == "python" and (ROOT / Path(script).relative_to("/ris-bench")).is_file()
    args = parsed(arguments)
    assert (ROOT / args.experiment.relative_to("/ris-bench")).is_file() and args.address == "auto"
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
            assert set(mounts) <= volumes
            # Every node sees results, data and weights at the same place.
            for place in (args.data, args.weights, args.results):
                assert place.is_relative_to(mounts["shared"])
            assert container["resources"]["requests"] == container["resources"]["limits"]


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Runs the script with stand-ins for the cluster's commands, which write down how they were called."""
    calls = tmp_path / "calls"
    commands = {
        "scontrol": '[ "$1" = show ] && printf "one\\ntwo\\n"; exit 0',
        "srun": "exit 0",
        "ray": "exit 0",
        "python": '[ "$1" = -c ] && exit\nstat -c %a "$RAY_AUTH_TOKEN_PATH" >> "$CALLS"\nexit ${CODE:-0}',
    }
    for name, does in commands.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'#!/bin/bash\necho "{name} $*" >> "$CALLS"\n{does}\n')
        path.chmod(0o755)
    job = {"JOB_ID": "7", "JOB_NODELIST": "[one-two]", "JOB_NUM_NODES": "2", "CPUS_PER_TASK": "8", "GPUS_ON_NODE": "4"}
    environment = {**os.environ, **{f"SLURM_{key}": value for key, value in job.items()}, "CALLS": str(calls)}
    environment["PATH"] = f"{tmp_path / 'bin'}:{environment['PATH']}"

    def start(*arguments: str, **more: str) -> tuple[int, list[str]]:
        done = subprocess.run(
            ["bash", str(SLURM), *arguments], cwd=tmp_path, env={**environment, **more}, capture_output=True, timeout=60
        )
        assert not list(tmp_path.glob(".ray-token*"))
        return done.returncode, calls.read_text().splitlines() if calls.exists() else []

    return start


def test_the_script_for_slurm_starts_ray_on_every_node_and_one_sweep(slurm):
    code, calls = slurm("experiments/pet_r101.yaml", "--data", "/shared/data")
    assert code == 0
    (sweep,) = (call for call in calls if call.startswith("python run_bench.py"))
    assert parsed(shlex.split(sweep)[2:]).address == "one:6379"
    started = sorted((call for call in calls if call.startswith("srun")), key=lambda call: "--head" not in call)
    assert len(started) == 2 and all("--num-cpus 8 --num-gpus 4 --block" in call for call in started)
    assert "--nodelist one" in started[0] and "--head --node-ip-address one --port 6379" in started[0]
    assert "--exclude one" in started[1] and started[1].endswith("--address one:6379")
    assert "600" in calls  # nobody else can read the token


def test_the_script_for_slurm_passes_on_how_the_sweep_ended(slurm):
    assert slurm("experiments/pet_r101.yaml", CODE="1")[0] == 1


def test_the_script_for_slurm_asks_for_an_experiment(slurm):
    code, calls = slurm()
    assert code == 1 and not calls
    directives = re.findall(r"^#SBATCH (--[a-z-]+)", SLURM.read_text(encoding="utf-8"), re.MULTILINE)
    assert {"--requeue", "--signal", "--nodes", "--gpus-per-node"} <= set(directives)
