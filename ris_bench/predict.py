"""A trained model outside of any data set: a photo and a sentence give a mask.

    from ris_bench.predict import load
    model = load("results/trials/...")  # or a folder that `ris-bench export` or `ris-bench import-official` wrote
    found = model("photo.jpg", "the man on the left")

`found.mask`, `found.probability` and `found.overlay()` have the orientation in which a viewer shows the photo.
"""

from __future__ import annotations

import csv
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from ris_bench import evaluation, export, predictions, speed
from ris_bench.data.dataset import DATASETS, Dataset
from ris_bench.data.samples import MOST_PIXELS
from ris_bench.errors import UserError
from ris_bench.evaluation import forward, log_odds, picture
from ris_bench.loading import Tokenizer
from ris_bench.model import RISModel
from ris_bench.official import DESCRIPTION, describe
from ris_bench.records import Choice, Evaluation
from ris_bench.remote import store_at
from ris_bench.training import reduced, settle
from ris_bench.transforms import Letterbox, normalise, restore
from ris_bench.trial import EVAL_BATCH_SIZE, LOADING_PROCESSES

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What is read. Pillow would also pass PostScript to an interpreter, and an image may come from anywhere."""
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""By which a folder's images are known from its other files, whatever their case."""
MAX_SIDE = 1 << 14
"""Of a photo; it may have MOST_PIXELS in all, a map of which takes half a gigabyte in float64."""
WORD_LEN = 22
"""Tokens where a checkpoint does not say its own: the most that ETRIS and DETRIS feed (config/refcocog_u/*.yaml)."""
MASK_SUFFIXES = (".png",)
OVERLAY_SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")
PROBABILITY_SUFFIXES = (".npy", ".png")

Photo = str | os.PathLike | Image.Image | np.ndarray


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a model sees in a photo; every array is of the upright photo's (height, width)."""

    photo: Image.Image
    """RGB, upright."""
    expression: str
    mask: np.ndarray
    """bool: where the probability exceeds the threshold."""
    probability: np.ndarray
    """float32 in [0, 1]."""

    def overlay(self) -> Image.Image:
        """The photo with the mask tinted and outlined, the expression below; see `evaluation.picture` for its size."""
        return picture(self.photo, self.mask, self.expression)

    def save(self, mask: Path | None = None, overlay: Path | None = None, probability: Path | None = None) -> None:
        """Write what is given a name; its suffix is one of MASK_SUFFIXES, ... and says how.

        The mask is a PNG of 0 and 255. The probability is a 16-bit greyscale PNG in which 65535 is 1, or with .npy the
        float32 array itself. Raises UserError where a file cannot be written.
        """
        pictures = {}
        if mask is not None:
            pictures[mask] = Image.fromarray(self.mask.astype(np.uint8) * 255)
        if overlay is not None:
            pictures[overlay] = self.overlay()
        if probability is not None and Path(probability).suffix.lower() != ".npy":
            pictures[probability] = Image.fromarray(np.rint(self.probability * 65535).astype(np.uint16))
        try:
            for path, image in pictures.items():
                image.save(path)
            if probability is not None and probability not in pictures:
                np.save(probability, self.probability)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot write the prediction: {error}") from error


