"""A data set of one's own: COCO's images and annotations, and expressions beside them, in one JSON file.

    {
      "images":      [{"id": 1, "file_name": "kitchen.jpg", "height": 480, "width": 640}],
      "annotations": [{"id": 7, "image_id": 1, "segmentation": [[10, 10, 90, 10, 90, 60]], "category_id": 3}],
      "categories":  [{"id": 3, "name": "cup"}],
      "expressions": [{"id": 5, "image_id": 1, "annotation_ids": [7], "split": "train",
                       "sentences": ["the red cup", "cup on the left"]}]
    }

ids are integers from 0, each once in its list. A segmentation is a list of polygons [x0, y0, x1, y1, ...] in pixels, or
a run-length dictionary of COCO; the pixels of an image are those stored, whatever its EXIF orientation says. An entry
of `expressions` is a referent with one or more sentences: its mask is the union of its annotations, all of them of its
image, and `annotation_ids: []` says that there is no such thing in the image. `categories` and `category_id` may be
left out, and what else COCO's three lists hold (bbox, area, iscrowd, ...) is not read. In `expressions`, which are not
COCO's, an unknown key is an error.
"""

from __future__ import annotations

import hashlib
import re
import reprlib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar, get_type_hints

from ris_bench.data.dataset import DATASETS, Dataset, Leakage, Part, Source
from ris_bench.data.refer import join
from ris_bench.data.samples import NO_TARGET
from ris_bench.data.untrusted import read_json
from ris_bench.errors import UserError
from ris_bench.registry import checked, describe


@dataclass(frozen=True)
class _Image:
    id: int
    file_name: str
    height: int
    width: int


@dataclass(frozen=True)
class _Annotation:
    id: int
    image_id: int
    segmentation: list[Any] | dict[str, Any]
    category_id: int | None = None


@dataclass(frozen=True)
class _Category:
    id: int
    name: str


@dataclass(frozen=True)
class _Expression:
    id: int
    image_id: int
    annotation_ids: list[int]
    split: str
    sentences: list[str]


LISTS = {"images": _Image, "annotations": _Annotation, "categories": _Category, "expressions": _Expression}
SCHEMA = "the module ris_bench.data.own shows how such a file is written"

Record = TypeVar("Record", _Image, _Annotation, _Category, _Expression)


@dataclass(frozen=True)
class Own(Source):
    """The JSON file at <data>/`file`, with its images in <data>/`images` or below."""

    name: str
    file: str
    images: str
    word_len: int
    eval_splits: tuple[str, ...]
    sha256: str | None
    leakage: Leakage
    train_splits: tuple[str, ...] = ("train",)

    get_images = "put them there, or name their folder with the option 'images'"

    def is_there(self, data: Path) -> bool:
        return (Path(data) / self.file).is_file()

    def locate(self, data: Path) -> None:
        file, images = Path(data) / self.file, Path(data) / self.images
        missing = [str(path) for path, there in ((file, file.is_file()), (images, images.is_dir())) if not there]
        if missing:
            raise UserError(
                f"{self.name} needs {' and '.join(missing)}; its options 'file' and 'images' start from the folder "
                "given with --data DIR"
            )

    def files(self, data: Path) -> list[Path]:
        return [Path(data) / self.file]

    def image_folder(self, data: Path) -> Path:
        return Path(data) / self.images

    def scan(self, data: Path, split: str | None = None) -> dict[str, Part]:
        self.locate(data)
        (path,) = self.files(data)
        if self.sha256 is not None and (found := hashlib.sha256(path.read_bytes()).hexdigest()) != self.sha256:
            raise UserError(f"{path} has the sha256 {found}, and the option 'sha256' of {self.name} another")
        return super().scan(data, split)

    def parse(self, data: Path) -> dict[str, Part]:
        (path,) = self.files(data)
        document = read_json(path, "correct it")
        if not isinstance(document, Mapping):
            raise UserError(f"{path} holds {reprlib.repr(document)}, which is no mapping; {SCHEMA}")
        lists = {key: _records(document, key, kind, path) for key, kind in LISTS.items()}
        names = {category.id: category.name for category in lists["categories"]}
        for one in lists["annotations"]:
            if one.category_id is not None and one.category_id not in names:
                raise UserError(f"{path}: annotation {one.id} has the category {one.category_id}, which is not listed")
        for image in lists["images"]:
            if image.height < 1 or image.width < 1:
                raise UserError(f"{path}: image {image.id} has {image.width} x {image.height} pixels")
        # From here on it is the REFER layout, where nothing is not an empty list.
        refs, sent_id = [], 0
        for entry in lists["expressions"]:
            sentences = [
                {"sent": text, "raw": text, "sent_id": sent_id + index} for index, text in enumerate(entry.sentences)
            ]
            sent_id += len(sentences)
            ann_ids = entry.annotation_ids or [NO_TARGET]
            ref = {"ref_id": entry.id, "image_id": entry.image_id, "ann_id": ann_ids}
            refs.append({**ref, "split": entry.split, "sentences": sentences})
        instances = {
            "images": [vars(image) for image in lists["images"]],
            "annotations": [vars(annotation) for annotation in lists["annotations"]],
            "categories": [{"id": None, "name": ""}, *(vars(category) for category in lists["categories"])],
        }
        return join(self.name, refs, instances, self.image_folder(data), f"{path}; correct its ids")


