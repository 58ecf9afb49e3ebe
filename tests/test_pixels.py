"""Letterboxed photos and masks from disk are those from their files, to the last bit, and notice what was exchanged."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ris_bench.data.samples import Sample
from ris_bench.errors import UserError
from ris_bench.kept import Room
from ris_bench.pixels import CHUNK, Images, Masks

NUMBER = CHUNK + 8
SIDE = 32


@pytest.fixture
def samples(tmp_path) -> list[Sample]:
    """Two referents with two expressions each on every image; images of many shapes."""
    folder, rng = tmp_path / "photos", np.random.default_rng(0)
    folder.mkdir()
    found = []
    for number in range(NUMBER):
        height, width = rng.integers(20, 60, 2).tolist()
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        for ref_id in (2 * number, 2 * number + 1):
            x, y = rng.uniform(0, 20, 2).tolist()
            sample = Sample(
                dataset="d",
                split="train",
                ref_id=ref_id,
                sent_id=2 * ref_id,
                sentence_index=0,
                image_id=number,
                ann_id=ref_id,
                category="thing",
                expression="thing",
                raw="thing",
                image_path=folder / f"{number}.png",
                height=height,
                width=width,
                # Also one that is nowhere, and one that is everywhere.
                segmentation={0: [], 1: [[-9, -9, 99, -9, 99, 99, -9, 99]]}.get(ref_id, [[x, y, x + 15, y, x + 9, 50]]),
            )
            found += [sample, replace(sample, sent_id=2 * ref_id + 1, sentence_index=1)]
    return found


def room(folder: Path, allowed: float = 1e9, log=lambda line: None) -> Room:
    return Room(folder / "kept", int(allowed), log)


def kept(kind: str, folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "kept").glob(f"{kind}-*") if path.is_dir())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [Images, Masks])
def test_from_disk_they_are_the_same_and_no_file_is_read(kind, workers, samples, tmp_path, monkeypatch):
    expected = kind(SIDE)(samples)
    for _ in range(2):  # made, and found
        with room(tmp_path) as place:
            made = kind(SIDE)
            made.keep(samples, place, workers)
        again = pickle.loads(pickled := pickle.dumps(made))
        assert len(pickled) < 50 * NUMBER  # names and places, no pixels
        with monkeypatch.context() as patch:
            for name in ("image", "mask"):
                patch.setattr(Sample, name, lambda self: pytest.fail("a file was read"))
            for one in (made, again):
                assert torch.equal(one(samples), expected)
                some = [5, 3, 3, len(samples) - 1]
                assert torch.equal(one([samples[i] for i in some]), expected[some])
    assert len(list((tmp_path / "kept").glob("*-*[!k]"))) == 1


def test_masks_take_little(samples, tmp_path):
    angle = np.linspace(0, 2 * np.pi, 50)
    circle = np.stack([300 + 90 * np.cos(angle), 200 + 150 * np.sin(angle)], axis=1).ravel().tolist()
    with room(tmp_path) as place:
        Masks(416).keep([replace(samples[0], height=480, width=640, segmentation=[circle])], place)
    [folder] = kept("masks", tmp_path)
    assert sum(file.stat().st_size for file in folder.iterdir()) < 416**2 / 20


def test_a_photo_that_was_exchanged_is_noticed(samples, tmp_path):
    def keep(of: list[Sample], side: int = SIDE) -> Images:
        with room(tmp_path) as place:
            (images := Images(side)).keep(of, place)
        return images

    before, photo = keep(samples), samples[-1].image_path
    keep([replace(sample, expression="another", ref_id=0) for sample in samples])  # the same photos
    assert len(kept("images", tmp_path)) == 1
    other = np.random.default_rng(1).integers(0, 256, (samples[-1].height, samples[-1].width, 3), dtype=np.uint8)
    Image.fromarray(other).save(photo)
    after = keep(samples)
    assert torch.equal(after(samples), Images(SIDE)(samples))
    assert not torch.equal(before(samples[-1:]), after(samples[-1:]))
    os.utime(photo, (1, 1))
    keep(samples)
    keep(samples, 2 * SIDE)
    keep(samples[:-4])
    assert len(kept("images", tmp_path)) == 5
    photo.unlink()
    with pytest.raises(UserError, match=f"{photo.name} cannot be read"):
        keep(samples)


def test_a_mask_that_was_changed_is_noticed(samples, tmp_path):
    moved = [replace(s, segmentation=[[1, 1, 9, 1, 9, 9]]) if s.ref_id == 7 else s for s in samples]
    for of in (samples, samples, moved):
        with room(tmp_path) as place:
            (masks := Masks(SIDE)).keep(of, place)
        assert torch.equal(masks(of), Masks(SIDE)(of))
    assert len(kept("masks", tmp_path)) == 2


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("position", [0, -1])
def test_a_damaged_photo_ends_in_one_line_that_names_it(position, workers, samples, tmp_path):
    samples[position].image_path.write_bytes(b"\xff\xd8 no picture")
    with pytest.raises(UserError, match=r"\.png cannot be decoded") as raised, room(tmp_path) as place:
        Images(SIDE).keep(samples, place, workers)
    assert "\n" not in str(raised.value) and samples[position].image_path.name in str(raised.value)
    assert not kept("images", tmp_path)


def test_without_room_they_come_from_their_files(samples, tmp_path):
    lines = []
    with room(tmp_path, 1000, lines.append) as place:
        (images := Images(SIDE)).keep(samples, place)
        (masks := Masks(SIDE)).keep(samples, place)
    assert [line.split(" are not kept")[0] for line in lines] == [
        f"letterboxed images of {NUMBER} photos",
        f"letterboxed masks of {2 * NUMBER} referents",
    ]
    assert torch.equal(images(samples), Images(SIDE)(samples)) and torch.equal(masks(samples), Masks(SIDE)(samples))
    nothing = Images(SIDE)
    nothing.keep([replace(samples[0], image_path=tmp_path / "nowhere.png")], room(tmp_path, 0))  # not even looked at