@dataclass(frozen=True, eq=False)
class Predictor:
    """A trained model with what it is to be fed with; call it with a photo and an expression."""

    model: RISModel
    """In evaluation mode, on `device`."""
    threshold: float
    device: torch.device
    word_len: int | None
    """Tokens per expression that it was trained with, None where the checkpoint does not say."""
    dataset: Choice | None = None
    """What it was trained on, where it is a trial."""
    autocast: torch.dtype | None = None

    def tokenizer(self, word_len: int = WORD_LEN) -> Tokenizer:
        """For expressions of the model's own length; `word_len` where that is not known."""
        return Tokenizer(self.word_len or word_len, self.model.backbone.vocab_size)

    @torch.inference_mode()
    def __call__(self, image: Photo, expression: str) -> Prediction:
        """The prediction for a photo, which is anything that `read_photo` takes, and an expression.

        An expression longer than the model was trained with is cut, as it is in data sets. Raises UserError for a bad
        image, an expression that is no text, and a model whose logits are not finite.
        """
        photo = read_photo(image)
        try:
            expression = expression.strip()
            expression.encode()  # what came from bytes in another encoding cannot be
        except (AttributeError, UnicodeEncodeError):
            raise UserError(f"an expression is text, not {expression!r}") from None
        letterbox = Letterbox(self.model.backbone.image_size)
        image_B3HW = normalise(torch.from_numpy(letterbox.image(photo))[None])
        tokens_BL = self.tokenizer()([expression])
        logits_BHW = forward(self.model, image_B3HW, torch.tensor([0]), tokens_BL, self.device, self.autocast)
        if not logits_BHW.isfinite().all():
            raise UserError(f"the model's logits are not finite for {expression!r}: its checkpoint is of no use")
        logits_HW = restore(logits_BHW, letterbox.frame(photo.height, photo.width))[0]
        mask_HW = (logits_HW > log_odds(self.threshold)).cpu().numpy()
        return Prediction(photo, expression, mask_HW, logits_HW.sigmoid_().float().cpu().numpy())


def load(
    checkpoint: str | os.PathLike,
    *,
    results: Path | str = "results",
    weights: Path | None = None,
    threshold: float | None = None,
    device: torch.device | str | None = None,
    way: speed.Speed = "fast",
) -> Predictor:
    """The model of a trial or of an exported folder, ready to be called.

    Args:
        checkpoint: a folder written by `ris-bench export` or `import-official`, the folder of a trial, or the beginning
            of a trial's id, looked up in `results`.
        weights: where pretrained weights lie, if the checkpoint needs any; None asks caches and the hub.
        threshold: a pixel is in the mask where its probability is greater; in (0, 1). None is the checkpoint's own, or
            the default of trials where it has none.
        device: None is CUDA where there is one.
        way: "plain" computes as the papers' code does, "fast" the same in less time, "compiled" that with its
            blocks compiled.

    It computes in the precision of its trial, or in fp32; whether that is TF32 (see `settle`) holds for the process.

    Raises UserError where there is no such model, or it does not fit its weights.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    folder = Path(checkpoint)
    if (folder / DESCRIPTION).is_file():
        model, record = export.load(folder, weights), describe(folder)[1]
        word_len, own = _said(record, "input", "length"), _said(record, "output", "threshold")
        if word_len is not None and not (isinstance(word_len, int) and 3 <= word_len <= 1000):
            raise UserError(f"{folder / DESCRIPTION} says that expressions have {word_len!r} tokens: 3 to 1000 can be")
        dataset, precision = None, "fp32"
    elif folder.is_dir() and not (folder / "result.json").is_file():
        raise UserError(
            f"{folder} holds neither {DESCRIPTION}, as an exported model does, nor result.json, as a trial does"
        )
    else:
        result, tuned = export.trained(store_at(results).find(os.fspath(checkpoint)))
        trial = result.trial
        model, dataset, own = export.rebuild(result, tuned, weights), trial.dataset, trial.eval.threshold
        word_len, precision = DATASETS.build(dataset).word_len, trial.train.precision
    threshold = next(value for value in (threshold, own, Evaluation.threshold) if value is not None)
    if not (isinstance(threshold, float) and 0 < threshold < 1):
        raise UserError(f"a threshold is a probability between 0 and 1, not {threshold!r}")
    if way == "compiled" and (why := speed.missing_compiler(device)):
        raise UserError(f"nothing can be compiled here ({why}); compute fast")
    speed.choose(model.to(device), way)
    settle(precision, device)
    return Predictor(model, threshold, device, word_len, dataset, reduced(precision, device))


def read_photo(image: Photo) -> Image.Image:
    """An RGB image, upright: the orientation that a camera wrote into the file is applied.

    (Data sets differ: their polygons are in the frame of the file, so that `Sample.image` leaves orientation alone.)
    Takes a path, a PIL image, or an array (H, W, 3) or (H, W) of uint8. Sixteen bits are brought to eight, CMYK and
    palettes to RGB, transparency is laid on white, of several frames the first is read.

    Raises UserError where it is none of these, cannot be decoded, or exceeds MAX_SIDE or MOST_PIXELS.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or not (image.ndim == 2 or image.shape[2:] == (3,)) or not image.size:
            raise UserError(f"an image array is (H, W, 3) or (H, W) of uint8, not {image.shape} of {image.dtype}")
        image = Image.fromarray(image)
    if isinstance(image, Image.Image):
        return _rgb(image, "the image")
    with _open(image) as file:
        return _rgb(file, str(image))


