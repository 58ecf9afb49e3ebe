"""How many trials share a GPU."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace

import pytest
from conftest import STAND_IN

from ris_bench import executors, packing, sweep
from ris_bench.experiment import load
from ris_bench.methods.base import METHODS
from ris_bench.records import Cost, Places, Result, Scores, Trial
from ris_bench.results import Store

GPU_BYTES = 80 * 10**9
TEXT = (
    STAND_IN
    + """\
grid:
  seed: [0, 1, 2]
table:
  rows: seed
  columns:
    - {header: val, value: miou, splits: [val]}
"""
)


@pytest.fixture
def experiment(tmp_path):
    path = tmp_path / "stand_in.yaml"
    path.write_text(TEXT)
    return load(path)


@pytest.fixture
def trial(experiment) -> Trial:
    return experiment.trials()[0]


def measured(trial: Trial, peak: float, **changes) -> Result:
    """What a trial has left that took so many GB."""
    given = {"train_seconds": 1.0, "eval_seconds": 1.0, "train_images_per_second": 1.0, "tuned_bytes": 1}
    cost = Cost(**{**given, "peak_memory_bytes": int(1e9 * peak), "device": "NVIDIA H100", "speed": "fast", **changes})
    scores = {"val": Scores(oiou=0.5, miou=0.5, precision_at={}, num_expressions=1)}
    return replace(sweep.failure(trial, ""), status="done", error=None, scores=scores, cost=cost)


def training(trial: Trial, **changes) -> Trial:
    return replace(trial, train=replace(trial.train, **changes))


def test_a_kind_is_all_but_seed_and_schedule(trial):
    same = training(replace(trial, seed=7), lr=0.5, epochs=9, milestones=(3,), gamma=0.7, stop_below=((1, 0.5),))
    assert packing.kind(same) == packing.kind(trial) != trial.id
    others = [training(trial, batch_size=8), training(trial, precision="bf16"), training(trial, accumulate=2)]
    others += [replace(trial, method=METHODS.resolve("lora", {"text_rank": rank})) for rank in (1, 2)]
    assert len({packing.kind(one) for one in (trial, *others)}) == 6


def test_a_peak_is_that_of_a_gpu_and_of_the_same_way_to_compute(trial):
    second = replace(trial, seed=1)
    none = [measured(trial, 70, device="CPU (x86_64), 1 thread"), measured(trial, 70, device="2 x GPU", processes=2)]
    none += [measured(trial, 70, speed="plain"), measured(trial, 70, recompute=True), sweep.failure(trial, "it broke")]
    assert packing.peaks(none, "fast", False) == {}
    found = packing.peaks([*none, measured(trial, 9), measured(second, 11), measured(trial, 10)], "fast", False)
    assert found == {packing.kind(trial): 11 * 10**9}


@pytest.mark.parametrize(
    "peak, most, expected",
    [
        (None, 9, 1.0),
        (100.0, 9, 1.0),
        (40.0, 9, 1.0),  # twice that is all there is, and some of it is lost
        (33.0, 9, 0.5),
        (10.0, 9, 0.1666),
        (10.0, 3, 0.3333),
        (10.0, 1, 1.0),
        (0.001, 9, 0.1111),
    ],
)
def test_as_many_share_as_fit(trial, peak, most, expected):
    known = {} if peak is None else {packing.kind(trial): int(1e9 * peak)}
    share = packing.shares([trial], known, GPU_BYTES, most)[trial.id]
    assert share == expected
    together = int(1 / share)
    assert together * round(share * packing.UNIT) <= packing.UNIT
    if share < 1:
        assert together * (packing.MARGIN * peak * 1e9 + packing.CONTEXT_BYTES) <= GPU_BYTES


def test_the_first_of_a_kind_goes_ahead(trial):
    seeds = [replace(trial, seed=seed) for seed in range(3)]
    lora = [replace(one, method=METHODS.resolve("lora", {})) for one in seeds]
    assert packing.waves([*seeds, *lora], {}) == ([seeds[0], lora[0]], [*seeds[1:], *lora[1:]])
    assert packing.waves([*seeds, *lora], {packing.kind(trial): 1}) == ([*seeds, lora[0]], lora[1:])


def test_who_makes_do_with_less_memory_shares_none(trial):
    """Its scores would depend on its neighbours."""
    seeds = [training(replace(trial, seed=seed), out_of_memory="split") for seed in range(3)]
    assert packing.waves(seeds, {}) == (seeds, [])
    known = {packing.kind(seeds[0]): 10**9}
    assert set(packing.shares(seeds, known, GPU_BYTES, 3).values()) == {1.0}


@pytest.mark.ray
def test_ray_packs_what_the_first_has_measured(experiment, tmp_path, monkeypatch, capsys):
    import ray
    from ray import cloudpickle

    store, noted = Store(tmp_path / "results"), tmp_path / "noted"
    noted.mkdir()

    def run_trial(trial, folder, places, report):
        begun = noted / f"{trial.seed}"
        begun.write_text(os.environ["CUDA_VISIBLE_DEVICES"])
        deadline = time.monotonic() + 60
        while trial.seed > 0 and not all((noted / other).exists() for other in "12"):  # side by side, or never
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return measured(trial, 20)

    ray.init(address="local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False)
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # its processes cannot import this file
    try:
        with executors.through_ray(gpus_per_trial="auto"):  # of this GPU PyTorch knows nothing
            assert "no trials share one" in capsys.readouterr().err
        monkeypatch.setattr(executors, "_gpu_bytes", lambda: GPU_BYTES)
        job = sweep.Job(run_trial, store, Places(tmp_path, None))
        executor = executors.through_ray(gpus_per_trial="auto")
        results = sweep.run(experiment, job, executor, check=lambda *places: None)
    finally:
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
        ray.shutdown()
    assert [result.error for result in results.values()] == [None] * 3
    assert {path.name: path.read_text() for path in noted.iterdir()} == dict.fromkeys("012", "0")
    first, *others = sorted(noted.iterdir())
    folder = next(path for path in store.root.glob("trials/*.s0.*"))
    assert all(other.stat().st_mtime > (folder / "result.json").stat().st_mtime for other in others)
    assert json.loads((folder / "result.json").read_text())["cost"]["speed"] == "fast"
