"""Synthetic replicas of the data sets, small but with every quirk of the real files."""

import io
import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from ris_bench.data.dataset import Counts
from ris_bench.data.refer import ReferDataset

HEIGHT, WIDTH = 48, 64
SQUARE = [[8, 8, 24, 8, 24, 24, 8, 24]]
SEVERAL = [[4, 4, 12, 4, 12, 12, 4, 12], [10, 10, 20, 10, 20, 20, 10, 20], [40, 4, 50, 4, 50, 14, 40, 14]]
BORDER = [[50, 30, WIDTH, 30, WIDTH, HEIGHT, 50, HEIGHT]]


def crowd() -> dict:
    """Run lengths as COCO has them for a crowd: not compressed, down the columns."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[20:30, 5:40:5] = 1
    changes = np.flatnonzero(np.diff(mask.ravel("F"), prepend=0, append=2))
    return {"size": [HEIGHT, WIDTH], "counts": np.diff(changes, prepend=0).tolist()}


def expected(segmentation: object) -> np.ndarray:
    """The union, painted one by one."""
    if isinstance(segmentation, dict):
        return coco_mask.decode(coco_mask.frPyObjects(segmentation, HEIGHT, WIDTH))
    masks = [coco_mask.decode(coco_mask.frPyObjects([polygon], HEIGHT, WIDTH))[..., 0] for polygon in segmentation]
    return np.maximum.reduce([np.zeros((HEIGHT, WIDTH), np.uint8), *masks])


class Python2Pickler(pickle._Pickler):
    """Writes strings as Python 2 wrote its native ones: bytes of no encoding, by opcodes that Python 3 never writes."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_str(self, text: str) -> None:
        encoded = text.encode("latin1")
        short = len(encoded) < 256
        self.write((b"U" if short else b"T") + len(encoded).to_bytes(1 if short else 4, "little") + encoded)
        self.memoize(text)

    dispatch[str] = save_str


def python2_pickle(value: object) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file, 2).dump(value)
    return file.getvalue()


def write(dataset: ReferDataset, data: Path, *, json_refs: bool = False) -> ReferDataset:
    """The files of a dataset under `data`, and the dataset as if the counts of these were the published ones.

    Two images a split, of three referents with two sentences; where objects are split instead of images, all splits
    have the same two. Referents are numbered alike in all data sets, and their annotations are COCO's.
    """
    images, annotations, refs, published = [], [], [], {}
    by_object = dataset.partition == "google"
    for number, split in enumerate(dataset.splits):
        for place in range(2):
            image_id = 100 + place + (0 if by_object else 10 * number)
            name = f"COCO_train2014_{image_id:012d}.jpg"
            if image_id not in {image["id"] for image in images}:
                images.append({"id": image_id, "file_name": name, "height": HEIGHT, "width": WIDTH})
            for segmentation in ((SQUARE, SEVERAL), (BORDER,))[place]:
                annotations.append(_annotation(len(annotations) + 1000, image_id, segmentation))
                refs.append(_ref(dataset, len(refs) + 1, split, name, annotations[-1]))
        if dataset.stem == "grefs":  # Several objects, and none.
            refs.append(_ref(dataset, len(refs) + 1, split, name, annotations[-1]))
            refs[-1] |= {"ann_id": [annotations[-3]["id"], annotations[-2]["id"]], "category_id": [1, 1]}
            refs[-1] |= {"image_id": annotations[-3]["image_id"]}
            refs.append(_ref(dataset, len(refs) + 1, split, name, annotations[-1]))
            refs[-1] |= {"ann_id": [-1], "category_id": [-1], "no_target": True}
        here = [ref for ref in refs if ref["split"] == split]
        published[split] = Counts(len(here), 2 * len(here), 2)
    annotations.append({**_annotation(5000, images[0]["id"], crowd()), "iscrowd": 1})
    folder = data / dataset.folder
    folder.mkdir(parents=True, exist_ok=True)
    (data / "images" / "train2014").mkdir(parents=True, exist_ok=True)
    for image in images:
        Image.new("RGB", (WIDTH, HEIGHT), (200, 90, 0)).save(data / "images" / "train2014" / image["file_name"])
    record = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cup"}]}
    (folder / "instances.json").write_text(json.dumps(record))
    name = f"{dataset.stem}({dataset.partition})"
    if json_refs:
        (folder / f"{name}.json").write_text(json.dumps(refs))
    else:
        (folder / f"{name}.p").write_bytes(python2_pickle(refs))
    return replace(dataset, published=published)


def _annotation(ann_id: int, image_id: int, segmentation: object) -> dict:
    record = {"id": ann_id, "image_id": image_id, "category_id": 1, "segmentation": segmentation}
    return {**record, "iscrowd": 0, "bbox": [0, 0, 1, 1], "area": 1}


def _ref(dataset: ReferDataset, ref_id: int, split: str, name: str, annotation: dict) -> dict:
    # Not the name of the image: RefCOCO appends a number in the image, RefCOCOg the annotation.
    suffix = annotation["id"] if dataset.folder == "refcocog" else 4
    sentences = [
        {"sent": " the red cup", "raw": "The RED cup!", "sent_id": 2 * ref_id, "tokens": ["the", "red", "cup"]},
        {"sent": " the red cup", "raw": "the red cup", "sent_id": 2 * ref_id + 1, "tokens": ["the", "red", "cup"]},
    ]
    listed = dataset.stem == "grefs"
    return {
        "ref_id": ref_id,
        "ann_id": [annotation["id"]] if listed else annotation["id"],
        "category_id": [1] if listed else 1,
        "image_id": annotation["image_id"],
        "split": split,
        "file_name": f"{name.removesuffix('.jpg')}_{suffix}.jpg",
        "sent_ids": [sentence["sent_id"] for sentence in sentences],
        "sentences": sentences,
    }
