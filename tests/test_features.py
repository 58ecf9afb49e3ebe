"""Frozen features on disk: the same numbers as without, made once, whole or not there, and never more than allowed."""

from __future__ import annotations

import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_model
from PIL import Image

from ris_bench.data.samples import Sample
from ris_bench.errors import UserError
from ris_bench.evaluation import inference
from ris_bench.features import frozen_features
from ris_bench.kept import Room
from ris_bench.pixels import Images

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


def make(model, samples, folder: Path, room: float = 1e9, log=lambda line: None, weights=None, precision=None):
    with inference(model), Room(folder, int(room), log) as place:
        return frozen_features(
            model.backbone.image,
            samples,
            Images(model.backbone.image_size),
            weights or {"clip.pt": "0123"},
            place,
            device=torch.device("cpu"),
            autocast=None,
            precision=precision,
        )


def live(model, samples, precision=None):
    with inference(model):
        return model.backbone.image.known(Images(model.backbone.image_size)(samples), precision)


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


def test_halves_are_what_rounding_makes_of_them_in_half_the_room(samples, tmp_path):
    model, asked = tiny_model("tiny-clip-vit", "coop"), [samples[i] for i in (70, 3, 2, 11)]
    sizes = {}
    for precision in (None, torch.float16, torch.bfloat16):
        known, expected = make(model, samples, tmp_path, precision=precision)(asked), live(model, asked, precision)
        [folder] = set(complete(tmp_path)) - set(sizes.values())
        sizes[precision] = folder
        for found, state in zip(known.following, expected.following, strict=True):
            if state is not None:
                torch.testing.assert_close(found, state, **({"rtol": 0.01, "atol": 1e-4} if precision else {}))
                assert found.dtype == torch.float32
                assert precision is None or torch.equal(found, found.to(precision).float())
    sizes = {key: sum(file.stat().st_size for file in folder.iterdir()) for key, folder in sizes.items()}
    assert sizes[torch.float16] == sizes[torch.bfloat16] == sizes[None] / 2


def test_what_fp16_cannot_hold_is_no_number(samples, tmp_path):
    model = tiny_model("tiny-clip-vit", "coop")
    with torch.no_grad():
        model.backbone.image.stages[0].register_forward_hook(lambda module, given, x: x * 1e9)
    with pytest.raises(UserError, match=r"65,504.*train\.feature_precision to bf16"):
        make(model, samples, tmp_path, precision=torch.float16)
    assert make(model, samples, tmp_path, precision=torch.bfloat16)


def test_they_stay_readable_when_they_gave_way(samples, tmp_path):
    model, lines = tiny_model("tiny-clip-rn", "frozen"), []
    first = make(model, samples, tmp_path)
    [folder] = complete(tmp_path)
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert make(model, samples[:-2], tmp_path, room=size / 2, log=lines.append) is None
    assert len(lines) == 1 and "frozen features of 39 images are not kept" in lines[0]
    make(model, samples[2:], tmp_path, room=1.1 * size)
    assert len(complete(tmp_path)) == 1 and not folder.exists()
    torch.testing.assert_close(first(samples[5:6]).following[-1], live(model, samples[5:6]).following[-1])


def test_two_that_want_the_same_pass_through_the_tower_once(samples, tmp_path):
    """But for the first images, which give the name."""
    context = multiprocessing.get_context("fork")
    folder, passed = tmp_path / "kept", tmp_path / "passed"
    model = tiny_model("tiny-clip-rn", "frozen")

    def work() -> None:
        known = model.backbone.image.known

        def noted(pixels, *args):
            with passed.open("a") as file:
                file.write(f"{len(pixels)} ")
            return known(pixels, *args)

        model.backbone.image.known = noted
        make(model, samples, folder)

    processes = [context.Process(target=work) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert sorted(passed.read_text().split()) == sorted(["32", "32", "32", "8"])
    assert len(complete(folder)) == 1


def test_who_is_killed_leaves_what_the_next_one_makes_right(samples, tmp_path):
    context = multiprocessing.get_context("fork")
    model = tiny_model("tiny-clip-rn", "frozen")

    def work() -> None:
        known = model.backbone.image.known

        def deadly(pixels, *args):
            if len(pixels) < 32:
                os.kill(os.getpid(), signal.SIGKILL)
            return known(pixels, *args)

        model.backbone.image.known = deadly
        make(model, samples, tmp_path)

    process = context.Process(target=work)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not complete(tmp_path) and list(tmp_path.glob(".features-*"))
    known = make(model, samples, tmp_path)(samples[-1:])
    torch.testing.assert_close(known.following[-1], live(model, samples[-1:]).following[-1])
    assert len(complete(tmp_path)) == 1 and not list(tmp_path.glob(".features-*"))