def _open(path: str | os.PathLike) -> Image.Image:
    """The file's header only: a caller may look at many before it starts with the first."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is lower
            file = Image.open(path, formats=FORMATS)
    except FileNotFoundError:
        raise UserError(f"there is no image {path}") from None
    except Image.DecompressionBombError:
        raise UserError(_too_large(path)) from None
    except Exception as error:  # a damaged file can raise almost anything
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is no image of {', '.join(FORMATS)} ({' '.join(reason.split())})") from None
    if max(file.size) > MAX_SIDE or file.width * file.height > MOST_PIXELS:
        file.close()
        raise UserError(_too_large(path))
    return file


def _too_large(name: str | os.PathLike) -> str:
    return f"{name} has too many pixels: at most {MAX_SIDE:,} a side and {MOST_PIXELS:,} in all; make it smaller"


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if max(image.size) > MAX_SIDE or image.width * image.height > MOST_PIXELS:
        raise UserError(_too_large(name))
    if image.mode == "F":
        raise UserError(f"{name} has floating-point pixels, whose range nobody knows: give it 8 or 16 bits")
    try:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):
            upright = Image.fromarray(np.rint(np.asarray(upright).clip(0, 65535) / 257).astype(np.uint8))
        elif "A" in upright.getbands() or "transparency" in upright.info:
            layer = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
        return upright.convert("RGB")
    except Exception as error:  # a damaged file can raise almost anything
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{name} cannot be decoded ({' '.join(reason.split())})") from None


def _said(record: dict[str, Any], part: str, key: str) -> Any:
    found = record.get(part)
    return found.get(key) if isinstance(found, dict) else None


# A split


def predict_split(
    model: Predictor,
    dataset: Dataset,
    split: str,
    data: Path,
    out: Path,
    *,
    dataset_options: Mapping[str, Mapping[str, Any]] | None = None,
    maps: bool = False,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write what the model answers to every expression of a split as a file of `ris_bench.predictions`; how many.

    Args:
        dataset_options: what the dataset was built with, by the name under which it is registered; the file tells it
            to who scores it.
        maps: the network's logits instead of masks, for protocols that cut or resample them in their own way.
        report: called with the number of expressions done and their total.

    Raises UserError as `Dataset.read` and `predictions.write` do, and for a model whose logits are not finite.
    """
    samples = dataset.read(data, split)
    settings = {
        "tokenizer": model.tokenizer(dataset.word_len),
        "batch_size": EVAL_BATCH_SIZE,
        "device": model.device,
        "autocast": model.autocast,
        "num_workers": 0 if model.device.type == "cpu" else LOADING_PROCESSES,
    }

    def answers() -> Iterator[predictions.Prediction]:
        done = 0
        if maps:
            found, kind = evaluation.logits(model.model, samples, **settings), "map_hw"
        else:
            found, kind = evaluation.masks(model.model, samples, threshold=model.threshold, **settings), "mask_HW"
        for index, array_BHW in found:
            arrays = (array_BHW.float() if maps else array_BHW).cpu().numpy()  # NumPy has no bfloat16
            for position, array_HW in zip(index, arrays, strict=True):
                yield predictions.Prediction.of(samples[position], **{kind: array_HW})
            report(done := done + len(index), len(samples))

    how = predictions.Maps(values="logit", geometry="letterbox", size=model.model.backbone.image_size)
    try:
        with evaluation.inference(model.model):
            predictions.write(out, answers(), maps=how if maps else None, dataset_options=dataset_options)
    except FloatingPointError as error:
        raise UserError(f"{error}: its checkpoint is of no use") from None
    return len(samples)


