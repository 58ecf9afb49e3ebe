"""The embedded data set: rendered scenes of several objects, with expressions that are unambiguous by construction.

`draw_scene` renders a scene and `expressions` says everything that singles out one of its objects; the data set
"scenes" writes them in the REFER layout, so that one reader serves all.

A claim ("on the left") is clearly true of some objects of a scene, clearly false of others, and borderline for the
rest: an expression is used only where it is true of its referent and false of every other object that it could mean.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import pickle
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from ris_bench import cache
from ris_bench.data.dataset import DATASETS
from ris_bench.data.refer import IMAGE_FOLDERS, ReferDataset
from ris_bench.data.samples import Sample
from ris_bench.errors import UserError

PRETRAINING_SEED = 1 << 20
"""Seeds of data sets lie below it and those of pre-training scenes start here, so that the two share no scene."""

COLOURS = {
    "red": (215, 35, 35),
    "green": (35, 165, 60),
    "blue": (35, 80, 220),
    "yellow": (240, 215, 40),
    "purple": (165, 45, 180),
    "white": (245, 245, 245),
}
DIAMETERS = {"small": (0.26, 0.28), "large": (0.42, 0.46)}
"""Range of an object's diameter, as a fraction of the square root of the image's area."""
TEXTURES = ("plain", "striped")
MIN_VISIBLE = 0.7
"""Fraction of an object's pixels that no other object covers, at least."""


def _around(*radii: float, count: int, turn: float = -np.pi / 2) -> np.ndarray:
    """(count, 2) corners around the origin, at alternating radii; the first one points up."""
    angles = turn + np.arange(count) * 2 * np.pi / count
    return np.resize(radii, count)[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _heart() -> np.ndarray:
    t = np.arange(32) * 2 * np.pi / 32
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) - 2.5
    return np.stack([16 * np.sin(t) ** 3, y], axis=1) / 29


