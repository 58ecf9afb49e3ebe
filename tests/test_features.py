"""Frozen features on disk: the same numbers as without, made once, whole or not there, and never more than allowed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_model
from PIL import Image

from ris_bench import features
from ris_bench.data.loading import Pixels
from ris_bench.data.samples import Sample
from ris_bench.data.transforms import Letterbox
from ris_bench.evaluation import inference
from ris_bench.features import Room, frozen_features

NUMBER = 40
"""More than a batch."""


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> list[Sample]:
    """Two expressions of each image."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    found = []
    for number in range(NUMBER):
        Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(path := folder / f"{number}.png")
        sample = Sample(
            dataset="d",
            split="train",
            ref_id=number,
            sent_id=number,
            sentence_index=0,
            image_id=number,
            ann_id=number,
            category="thing",
            expression="thing",
            raw="thing",
            image_path=path,
            height=24,
            width=32,
            segmentation=[],
        )
        found += [sample, replace(sample, sent_id=NUMBER + number, sentence_index=1)]
    return found


def make(model, samples, folder: Path, room: float = 1e9, log=lambda line: None, weights=None, report=lambda: None):
    with inference(model):
        return frozen_features(
            model.backbone.image,
            samples,
            Pixels(Letterbox(model.backbone.image_size), 0).images,
            weights or {"clip.pt": "0123"},
            Room(folder, int(room)),
            device=torch.device("cpu"),
            autocast=None,
            log=log,
            report=report,
        )


def live(model, samples):
    with inference(model):
        return model.backbone.image.known(Pixels(Letterbox(model.backbone.image_size), 0).images(samples))


def complete(folder: Path) -> list[Path]:
    return [path for path in folder.glob("features-*") if path.is_dir()]


@pytest.mark.parametrize(
    "backbone, method, steps",
    [
        ("tiny-clip-rn", "frozen", 5),
        ("tiny-clip-rn", "lora", 4),
        ("tiny-clip-rn", "bridger", 2),
        ("tiny-clip-vit", "coop", 5),
        ("tiny-dino", "bridger", 2),
    ],
)
def test_they_are_what_the_tower_makes(backbone, method, steps, samples, tmp_path):
    model = tiny_model(backbone, method).to(memory_format=torch.channels_last)
    assert model.backbone.image.untouched == steps
    asked = [samples[i] for i in (70, 3, 2, 11)]
    for _ in range(2):  # made, and found
        known, expected = make(model, samples, tmp_path)(asked), live(model, asked)
        assert len(known.following) == len(expected.following) == steps
        for kept, made in zip(known.following, expected.following, strict=True):
            assert (kept is None) == (made is None)
            if made is not None:
                torch.testing.assert_close(kept, made)
                assert np.argsort(kept.stride()[1:]).tolist() == np.argsort(made.stride()[1:]).tolist()
    assert len(complete(tmp_path)) == 1


def test_what_is_not_needed_is_not_kept(samples, tmp_path):
    known = make(tiny_model("tiny-clip-rn", "frozen"), samples, tmp_path)(samples[:1])
    assert [state is None for state in known.following] == [True, False, False, True, False]


@pytest.mark.parametrize("method, options", [("full", {}), ("adapter", {}), ("frozen", {"norm_stats": "batch"})])
def test_a_tower_that_changes_has_none(method, options, samples, tmp_path):
    assert make(tiny_model("tiny-clip-rn", method, **options), samples, tmp_path) is None
    assert not complete(tmp_path)


def test_a_name_is_all_that_the_numbers_depend_on(samples, tmp_path):
    model = tiny_model("tiny-clip-rn", "frozen")
    make(model, samples, tmp_path)
    make(tiny_model("tiny-clip-rn", "coop", seed=1), samples, tmp_path)  # another method, the same tower
    assert len(complete(tmp_path)) == 1
    make(model, samples, tmp_path, weights={"clip.pt": "4567"})
    make(model, samples[:-2], tmp_path)
    make(tiny_model("tiny-clip-rn", "frozen", image_size=96), samples, tmp_path)
    make(tiny_model("tiny-clip-rn", "lora"), samples, tmp_path)
    with torch.no_grad():
        model.backbone.image.stem_layers.conv1.weight *= 1.001
    make(model, samples, tmp_path)
    os.utime(samples[0].image_path, (1, 1))
    make(model, samples, tmp_path)
    assert len(complete(tmp_path)) == 7


def test_the_room_is_kept_to(samples, tmp_path):
    model, lines = tiny_model("tiny-clip-rn", "frozen"), []
    make(model, samples, tmp_path)
    [first] = complete(tmp_path)
    size = sum(path.stat().st_size for path in first.iterdir())
    assert make(model, samples[:-2], tmp_path, room=size / 2, log=lines.append) is None
    assert len(lines) == 1 and "are allowed" in lines[0]
    assert complete(tmp_path) == [first]
    # Room for two: the one that was used longest ago goes, and who has it open may read on.
    second = make(model, samples[2:], tmp_path, room=2.2 * size)
    os.utime(first, (1, 1))
    make(model, samples[4:], tmp_path, room=2.2 * size)
    assert first not in complete(tmp_path) and len(complete(tmp_path)) == 2
    for path in complete(tmp_path):
        os.utime(path, (1, 1))
    make(model, samples[6:], tmp_path, room=1.1 * size)
    assert len(complete(tmp_path)) == 1
    torch.testing.assert_close(second(samples[5:6]).following[-1], live(model, samples[5:6]).following[-1])


def test_a_full_disk_is_no_end(samples, tmp_path, monkeypatch):
    model, lines = tiny_model("tiny-clip-rn", "frozen"), []

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(features.os, "fsync", full)
    assert make(model, samples, tmp_path, log=lines.append) is None
    assert "No space left" in lines[0] and not [path for path in tmp_path.rglob("*") if path.suffix != ".lock"]
    monkeypatch.setattr(features.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100}))
    assert make(model, samples, tmp_path, log=lines.append) is None
    assert "has 100" in lines[1]


def _make_slowly(samples, folder, started):
    torch.set_num_threads(1)
    make(tiny_model("tiny-clip-rn", "frozen"), samples, folder, report=lambda: (started.set(), time.sleep(60)))


def _make(samples, folder, made):
    torch.set_num_threads(1)
    make(tiny_model("tiny-clip-rn", "frozen"), samples, folder, log=made.put)
    made.put("end")


def test_who_is_killed_leaves_nothing_that_is_taken_for_whole(samples, tmp_path):
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_make_slowly, args=(samples, tmp_path, started := context.Event()))
    process.start()
    assert started.wait(60)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not complete(tmp_path) and list(tmp_path.glob(".features-*"))
    model = tiny_model("tiny-clip-rn", "frozen")
    known = make(model, samples, tmp_path)(samples[-1:])  # waits for nobody
    torch.testing.assert_close(known.following[-1], live(model, samples[-1:]).following[-1])
    assert len(complete(tmp_path)) == 1 and not list(tmp_path.glob(".features-*"))


def test_two_that_want_the_same_make_it_once(samples, tmp_path):
    context = multiprocessing.get_context("spawn")
    made = context.Queue()
    processes = [context.Process(target=_make, args=(samples, tmp_path, made)) for _ in range(2)]
    for process in processes:
        process.start()
    lines = [made.get(timeout=120) for _ in range(3)]
    for process in processes:
        process.join()
    assert sorted(line.split()[0] for line in lines) == ["end", "end", "frozen"]
    assert len(complete(tmp_path)) == 1