@DATASETS("own")
def own(
    *,
    file: str,
    images: str | None = None,
    name: str = "own",
    word_len: int = 22,
    eval_splits: tuple[str, ...] = ("val",),
    sha256: str | None = None,
    leakage: Leakage = "forbid",
) -> Dataset:
    """A data set of one's own: `own: {file: mine/cups.json, images: mine/photos}`.

    Both start from the data folder, and `images` is the folder of `file` where it is not given. `name` tells several
    of a mix apart. `sha256`, of the file, makes its content a part of the trial: another file is refused.
    """
    folder = str(PurePosixPath(file).parent) if images is None else images
    for option, path in (("file", file), ("images", folder)):
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise UserError(f"option {option!r} of dataset 'own' is {path!r}; write a path that starts from --data DIR")
    if not re.fullmatch(r"[A-Za-z0-9_.+-]+", name) or name == "shuffled":
        raise UserError(f"option 'name' of dataset 'own' is {name!r}; use letters, digits, _ . + -, and not 'shuffled'")
    if not 3 <= word_len <= 77:
        raise UserError(f"option 'word_len' of dataset 'own' is {word_len}; CLIP's text encoders read 3 to 77 tokens")
    return Own(name, file, folder, word_len, eval_splits, sha256, leakage)


def _records(document: Mapping[str, Any], key: str, kind: type[Record], path: Path) -> list[Record]:
    """A list of the file, every value of its type and every id once; UserError names the first entry that is not so."""
    items = document.get(key, [] if key == "categories" else None)
    if not isinstance(items, list):
        raise UserError(f"{path} has no list {key!r}; {SCHEMA}")
    hints = get_type_hints(kind)
    required = {f.name for f in fields(kind) if f.default is MISSING}
    records, known = [], set()
    for number, item in enumerate(items):
        where = f"{path}: {key}[{number}]"
        if not isinstance(item, Mapping):
            raise UserError(f"{where} is {reprlib.repr(item)}, which is no mapping; {SCHEMA}")
        if missing := required - item.keys():
            raise UserError(f"{where} lacks {', '.join(sorted(missing))}; {SCHEMA}")
        if kind is _Expression and (unknown := item.keys() - hints.keys()):
            raise UserError(f"{where} has the key {reprlib.repr(min(unknown))}, which is not known; {SCHEMA}")
        for name in hints.keys() & item.keys():
            try:
                checked(item[name], hints[name], name)
            except (UserError, RecursionError):
                said = f"{where}: {name} is {reprlib.repr(item[name])}, which is not {describe(hints[name])}"
                raise UserError(f"{said}; {SCHEMA}") from None
        record = kind(**{name: item[name] for name in hints if name in item})
        if not 0 <= record.id < 1 << 63 or record.id in known:
            raise UserError(f"{where} has the id {reprlib.repr(record.id)}; ids count from 0, and each is there once")
        known.add(record.id)
        records.append(record)
    return records