# Many photos


class Pair(NamedTuple):
    """What one prediction is of."""

    image: Path
    expression: str


def pairs(source: Path, expression: str | None = None) -> list[Pair]:
    """The pairs of a CSV file, or every image of a folder (in order of name, not below it) with one expression.

    A CSV has a header with the columns `image` and `expression`, and may have others; its paths start from its own
    folder. Every file is opened, so that a bad one is known before a model is built: raises UserError for the first,
    and where there is no pair, a cell is empty, or the file is no CSV.
    """
    if expression is not None:
        files = sorted(path for path in source.iterdir() if path.suffix.lower() in SUFFIXES)
        found = [Pair(path, expression) for path in files]
        if not found:
            raise UserError(f"{source} has no image: {', '.join(SUFFIXES)}")
    else:
        found = _rows(source)
    for pair in found:
        _open(pair.image).close()
    return found


def _rows(path: Path) -> list[Pair]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or ()
            rows = [(row.get("image"), row.get("expression")) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as CSV in UTF-8 ({error})") from None
    if not {"image", "expression"} <= set(columns):
        raise UserError(f"{path} has the columns {', '.join(columns) or 'of nothing'}: it needs image and expression")
    if not rows:
        raise UserError(f"{path} has no row below its header")
    for number, (image, expression) in enumerate(rows, start=1):
        if not (image or "").strip() or not (expression or "").strip():
            raise UserError(f"row {number} of {path} lacks its image or its expression")
    return [Pair(path.parent / image.strip(), expression) for image, expression in rows]


def check_names(
    image: Path, mask: Path | None = None, overlay: Path | None = None, probability: Path | None = None
) -> None:
    """Raise a UserError where there is no image to open, or a prediction of it could not be saved under these names."""
    _open(image).close()
    suffixes = ((mask, MASK_SUFFIXES), (overlay, OVERLAY_SUFFIXES), (probability, PROBABILITY_SUFFIXES))
    for path, allowed in suffixes:
        if path is not None and path.suffix.lower() not in allowed:
            raise UserError(f"{path} cannot be written: its name must end in {' or '.join(allowed)}")
    taken = [path.resolve() for path in (image, mask, overlay, probability) if path is not None]
    if len(set(taken)) < len(taken):
        raise UserError("two of the image, the mask, the overlay and the probability have one name")


def check_folder(folder: Path) -> None:
    """Raise a UserError unless the folder is still to be made, or empty."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} exists already: name a new folder")


def predict_all(model: Predictor, found: Iterable[Pair], folder: Path) -> Iterator[Path]:
    """Write the prediction of every pair into a folder, and yield the paths of the masks as they come.

    NNNN-STEM.mask.png, .overlay.png and .probability.png are named by the pair's number and its image; index.csv says
    which is which. Raises UserError where the folder is there and not empty, and as `Predictor` does.
    """
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "index.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "expression", "mask", "overlay", "probability"))
        for number, pair in enumerate(found, start=1):
            # Four bytes a letter at most, and a name may have 255.
            stem = f"{number:04}-{pair.image.stem[:50]}"
            names = {kind: f"{stem}.{kind}.png" for kind in ("mask", "overlay", "probability")}
            model(*pair).save(**{kind: folder / name for kind, name in names.items()})
            writer.writerow((*pair, *names.values()))
            file.flush()
            yield folder / names["mask"]
