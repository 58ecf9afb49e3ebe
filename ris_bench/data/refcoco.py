"""RefCOCO, RefCOCO+ and RefCOCOg in the REFER layout, read into one typed sample per expression.

<root>/refcoco/{instances.json, refs(unc).p}         <root>/refcocog/{instances.json, refs(umd).p, refs(google).p}
<root>/refcoco+/{instances.json, refs(unc).p}        <root>/images/train2014  or  images/mscoco/images/train2014
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from ris_bench.errors import UserError
from ris_bench.registry import Registry

DATASETS = Registry("dataset", "ris_bench.data")

IMAGE_FOLDERS = ("images/train2014", "images/mscoco/images/train2014")

_FARTHEST = 1e5  # Pixels from the origin: rasterising takes memory in proportion, so a wild coordinate is an error.


@dataclass(frozen=True)
class Sample:
    """One expression of one referent. Sentences of a referent share its segmentation."""

    dataset: str
    split: str
    ref_id: int
    sent_id: int
    sentence_index: int
    """Position among the sentences of the referent: (dataset, ref_id, sentence_index) names a sample."""
    image_id: int
    ann_id: int
    category: str
    expression: str
    """The normalised sentence, stripped. It may be empty: it is kept and scored, or the denominator would change."""
    raw: str
    """The sentence as it was typed."""
    image_path: Path
    height: int
    width: int
    segmentation: Sequence[Sequence[float]] | Mapping[str, Any] = field(compare=False, repr=False)
    """Polygons as [x0, y0, x1, y1, ...] in pixels, or a run-length dictionary of COCO, compressed or not."""

    def image(self) -> Image.Image:
        """The RGB photo, (height, width); a UserError names a file that is damaged or has another size."""
        try:
            with Image.open(self.image_path) as file:
                if file.size != (self.width, self.height):
                    raise UserError(
                        f"{self.image_path} has {file.width} x {file.height} pixels where its annotation says "
                        f"{self.width} x {self.height}; replace it with the original image"
                    )
                return file.convert("RGB")
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"{self.image_path} cannot be decoded ({error}); download it again") from error

    def mask(self) -> np.ndarray:
        """The referent's pixels, (height, width) uint8 in {0, 1}: the union of its polygons.

        What lies outside the frame is cut off, so a polygon that is wholly outside gives an empty mask. Polygons of
        fewer than three points have no area and are left out.
        """
        try:
            if isinstance(self.segmentation, Mapping):
                rles = [_run_lengths(self.segmentation, self.height, self.width)]
            else:
                polygons = [p for p in self.segmentation if len(p) >= 6]
                if not all(abs(coordinate) < _FARTHEST for p in polygons for coordinate in p):
                    raise ValueError("a coordinate is not a number or far outside any image")
                # One at a time: a list whose first polygon has four numbers would be taken for boxes.
                rles = [coco_mask.frPyObjects([p], self.height, self.width)[0] for p in polygons]
            if not rles:
                return np.zeros((self.height, self.width), dtype=np.uint8)
            return coco_mask.decode(coco_mask.merge(rles))
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise UserError(
                f"the segmentation of annotation {self.ann_id} of {self.dataset} (image {self.image_id}) is malformed "
                f"({error}); replace instances.json with the original"
            ) from error


@dataclass(frozen=True)
class Dataset:
    """A dataset with one of its partitions into splits."""

    name: str
    folder: str
    partition: str
    """The name in parentheses: `refs(unc).p`."""
    word_len: int
    """Tokens per expression, start and end included."""
    eval_splits: tuple[str, ...]
    train_splits: tuple[str, ...] = ("train",)

    def locate(self, data: Path) -> None:
        """Raise a UserError that names everything missing under `data`; quick, so that a sweep can ask first."""
        instances, refs = self._annotations(data)
        missing = [str(path.relative_to(data)) for path in (instances, refs) if not path.is_file()]
        if _image_folder(data) is None:
            missing.append(" or ".join(IMAGE_FOLDERS))
        if missing:
            raise UserError(
                f"{self.name} needs {', '.join(missing)}, looked for in {Path(data).resolve()}; give the folder with "
                "--data DIR (images: train2014.zip of cocodataset.org; annotations: the archives of "
                "github.com/lichengunc/refer, kept by web.archive.org)"
            )

    def read(self, data: Path, split: str) -> list[Sample]:
        """Every expression of a split, ordered by (ref_id, sentence_index).

        Raises UserError for an unknown or empty split, a file that is missing or damaged, a pickle that holds more
        than plain data, a referent without annotation or image, and image files that are not there.
        """
        splits = dict.fromkeys(self.train_splits + self.eval_splits)
        if split not in splits:
            raise UserError(f"{self.name} has no split {split!r}; its splits are {', '.join(splits)}")
        self.locate(data)
        (instances_path, refs_path), image_folder = self._annotations(data), _image_folder(data)
        refs, instances = _read_pickle(refs_path), _read_json(instances_path)
        try:
            samples = self._join(refs, instances, split, image_folder)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{refs_path} or {instances_path} is not in the REFER layout ({type(error).__name__}: {error}); "
                "replace both with the originals"
            ) from error
        if not samples:
            there = ", ".join(sorted({str(ref["split"]) for ref in refs}))
            raise UserError(f"{refs_path} has no referent in the split {split!r}; it has {there or 'none at all'}")
        _require_files(image_folder, (sample.image_path for sample in samples))
        return samples

    def _annotations(self, data: Path) -> tuple[Path, Path]:
        folder = Path(data) / self.folder
        return folder / "instances.json", folder / f"refs({self.partition}).p"

    def _join(self, refs: Any, instances: Any, split: str, image_folder: Path) -> list[Sample]:
        # Equality: `test` must not find testA. And ref["file_name"] is not the name of the image, so image_id joins.
        refs = sorted((ref for ref in refs if ref["split"] == split), key=lambda ref: ref["ref_id"])
        images = {image["id"]: image for image in instances["images"]}
        annotations = {annotation["id"]: annotation for annotation in instances["annotations"]}
        categories = {category["id"]: category["name"] for category in instances["categories"]}
        samples = []
        for ref in refs:
            image, annotation = images.get(ref["image_id"]), annotations.get(ref["ann_id"])
            if image is None or annotation is None or annotation["image_id"] != ref["image_id"]:
                raise UserError(
                    f"referent {ref['ref_id']} of {self.name} points to annotation {ref['ann_id']} of image "
                    f"{ref['image_id']}, which is not in {self.folder}/instances.json; take both files from one archive"
                )
            samples += [
                Sample(
                    dataset=self.name,
                    split=split,
                    ref_id=ref["ref_id"],
                    sent_id=sentence["sent_id"],
                    sentence_index=index,
                    image_id=ref["image_id"],
                    ann_id=ref["ann_id"],
                    category=categories[annotation["category_id"]],
                    expression=sentence["sent"].strip(),
                    raw=sentence["raw"],
                    image_path=image_folder / image["file_name"],
                    height=image["height"],
                    width=image["width"],
                    segmentation=annotation["segmentation"],
                )
                for index, sentence in enumerate(ref["sentences"])
            ]
        return samples


def referents(samples: Sequence[Sample]) -> list[list[int]]:
    """For each referent the positions of its expressions, in the order of first appearance."""
    positions: dict[tuple[str, int], list[int]] = {}
    for position, sample in enumerate(samples):
        positions.setdefault((sample.dataset, sample.ref_id), []).append(position)
    return list(positions.values())


def draw(*key: int | str) -> int:
    """A random integer in [0, 2**64) that depends on the key alone: on no state, package or machine."""
    return int.from_bytes(sha256(repr(key).encode()).digest()[:8], "big")


def shuffled(samples: Sequence[Sample], seed: int) -> list[Sample]:
    """The same samples with their expressions dealt out: every one is used once, and none by its own referent.

    Raises UserError where that cannot be: one referent has more than half of the expressions.
    """
    groups = referents(samples)
    largest = max(map(len, groups), default=0)
    if 2 * largest > len(samples) or not samples:
        raise UserError(
            f"the {len(samples)} expressions of {len(groups)} referents cannot be dealt out to others: one has "
            f"{largest} of them, and at most half is possible; use a larger split"
        )
    groups.sort(key=lambda group: draw(seed, samples[group[0]].ref_id))
    # Referents lie side by side, so a turn by the size of the largest takes every expression out of its own.
    taker = [position for group in groups for position in group]
    giver = taker[largest:] + taker[:largest]
    dealt = list(samples)
    for to, of in zip(taker, giver, strict=True):
        dealt[to] = replace(samples[to], expression=samples[of].expression, raw=samples[of].raw)
    return dealt


class _PlainUnpickler(pickle.Unpickler):
    """Admits what needs no import: builtin containers, numbers and strings. Nothing is ever called."""

    def find_class(self, module: str, name: str) -> Any:
        raise UserError(f"it would load {module}.{name}")


def _read_pickle(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            return _PlainUnpickler(file, encoding="latin1").load()  # Written by Python 2.
    except UserError as error:
        raise UserError(f"{path} is refused: {error}, and only plain data is read; use the original file") from None
    except Exception as error:  # A damaged pickle can raise almost anything.
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); download it again") from error


def _run_lengths(rle: Mapping[str, Any], height: int, width: int) -> dict[str, Any]:
    """COCO's run-length dictionary, compressed (a string) or not (a list), as pycocotools decodes it.

    pycocotools reads beyond the end of runs that are too short for the image, so ValueError where they do not fill it.
    """
    counts = rle["counts"]
    if isinstance(counts, str):
        runs: list[int] = []
        value = shift = 0
        for (
            letter
        ) in counts:  # Five bits each, lowest first; bit 5 says that more follow, bit 4 of the last is the sign.
            digit = ord(letter) - 48
            value |= (digit & 31) << shift
            shift += 5
            if not digit & 32:
                value -= (digit & 16) << (shift - 4)
                runs.append(value + runs[-2] if len(runs) > 2 else value)  # From the fourth on, a difference.
                value = shift = 0
        counts = runs
    if list(rle["size"]) != [height, width] or sum(counts) != height * width or min(counts) < 0:
        raise ValueError(f"its run lengths do not fill an image of {height} x {width}")
    return coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); download it again") from error


def _image_folder(data: Path) -> Path | None:
    return next((Path(data) / folder for folder in IMAGE_FOLDERS if (Path(data) / folder).is_dir()), None)


def _require_files(folder: Path, paths: Iterable[Path]) -> None:
    # One listing instead of a system call for each of 17,000 images; it also refuses a name that leaves the folder.
    there = {entry.path for entry in os.scandir(folder)}
    missing = sorted({path.name for path in paths if str(path) not in there})
    if missing:
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise UserError(
            f"{folder} lacks {len(missing)} of the images: {some}; unpack train2014.zip of cocodataset.org there"
        )


@DATASETS("refcoco")
def refcoco() -> Dataset:
    """Yu et al., "Modeling Context in Referring Expressions", ECCV 2016. testA is people, testB everything else."""
    return Dataset("refcoco", "refcoco", "unc", word_len=17, eval_splits=("val", "testA", "testB"))


@DATASETS("refcoco+")
def refcoco_plus() -> Dataset:
    """RefCOCO's sister without words of place."""
    return Dataset("refcoco+", "refcoco+", "unc", word_len=17, eval_splits=("val", "testA", "testB"))


@DATASETS("refcocog-umd")
def refcocog_umd() -> Dataset:
    """Mao et al., "Generation and Comprehension of Unambiguous Object Descriptions", CVPR 2016; splits by image."""
    return Dataset("refcocog-umd", "refcocog", "umd", word_len=22, eval_splits=("val", "test"))


@DATASETS("refcocog-google")
def refcocog_google() -> Dataset:
    """RefCOCOg as first split: by object, so images of val are in train too; its test split was never released."""
    return Dataset("refcocog-google", "refcocog", "google", word_len=22, eval_splits=("val",))
