"""The REFER layout, as github.com/lichengunc/refer has it: referents in one file, COCO's annotations in another.

<data>/<folder>/{instances.json, refs(<partition>).p}      <data>/images/train2014  or  images/mscoco/images/train2014
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from operator import index
from pathlib import Path
from typing import Any

from ris_bench.data.dataset import Counts, Leakage, Part, Source
from ris_bench.data.samples import NO_TARGET, Other, Sample, united
from ris_bench.data.untrusted import is_text, read_json, read_pickle
from ris_bench.errors import UserError

IMAGE_FOLDERS = ("images/train2014", "images/mscoco/images/train2014")


@dataclass(frozen=True)
class ReferDataset(Source):
    """A dataset in the REFER layout, with one of its partitions into splits.

    `ref["file_name"]` is not the name of the image (`COCO_train2014_000000495169_4.jpg`), so that image_id joins. ids
    mean something only within a dataset. A referent of gRefCOCO has a list of annotations, whose union is its mask;
    [-1] stands for none (ReLA gres_model/data/datasets/grefcoco.py:79-97).
    """

    name: str
    folder: str
    partition: str
    """The name in parentheses: `refs(unc).p`."""
    word_len: int
    eval_splits: tuple[str, ...]
    train_splits: tuple[str, ...] = ("train",)
    published: Mapping[str, Counts] = field(default_factory=dict, hash=False)
    stem: str = "refs"
    """What stands before the parentheses."""
    leakage: Leakage = "forbid"

    get_images = "unpack train2014.zip of cocodataset.org there"

    def is_there(self, data: Path) -> bool:
        return (Path(data) / self.folder).is_dir() and any(path.is_file() for path in self._refs(data))

    def locate(self, data: Path) -> None:
        missing = []
        if not self._instances(data).is_file():
            missing.append(str(self._instances(data).relative_to(data)))
        if not any(path.is_file() for path in self._refs(data)):
            missing.append(" or ".join(str(path.relative_to(data)) for path in self._refs(data)))
        if _image_folder(data) is None:
            missing.append(" or ".join(IMAGE_FOLDERS))
        if missing:
            raise UserError(
                f"{self.name} needs {', '.join(missing)}, looked for in {Path(data).resolve()}; give the folder with "
                f"--data DIR, or let `ris-bench data prepare {self.name} --data DIR` bring it there (images: "
                "train2014.zip of cocodataset.org; annotations: the archives of github.com/lichengunc/refer, kept by "
                "web.archive.org)"
            )

    def files(self, data: Path) -> list[Path]:
        return [next(path for path in self._refs(data) if path.is_file()), self._instances(data)]

    def image_folder(self, data: Path) -> Path:
        return _image_folder(data)

    def parse(self, data: Path) -> dict[str, Part]:
        refs_path, instances_path = self.files(data)
        refs = read_pickle(refs_path) if refs_path.suffix == ".p" else read_json(refs_path)
        instances = read_json(instances_path)
        try:
            return join(
                self.name,
                refs,
                instances,
                self.image_folder(data),
                f"{self.folder}/instances.json; take both files from one archive",
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(
                f"{refs_path} or {instances_path} is not in the REFER layout ({type(error).__name__}: {error}); "
                "replace both with the originals"
            ) from error

    def _instances(self, data: Path) -> Path:
        return Path(data) / self.folder / "instances.json"

    def _refs(self, data: Path) -> list[Path]:
        return [Path(data) / self.folder / f"{self.stem}({self.partition}).{suffix}" for suffix in ("p", "json")]


def join(name: str, refs: Any, instances: Any, image_folder: Path, where: str) -> dict[str, Part]:
    """The splits of a dataset from its parsed files.

    `where` ends the message about a referent that points to nothing: the file that lacks it, and what to do. Whatever
    KeyError, TypeError, ... comes out of another layout is the caller's to explain.
    """
    # An id has to be an integer: to compare lists that hold each other many times over would take for ever.
    refs = sorted(refs, key=lambda ref: index(ref["ref_id"]))
    images = {image["id"]: image for image in instances["images"]}
    annotations = {annotation["id"]: annotation for annotation in instances["annotations"]}
    categories = {category["id"]: category["name"] for category in instances["categories"]}
    beside: dict[Any, list[Other]] = {}
    for one in instances["annotations"]:
        if not one.get("iscrowd"):  # that is many objects, and none of them in particular
            other = Other(one["id"], categories.get(one.get("category_id"), ""), one.get("segmentation"))
            beside.setdefault(one["image_id"], []).append(other)
    parts: dict[str, Part] = {}
    known = set()
    for ref in refs:
        index(ref["image_id"])
        part = parts.setdefault(str.__str__(ref["split"]), Part(image_folder))
        who = f"referent {reprlib.repr(ref['ref_id'])} of {name}"
        listed = [index(one) for one in (ref["ann_id"] if isinstance(ref["ann_id"], list) else [ref["ann_id"]])]
        ann_ids = [] if ref["ann_id"] == [NO_TARGET] else listed
        image, objects = images.get(ref["image_id"]), [annotations.get(ann_id) for ann_id in ann_ids]
        if image is None or any(one is None or one["image_id"] != ref["image_id"] for one in objects):
            points = f"annotation {reprlib.repr(ref['ann_id'])} of image {reprlib.repr(ref['image_id'])}"
            part.problems.append(f"{who} points to {points}, which is not in {where}")
        elif ref["ref_id"] in known:
            part.problems.append(f"{who} is there twice; give each an id of its own")
        elif not all(is_text(sentence[key]) for sentence in ref["sentences"] for key in ("sent", "raw")):
            part.problems.append(f"{who} has an expression that is no Unicode text; correct it")
        else:
            others = None  # of a training split nobody asks, and it would fill memory
            if ref["split"] != "train":
                others = [other for other in beside.get(image["id"], ()) if other.ann_id not in ann_ids]
            part.samples += _samples(name, ref, image, objects, categories, image_folder, others)
        known.add(ref["ref_id"])
    return parts


def _samples(
    name: str,
    ref: Any,
    image: Any,
    objects: list[Any],
    categories: dict[int, str],
    image_folder: Path,
    others: list[Other] | None,
) -> Iterator[Sample]:
    segmentation = united([one["segmentation"] for one in objects])
    first, *further = [one["id"] for one in objects] or [NO_TARGET]
    for position, sentence in enumerate(ref["sentences"]):
        yield Sample(
            dataset=name,
            split=ref["split"],
            ref_id=ref["ref_id"],
            sent_id=sentence["sent_id"],
            sentence_index=position,
            image_id=ref["image_id"],
            ann_id=first,
            category="+".join(dict.fromkeys(filter(None, (categories[one["category_id"]] for one in objects)))),
            expression=sentence["sent"].strip(),
            raw=sentence["raw"],
            image_path=image_folder / image["file_name"],
            height=image["height"],
            width=image["width"],
            segmentation=segmentation,
            further_ann_ids=tuple(further),
            others=others,
        )


def _image_folder(data: Path) -> Path | None:
    return next((Path(data) / folder for folder in IMAGE_FOLDERS if (Path(data) / folder).is_dir()), None)