SHAPES: dict[str, tuple[np.ndarray, ...]] = {
    "circle": (_around(0.5, count=32),),
    "ring": (_around(0.54, count=32), _around(0.2, count=32)),
    "heart": (_heart(),),
    "square": (_around(0.64, count=4, turn=np.pi / 4),),
    "triangle": (_around(0.66, count=3) + (0, 0.12),),
    "star": (_around(0.62, 0.38, count=10),),
}
"""Contours of about unit diameter: the outline, and the hole where there is one."""
ROUND = ("circle", "ring", "heart")
"""Referents of testA are round and those of testB are not, as RefCOCO's are people and other things."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Object:
    """One object of a scene."""

    shape: str
    colour: str
    texture: str
    size: str
    contours: tuple[np.ndarray, ...]
    """(corners, 2) x and y in pixels: the outline, and the hole where there is one, whatever may cover them."""
    mask: np.ndarray
    """(height, width) bool: the visible pixels."""
    occluded: bool
    x: float
    """Centre of the visible pixels, as a fraction of the width."""
    y: float
    """Centre of the visible pixels, as a fraction of the height."""

    @property
    def box(self) -> tuple[int, int, int, int]:
        """x, y, width and height of the visible pixels."""
        rows, columns = np.flatnonzero(self.mask.any(axis=1)), np.flatnonzero(self.mask.any(axis=0))
        left, top = int(columns[0]), int(rows[0])
        return left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top


@dataclass(frozen=True, eq=False)
class Scene:
    image: np.ndarray
    """(height, width, 3) uint8, RGB."""
    objects: tuple[Object, ...]
    """From the rearmost to the foremost."""

    @cached_property
    def statements(self) -> list[list[Statement]]:
        return _statements(self.objects)


# Pictures


def draw_scene(rng: np.random.Generator, num_objects: int, size: tuple[int, int] | None = None) -> Scene:
    """Draw a scene of `num_objects` objects; `size` is (height, width), drawn too where it is not given.

    The objects share few shapes and colours, so that most have a distractor. Each shows at least MIN_VISIBLE of itself.
    """
    height, width = size or rng.integers(104, 137, 2).tolist()
    image = _background(rng, height, width)
    shapes = rng.choice(list(SHAPES), rng.integers(3, 6), replace=False).tolist()
    colours = rng.choice(list(COLOURS), rng.integers(3, 6), replace=False).tolist()
    while True:  # until every object has found a place
        looks = [
            [of[rng.integers(len(of))] for of in (shapes, colours, TEXTURES, list(DIAMETERS))]
            for _ in range(num_objects)
        ]
        places = _places(rng, [(shape, size_class) for shape, _, _, size_class in looks], height, width)
        if places:
            break
    objects = []
    for (shape, colour, texture, size_class), (contours, mask, occluded) in zip(looks, places, strict=True):
        _paint(rng, image, contours, COLOURS[colour], texture)
        y, x = (_centre(mask.astype(np.float32).sum(axis=axis)) for axis in (1, 0))
        objects.append(
            Object(
                shape=shape,
                colour=colour,
                texture=texture,
                size=size_class,
                contours=contours,
                mask=mask,
                occluded=occluded,
                x=x,
                y=y,
            )
        )
    grain = 4 * rng.standard_normal((height, width, 1), dtype=np.float32)
    return Scene(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8), tuple(objects))


def _centre(counts: np.ndarray) -> float:
    """Mean position of the counted pixels, as a fraction of the side."""
    return float((np.arange(len(counts)) + 0.5) @ counts / counts.sum() / len(counts))


def _background(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """A gradient between greys and browns, none as bright as a white object."""
    corners = rng.uniform(60, 150, (2, 2, 1)) * rng.uniform((1, 0.9, 0.75), (1.05, 1, 1))
    return Image.fromarray(corners.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)


def _places(
    rng: np.random.Generator, kinds: Sequence[tuple[str, str]], height: int, width: int
) -> list[tuple[tuple[np.ndarray, ...], np.ndarray, bool]]:
    """Contours, visible mask and "is it occluded" of objects of these shapes and sizes; [] if one found no place."""
    unit = (height * width) ** 0.5
    contours, areas, visible, discs = [], [], [], []
    for shape, size in kinds:
        for _ in range(20):
            diameter = unit * rng.uniform(*DIAMETERS[size])
            angle = rng.uniform(-0.2, 0.2)
            turn = diameter * np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
            corners = [contour @ turn for contour in SHAPES[shape]]
            reach = np.abs(corners[0]).max(axis=0) + 1
            centre = rng.uniform(reach, (width, height) - reach)
            # Where one object sat in the middle of another, "left" and "above" would mean nothing.
            if any(math.dist(centre, c) < 0.35 * (diameter + d) for c, d in discs):
                continue
            corners = tuple((corner + centre).round(2) for corner in corners)
            mask = _filled(corners, height, width)
            remaining = [v & ~mask for v in visible]
            if all(np.count_nonzero(r) >= MIN_VISIBLE * area for r, area in zip(remaining, areas, strict=True)):
                break
        else:
            return []
        discs.append((centre, diameter))
        contours.append(corners)
        areas.append(np.count_nonzero(mask))
        visible = [*remaining, mask]
    return [(c, v, bool(np.count_nonzero(v) < area)) for c, v, area in zip(contours, visible, areas, strict=True)]


def _filled(contours: Sequence[np.ndarray], height: int, width: int) -> np.ndarray:
    """(height, width) bool, rasterised as the reader of an annotation does."""
    outer, *holes = (
        coco_mask.decode(coco_mask.frPyObjects([contour.ravel().tolist()], height, width))[..., 0].astype(bool)
        for contour in contours
    )
    return outer & ~holes[0] if holes else outer


def _paint(
    rng: np.random.Generator, image: Image.Image, contours: Sequence[np.ndarray], colour: Sequence[int], texture: str
) -> None:
    """Paint an object with a dark rim on the image, anti-aliased."""
    low = np.floor(contours[0].min(axis=0)).astype(int) - 1
    extent = (
        np.ceil(contours[0].max(axis=0)).astype(int) + 1 - low
    )  # The tile is twice as large, so its centre is this.
    tint = [min(max(c + change, 0), 255) for c, change in zip(colour, rng.integers(-12, 13, 3).tolist(), strict=True)]
    light, dark, rim = (tuple(int(shade * c) for c in tint) for shade in (1, 0.3, 0.5))
    tile = Image.new("RGB", tuple((2 * extent).tolist()), light)
    pen = ImageDraw.Draw(tile)
    if texture == "striped":
        angle, period = rng.integers(4) * np.pi / 4, 8 + 0.2 * extent.mean()
        along, across = np.array([(np.cos(angle), np.sin(angle)), (-np.sin(angle), np.cos(angle))])
        for offset in (period * np.arange(-4.5, 5)).tolist():
            middle, reach = extent + offset * across, 2 * extent.sum() * along
            pen.line([*(middle - reach).tolist(), *(middle + reach).tolist()], fill=dark, width=round(0.45 * period))
    stencil = Image.new("L", tile.size)
    for contour, inside in zip(contours, (255, 0), strict=False):
        points = (2 * (contour - low) - 0.5).ravel().tolist()
        ImageDraw.Draw(stencil).polygon(points, fill=inside)
        pen.line(points + points[:4], fill=rim, width=3)
    image.paste(tile.reduce(2), tuple(low.tolist()), stencil.reduce(2))


# Language

KINDS = ("category", "colour", "size", "texture", "place", "relation", "ordinal")
MAX_WORDS = 9

WORDS = {
    "small": ("small", "little"),
    "large": ("large", "big"),
    "plain": ("plain", "solid"),
    "": ("object", "thing", "one"),
}
"""Synonyms; any other value of an attribute is its own word, and "" is the noun of a shape left unnamed."""
AFTER = {"striped": ("with stripes",), "plain": ("without stripes",)}
"""What can be said after the noun instead of before it; any other value: "that is red"."""
PLACES = {
    "left": ("left {}", "{} on the left", "{} at left", "{} on the left side"),
    "right": ("right {}", "{} on the right", "{} at right", "{} on the right side"),
    "top": ("top {}", "upper {}", "{} at the top", "{} at top"),
    "bottom": ("bottom {}", "lower {}", "{} at the bottom", "{} at bottom"),
    "top left": ("top left {}", "upper left {}", "{} at top left", "{} in the top left corner"),
    "top right": ("top right {}", "upper right {}", "{} at top right", "{} in the top right corner"),
    "bottom left": ("bottom left {}", "lower left {}", "{} at bottom left", "{} in the bottom left corner"),
    "bottom right": ("bottom right {}", "lower right {}", "{} at bottom right", "{} in the bottom right corner"),
    "middle": ("center {}", "{} in the middle", "{} in the center"),
}
RELATIONS = {
    "left": ("{} left of {}", "{} to the left of {}", "{} on the left of {}"),
    "right": ("{} right of {}", "{} to the right of {}", "{} on the right of {}"),
    "top": ("{} above {}", "{} over {}"),
    "bottom": ("{} below {}", "{} under {}"),
}
RANKS = ("first", "second", "third")
STEPS = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}

Description = tuple[tuple[str, str], ...]
"""Attributes and their values in the order in which they are spoken: adjectives, then perhaps the shape."""
DESCRIPTIONS = [
    (*adjectives, *noun)
    for count in range(3)
    for adjectives in itertools.combinations(("size", "texture", "colour"), count)
    for noun in (("shape",), ())
]


@dataclass(frozen=True)
class Statement:
    """One thing to say of one object, in several wordings."""

    kind: str
    patterns: tuple[str, ...]
    phrases: tuple[tuple[str, ...], ...] = ()
    """Alternatives for each place of a pattern."""

    def draw(self, rng: np.random.Generator) -> str:
        """One of `texts`, without writing all of them down."""
        while True:
            phrases = [phrases[rng.integers(len(phrases))] for phrases in self.phrases]
            text = self.patterns[rng.integers(len(self.patterns))].format(*phrases)
            if len(text.split()) <= MAX_WORDS:
                return text

    def texts(self) -> list[str]:
        texts = [pattern.format(*phrases) for pattern, *phrases in itertools.product(self.patterns, *self.phrases)]
        return [text for text in texts if len(text.split()) <= MAX_WORDS]


def expressions(scene: Scene, target: Object) -> list[tuple[str, str]]:
    """Every (kind, expression) that is true of the target and clearly false of every other object of the scene."""
    index = scene.objects.index(target)
    return [(statement.kind, text) for statement in scene.statements[index] for text in statement.texts()]


def _statements(objects: Sequence[Object]) -> list[list[Statement]]:
    """What can be said of each object; the kind of a statement names the words without which others would fit too."""
    found: list[list[Statement]] = [[] for _ in objects]
    fitting: dict[Description, set[int]] = {}
    for index, thing in enumerate(objects):
        for attributes in DESCRIPTIONS:
            description = tuple((attribute, getattr(thing, attribute)) for attribute in attributes)
            fitting.setdefault(description, set()).add(index)

    names: list[tuple[str, ...]] = [()] * len(objects)
    for description, fits in fitting.items():
        adjectives = [pair for pair in description if pair[0] != "shape"]
        if len(fits) > 1 or any(len(fitting[tuple(p for p in description if p != a)]) == 1 for a in adjectives):
            continue  # ambiguous, or with an adjective too many
        (index,) = fits
        kind = next((kind for kind in ("texture", "size", "colour") if kind in dict(adjectives)), "category")
        phrases = _noun_phrases(description)
        if adjectives:
            *others, (_, last) = adjectives
            rest = _noun_phrases(tuple(pair for pair in description if pair != adjectives[-1]))
            phrases += tuple(f"{noun} {after}" for noun in rest for after in AFTER.get(last, (f"that is {last}",)))
        found[index].append(
            Statement(kind, ("{}", "the {}") if adjectives else ("{}", "the {}", "the only {}"), (phrases,))
        )
        if "shape" in dict(description):
            names[index] += tuple(article + name for article in ("", "the ") for name in _noun_phrases(description))

    claims = [claim for claim in _claims(objects) if claim[2] is None or names[claim[2]]]
    for description, fits in fitting.items():
        if len(fits) == 1 or sum(attribute != "shape" for attribute, _ in description) > 1:
            continue
        phrases = _noun_phrases(description)
        for kind, patterns, anchor, yes, no in claims:
            if len(fits & yes) == 1 and fits <= yes | no:
                (index,) = fits & yes
                slots = (phrases,) if anchor is None else (phrases, names[anchor])
                found[index].append(Statement(kind, _with_article(patterns), slots))
        for side, (right, down) in STEPS.items():
            position = {index: right * objects[index].x + down * objects[index].y for index in fits}
            order = sorted(fits, key=position.__getitem__, reverse=True)
            clear = [position[a] - position[b] > 0.1 for a, b in itertools.pairwise(order)]
            for rank, index in enumerate(order[: len(RANKS)]):
                # Of two objects only the first is counted: the other is not called the second, but the last.
                if all(clear[max(rank - 1, 0) : rank + 1]) and (rank == 0 or len(order) > 2):
                    found[index].append(Statement("ordinal", _ordinal_patterns(rank, side), (phrases,)))
    return found


def _claims(objects: Sequence[Object]) -> Iterator[tuple[str, tuple[str, ...], int | None, set[int], set[int]]]:
    """(kind, patterns, the object referred to or None, indices it is clearly true of, and clearly false of)."""

    def claim(kind: str, patterns: tuple[str, ...], anchor: int | None, scores: Sequence[float], yes: float, no: float):
        return (
            kind,
            patterns,
            anchor,
            {index for index, score in enumerate(scores) if score > yes},
            {index for index, score in enumerate(scores) if score < no},
        )

    # The middle of a triangle's box is up to 0.08 above its centre of mass: margins are wider than that.
    for place, patterns in PLACES.items():
        if place == "middle":
            scores = [-max(abs(o.x - 0.5), abs(o.y - 0.5)) for o in objects]
            yield claim("place", patterns, None, scores, -0.12, -0.28)
        else:
            steps = [STEPS[side] for side in place.split()]
            scores = [min(right * (o.x - 0.5) + down * (o.y - 0.5) for right, down in steps) for o in objects]
            yield claim("place", patterns, None, scores, 0.12, -0.09)
    for (side, (right, down)), (anchor, a) in itertools.product(STEPS.items(), enumerate(objects)):
        along = [right * (o.x - a.x) + down * (o.y - a.y) for o in objects]
        across = [down * (o.x - a.x) + right * (o.y - a.y) for o in objects]
        kind, patterns, anchor, yes, no = claim("relation", RELATIONS[side], anchor, along, 0.16, -0.1)
        # What lies more above than left is not called left, but nor is it clearly not left.
        yield kind, patterns, anchor, {i for i in yes if abs(across[i]) < along[i]}, no | {anchor}


@functools.cache
def _ordinal_patterns(rank: int, side: str) -> tuple[str, ...]:
    patterns = (f"{RANKS[rank]} {{}} from the {side}", f"{RANKS[rank]} {{}} from {side}")
    if rank == 0 and side in ("left", "right"):
        patterns += (f"far {side} {{}}", f"{{}} on the far {side}")
    return _with_article(patterns)


@functools.cache
def _noun_phrases(description: Description) -> tuple[str, ...]:
    """The description in every choice of words, without an article: "small red circle", "little red circle"."""
    values = [value for _, value in description] + ([] if "shape" in dict(description) else [""])
    return tuple(" ".join(words) for words in itertools.product(*(WORDS.get(value, (value,)) for value in values)))


@functools.cache
def _with_article(patterns: tuple[str, ...]) -> tuple[str, ...]:
    return patterns + tuple(f"the {pattern}" for pattern in patterns)


# The data set

GENERATOR = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
"""What another version of this file has generated is left aside: it may be different."""
SPLITS = ("train", "val", "testA", "testB")
FEWEST_OBJECTS, MOST_OBJECTS = 3, 5
MOST_REFERENTS = 3
MOST_EXPRESSIONS = 3
WEIGHTS = {"category": 6, "colour": 12, "size": 12, "texture": 12, "place": 12, "relation": 2, "ordinal": 2}
"""How often a kind is chosen among those that a referent allows."""


@dataclass(frozen=True)
class Scenes(ReferDataset):
    """Generated when first asked for, into $RIS_BENCH_CACHE or ~/.cache/ris-bench; a data folder is not needed."""

    num_train: int = 0
    num_eval: int = 0
    seed: int = 0

    @property
    def home(self) -> Path:
        key = json.dumps([GENERATOR, self.num_train, self.num_eval, self.seed])
        return cache.folder() / f"scenes-{hashlib.sha256(key.encode()).hexdigest()[:12]}"

    def locate(self, data: Path) -> None:
        """Generate the scenes unless they are there. Raises UserError where they cannot be written."""
        if self.home.is_dir():
            return
        print(f"Generating {self.num_train + 3 * self.num_eval} scenes in {self.home}", file=sys.stderr, flush=True)
        try:
            self.home.parent.mkdir(parents=True, exist_ok=True)
            unfinished = Path(tempfile.mkdtemp(prefix=".scenes-", dir=self.home.parent))
            try:
                self._write(unfinished)
                # Another process may have been faster; what it made is the same.
                with contextlib.suppress(FileExistsError):
                    _move(unfinished, self.home)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
        except OSError as error:
            raise UserError(
                f"the scenes cannot be written to {self.home} ({error.strerror}); "
                "make room there, or name another folder in RIS_BENCH_CACHE"
            ) from error

    def read(self, data: Path, split: str) -> list[Sample]:
        """Every expression of a split; `data` is not used."""
        self.locate(data)
        return super().read(self.home, split)

    def _write(self, root: Path) -> None:
        folder = root / IMAGE_FOLDERS[0]
        folder.mkdir(parents=True)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        refs: list[dict[str, Any]] = []
        for number, split in enumerate(SPLITS):
            for i in range(self.num_train if split == "train" else self.num_eval):
                rng = np.random.default_rng([self.seed, number, i])
                scene, chosen = _scene_with_referents(rng, split)
                image_id = len(images) + 1
                name = f"{split}_{i:06d}.jpg"
                Image.fromarray(scene.image).save(folder / name, quality=95)
                height, width = scene.image.shape[:2]
                images.append({"id": image_id, "file_name": name, "height": height, "width": width})
                for thing in scene.objects:
                    annotations.append(_annotation(thing, len(annotations) + 1, image_id))
                    if thing in chosen:
                        refs.append(_ref(rng, scene, thing, split, len(refs) + 1, annotations[-1]))
        categories = [{"id": i + 1, "name": shape} for i, shape in enumerate(SHAPES)]
        home = root / self.folder
        home.mkdir()
        instances = {"images": images, "annotations": annotations, "categories": categories}
        (home / "instances.json").write_text(json.dumps(instances), encoding="utf-8")
        (home / f"refs({self.partition}).p").write_bytes(pickle.dumps(refs, protocol=2))


def _move(source: Path, target: Path) -> None:
    try:
        os.rename(source, target)
    except OSError:
        if target.is_dir():
            raise FileExistsError(target) from None
        raise


def _scene_with_referents(rng: np.random.Generator, split: str) -> tuple[Scene, list[Object]]:
    """A scene and, of its objects that can be told from the rest, two or three; those of testA and testB by shape."""
    while True:
        scene = draw_scene(rng, int(rng.integers(FEWEST_OBJECTS, MOST_OBJECTS + 1)))
        candidates = [
            thing
            for thing, statements in zip(scene.objects, scene.statements, strict=True)
            if statements and (split not in ("testA", "testB") or (thing.shape in ROUND) == (split == "testA"))
        ]
        if len(candidates) >= 2:
            count = min(len(candidates), int(rng.integers(2, MOST_REFERENTS + 1)))
            return scene, [candidates[i] for i in rng.permutation(len(candidates))[:count]]


def _annotation(thing: Object, ann_id: int, image_id: int) -> dict[str, Any]:
    """A polygon where the object is one, else run lengths of what is seen of it."""
    if thing.occluded or len(thing.contours) > 1:
        rle = coco_mask.encode(np.asfortranarray(thing.mask.astype(np.uint8)))
        segmentation: Any = {"size": rle["size"], "counts": rle["counts"].decode()}
    else:
        segmentation = [thing.contours[0].ravel().tolist()]
    return {
        "id": ann_id,
        "image_id": image_id,
        "category_id": list(SHAPES).index(thing.shape) + 1,
        "segmentation": segmentation,
        "bbox": list(thing.box),
        "area": int(thing.mask.sum()),
        "iscrowd": 0,
    }


def _ref(
    rng: np.random.Generator, scene: Scene, thing: Object, split: str, ref_id: int, annotation: dict[str, Any]
) -> dict[str, Any]:
    """Up to three different expressions, of kinds drawn as `WEIGHTS` has them."""
    by_kind: dict[str, list[Statement]] = {}
    for statement in scene.statements[scene.objects.index(thing)]:
        by_kind.setdefault(statement.kind, []).append(statement)
    kinds = list(by_kind)
    weights = np.array([WEIGHTS[kind] for kind in kinds], dtype=float)
    texts: dict[str, str] = {}
    for kind in rng.choice(kinds, MOST_EXPRESSIONS, p=weights / weights.sum()).tolist():
        statement = by_kind[kind][rng.integers(len(by_kind[kind]))]
        texts.setdefault(statement.draw(rng), kind)
    sentences = [
        {
            "raw": text,
            "sent": text,
            "tokens": text.split(),
            "sent_id": MOST_EXPRESSIONS * ref_id + i,
            "kind": kind,
        }
        for i, (text, kind) in enumerate(texts.items())
    ]
    return {
        "ref_id": ref_id,
        "ann_id": annotation["id"],
        "image_id": annotation["image_id"],
        "category_id": annotation["category_id"],
        "split": split,
        "file_name": "",
        "sent_ids": [sentence["sent_id"] for sentence in sentences],
        "sentences": sentences,
    }


@DATASETS("scenes")
def scenes(*, num_train: int = 2000, num_eval: int = 150, seed: int = 0) -> ReferDataset:
    """Generated scenes: `num_train` in train and `num_eval` in each of val, testA and testB, which share none."""
    if num_train < 1 or num_eval < 1 or not 0 <= seed < PRETRAINING_SEED:
        raise UserError(
            f"dataset 'scenes' has num_train {num_train}, num_eval {num_eval}, seed {seed}: the first two must be at "
            f"least 1, and the seed from 0 to {PRETRAINING_SEED - 1}"
        )
    return Scenes("scenes", "scenes", "generated", 17, SPLITS[1:], num_train=num_train, num_eval=num_eval, seed=seed)
