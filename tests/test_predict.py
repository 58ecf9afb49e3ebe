"""A photo and a sentence give a mask: what is read, what is written, and what ends in one line."""

from __future__ import annotations

import csv
import json
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import trained
from PIL import Image

from ris_bench import cli, evaluation, predict, predictions
from ris_bench.data.samples import Sample
from ris_bench.errors import UserError
from ris_bench.export import export
from ris_bench.loading import Tokenizer
from ris_bench.predict import load, read_photo
from ris_bench.results import Store

SLICE = Path(__file__).parents[2] / "shared" / "refcocog_slice"
ORIENTATION = 0x0112


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a trial in `results` and the same model in `exported`."""
    home = tmp_path_factory.mktemp("home")
    store = Store(home / "results")
    _, result = trained(store, "tiny-clip-vit", "frozen")
    export(store.folder(result.trial), home / "exported", merge=True)
    return home


@pytest.fixture(scope="module")
def model(home):
    return load(home / "exported")


@pytest.fixture
def photo(tmp_path) -> Path:
    """60 wide and 40 high, without two equal quarters."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((60, 40), Image.Resampling.BICUBIC).save(path := tmp_path / "photo.png")
    return path


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_three_lines_in_a_notebook(home, photo):
    model = load(home / "exported")
    found = model(str(photo), "the man on the left")
    assert found.mask.shape == found.probability.shape == (40, 60)
    assert (found.mask.dtype, found.probability.dtype) == (np.dtype(bool), np.dtype(np.float32))
    assert isinstance(found.overlay(), Image.Image)
    array = model(pixels(photo), "the man on the left")
    image = model(Image.open(photo), "the man on the left")
    assert (found.probability == array.probability).all() and (found.probability == image.probability).all()
    assert found.probability.std() > 0 and (model(photo, "a dog").probability != found.probability).any()


def test_a_checkpoint_is_a_trial_or_a_folder(home, photo):
    (folder,) = (home / "results" / "trials").glob("[!.]*")
    expected = load(home / "exported")(photo, "a cup").probability
    for name in (folder, str(folder), folder.name, folder.name[:-3]):
        found = load(name, results=home / "results")
        np.testing.assert_allclose(found(photo, "a cup").probability, expected, atol=1e-5)
        assert (found.threshold, found.word_len, found.dataset.name) == (0.35, 17, "refcoco")


def test_the_mask_is_the_one_that_an_evaluation_counts(model, photo):
    """Cut at the median, so that neither mask is trivial."""
    threshold = float(np.median(model(photo, "a cup").probability))
    model = predict.Predictor(model.model, threshold, model.device, model.word_len)
    found = model(photo, "a cup")
    sample = Sample("d", "val", 1, 1, 0, 1, 1, "c", "a cup", "", photo, 40, 60, [[0, 0, 30, 0, 30, 40, 0, 40]])
    settings = {"tokenizer": Tokenizer(17, 8192), "batch_size": 1, "device": torch.device("cpu")}
    row = evaluation.evaluate(model.model, [sample], threshold=threshold, **settings).iloc[0]
    assert 0 < row["predicted"] == found.mask.sum() < 2400
    assert row["intersection"] == found.mask[:, :30].sum()
    assert abs((found.probability > threshold).sum() - found.mask.sum()) <= 2  # float32 rounds what the mask compares


def test_the_threshold_is_the_checkpoints_own_or_the_users(home, photo, tmp_path):
    assert load(home / "exported").threshold == 0.35
    assert load(home / "exported", threshold=0.5).threshold == 0.5
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "model.safetensors").symlink_to(home / "exported" / "model.safetensors")
    record = json.loads((home / "exported" / "model.json").read_text())
    (copy / "model.json").write_text(json.dumps(record | {"output": {"threshold": 0.6}}))
    assert load(copy).threshold == 0.6
    for part in ("input", "output"):  # as import-official writes it
        del record[part]
    (copy / "model.json").write_text(json.dumps(record))
    assert (load(copy).threshold, load(copy).tokenizer().word_len) == (0.35, 22)
    (copy / "model.json").write_text(json.dumps(record | {"input": {"length": 10**9}}))
    with pytest.raises(UserError, match="1000000000 tokens"):
        load(copy)
    for threshold in (0.0, 1.0, float("nan"), "0.5"):
        with pytest.raises(UserError, match="between 0 and 1"):
            load(home / "exported", threshold=threshold)


# Photos


def test_a_photo_is_turned_upright(photo, tmp_path):
    """Orientation 6: the first row of the file is the right side of the photo."""
    stored = Image.open(photo)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    stored.save(tmp_path / "turned.png", exif=exif)
    assert (pixels(tmp_path / "turned.png") == pixels(photo)).all()
    upright = read_photo(tmp_path / "turned.png")
    assert upright.size == (40, 60)
    assert (np.asarray(upright) == np.rot90(pixels(photo), -1)).all()
    with Image.open(tmp_path / "turned.png") as opened:
        assert read_photo(opened).size == (40, 60)


def test_sixteen_bits_cmyk_palettes_and_transparency_are_read(tmp_path):
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(ramp * 257).save(tmp_path / "deep.png")
    assert (np.asarray(read_photo(tmp_path / "deep.png"))[..., 1] == ramp).all()
    Image.fromarray(ramp.astype(np.int32) * 257).save(tmp_path / "deep.tif")
    assert (np.asarray(read_photo(tmp_path / "deep.tif"))[..., 1] == ramp).all()
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
    assert np.abs(np.asarray(read_photo(tmp_path / "cmyk.jpg")).astype(int) - (255, 0, 0)).max() < 8
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (np.asarray(read_photo(tmp_path / "clear.png")) == 255).all()
    Image.new("P", (8, 8)).save(tmp_path / "palette.gif")
    assert read_photo(tmp_path / "palette.gif").mode == "RGB"
    assert read_photo(Image.new("1", (3, 2))).mode == read_photo(np.zeros((2, 3), np.uint8)).mode == "RGB"


def huge_png(side: int) -> bytes:
    """A header that claims side x side pixels, and hardly anything behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


BAD = {
    "missing.jpg": (None, "there is no image .*missing.jpg"),
    "empty.jpg": (b"", "empty.jpg is no image of BMP"),
    "text.jpg": (b"hello", "text.jpg is no image of BMP"),
    "script.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "script.eps is no image of"),
    "huge.png": (huge_png(30_000), "huge.png has too many pixels: at most 16,384 a side"),
    "large.png": (huge_png(12_000), "large.png has too many pixels"),
    "cut.png": (huge_png(50), "cut.png cannot be decoded"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_photo_ends_in_one_line(name, home, tmp_path, monkeypatch, capsys):
    content, message = BAD[name]
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_photo(name)
    if name != "cut.png":  # only what no header shows needs a model
        monkeypatch.setattr(predict, "load", None)
    assert cli.main(["predict", name, "a cup", "--checkpoint", str(home / "exported")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and re.search(message, err)
    assert {path.name for path in tmp_path.iterdir()} <= {name}


def test_arrays_that_are_no_images():
    for array in (np.zeros((2, 3)), np.zeros((2, 3, 4), np.uint8), np.zeros((0, 3), np.uint8), np.zeros(3, np.uint8)):
        with pytest.raises(UserError, match="an image array is"):
            read_photo(array)
    with pytest.raises(UserError, match="floating-point"):
        read_photo(Image.new("F", (2, 2)))
    with pytest.raises(UserError, match="too many pixels"):
        read_photo(np.broadcast_to(np.uint8(0), (1, 20_000)).copy())


def test_photos_of_extreme_shapes(model):
    for height, width in ((1, 1), (1, 3000), (3000, 2)):
        found = model(np.zeros((height, width, 3), np.uint8), "a cup")
        assert found.mask.shape == (height, width)
        overlay = found.overlay()
        assert 400 <= overlay.width <= 1600 and overlay.height < 1800


@pytest.mark.parametrize(
    "expression", ["😀 the cup", "الرجل على اليسار", "a\x00b\x1b[31m\ncup", "word " * 10_000, "", "\u202ecup"]
)
def test_any_text_is_an_expression(expression, model, photo):
    found = model(photo, expression)
    assert found.mask.shape == (40, 60)
    assert found.overlay().width >= 400


def test_what_is_no_text_is_refused(model, photo):
    for expression in ("\udcff", None, ["a cup"]):
        with pytest.raises(UserError, match="an expression is text"):
            model(photo, expression)


def test_a_model_without_finite_logits_says_so(model, photo, monkeypatch):
    monkeypatch.setattr(predict, "forward", lambda *_: torch.full((1, 8, 8), torch.nan))
    with pytest.raises(UserError, match="not finite for 'a cup'"):
        model(photo, "a cup")


# The command


def test_the_command_writes_pictures_of_the_photos_size(home, photo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    call = ["predict", "photo.png", "the cup", "--checkpoint", "refcoco.tiny", "--results", str(home / "results")]
    assert cli.main([*call, "--threshold", "0.4"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[1:] == ["photo.mask.png", "photo.overlay.png", "photo.probability.png"]
    mask, probability = pixels(Path("photo.mask.png")), pixels(Path("photo.probability.png"))
    assert mask.shape == probability.shape == (40, 60)
    assert (mask.dtype, probability.dtype) == (np.uint8, np.uint16) and set(np.unique(mask)) <= {0, 255}
    assert out[0] == f"{(mask > 0).mean():.1%} of the photo; the highest probability is {probability.max() / 65535:.3f}"
    overlay = Image.open("photo.overlay.png")
    assert overlay.width == 420 and overlay.height > 280  # seven times as large, and the expression

    assert cli.main([*call, "--out", "m.png", "--probability", "p.npy"]) == 0
    assert {path.name for path in tmp_path.iterdir()} >= {"m.png", "p.npy"} and not Path("m.overlay.png").exists()
    np.testing.assert_allclose(np.load("p.npy"), probability / 65535, atol=1e-5)
    assert np.load("p.npy").dtype == np.float32


def test_a_folder_and_a_csv(home, photo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("b.JPG", "a.png", "a.bmp"):
        Image.open(photo).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    call = ["--checkpoint", str(home / "exported"), "--out"]
    assert cli.main(["predict", "photos", "the cup", *call, "one"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"one/{n}.mask.png" for n in ("0001-a", "0002-a", "0003-b")]
    assert len(list(Path("one").iterdir())) == 10

    stem = "ü" * 120
    Image.open(photo).save(folder / f"{stem}.png")
    rows = [("b.JPG", "left, 'cup'"), ("b.JPG", "=1+1"), (f"{stem}.png", "x")]
    with (folder / "pairs.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([("note", "image", "expression"), *(("", *row) for row in rows)])
    assert cli.main(["predict", "photos/pairs.csv", *call, "two"]) == 0
    with Path("two/index.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [(Path(row["image"]).name, row["expression"]) for row in found] == rows
    for row in found:
        assert all(Path("two", row[kind]).is_file() for kind in ("mask", "overlay", "probability"))
    assert (pixels(Path("two/0001-b.mask.png")).shape) == (40, 60)
    assert cli.main(["predict", "photos/pairs.csv", *call, "two"]) == 2
    assert "two exists already: name a new folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "it needs image and expression"),
        (b"image,text\na.png,x\n", "has the columns image, text"),
        (b"image,expression\n", "no row below its header"),
        (b"image,expression\nphoto.png\n", "row 1 of .* lacks"),
        (b"image,expression\nphoto.png,x\nphoto.png,  \n", "row 2 of .* lacks"),
        (b"image,expression\nphoto.png,x\ngone.png,x\n", "there is no image gone.png"),
        (b"image,expression\nphoto.png,x\nbad.png,x\n", "bad.png is no image"),
        (b"image,expression\nphoto.png,\xff\n", "cannot be read as CSV in UTF-8"),
        (b'image,expression\nphoto.png,"' + b"x" * 200_000 + b'"\n', "cannot be read as CSV"),
    ],
)
def test_a_bad_csv_ends_in_one_line_before_anything_is_written(content, message, photo, monkeypatch, capsys):
    monkeypatch.chdir(photo.parent)
    monkeypatch.setattr(predict, "load", None)
    Path("bad.png").touch()
    Path("pairs.csv").write_bytes(content)
    assert cli.main(["predict", "pairs.csv", "--checkpoint", "x", "--out", "out"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and re.search(message, err)
    assert not Path("out").exists()


def test_calls_that_cannot_be_meant(photo, home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(photo.parent)
    (tmp_path / "none").mkdir()
    checkpoint = ["--checkpoint", str(home / "exported")]
    for arguments, message in (
        (["photo.png", "x", "--checkpoint", "nothing"], "0 trials of .* begins with 'nothing'"),
        (["photo.png", "x", "--checkpoint", "/gone"], "0 trials of .* begins with '/gone'"),
        (["photo.png", "x", "--checkpoint", "none"], "none holds neither model.json"),
        (["photo.png", "x", *checkpoint, "--out", "photo.png"], "have one name"),
        (["photo.png", "x", *checkpoint, "--out", "m.jpg"], "m.jpg cannot be written: its name must end in .png"),
        (["photo.png", "x", *checkpoint, "--out", "a.png", "--overlay", "a.png"], "have one name"),
        (["photo.png", "x", *checkpoint, "--out", "gone/m.png"], "cannot write the prediction"),
        (["photo.png", "x", *checkpoint, "--threshold", "1"], "between 0 and 1"),
        (["none", "x", *checkpoint, "--out", "out"], "none has no image"),
        (["gone.csv", *checkpoint, "--out", "out"], "gone.csv cannot be read"),
    ):
        assert cli.main(["predict", *arguments]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and re.search(message, err), err
    for arguments in (["photo.png"], ["photo.png", "  "], ["x.csv", "x"], ["none", "x"]):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["predict", *arguments, *checkpoint])


# A split


@pytest.fixture
def data(tmp_path) -> Path:
    """RefCOCO with one photo and three expressions."""
    folder = tmp_path / "data" / "refcoco"
    images = tmp_path / "data" / "images" / "train2014"
    folder.mkdir(parents=True)
    images.mkdir(parents=True)
    Image.effect_noise((60, 40), 80).convert("RGB").save(images / "a.jpg")
    box = [[0, 0, 30, 0, 30, 40, 0, 40]]
    instances = {
        "images": [{"id": 1, "file_name": "a.jpg", "height": 40, "width": 60}],
        "annotations": [{"id": 10, "image_id": 1, "category_id": 1, "segmentation": box, "iscrowd": 0}],
        "categories": [{"id": 1, "name": "cup"}],
    }
    sentences = [{"sent": text, "raw": text, "sent_id": i} for i, text in enumerate(("a cup", "cup on the left", ""))]
    refs = [{"ref_id": 5, "ann_id": 10, "image_id": 1, "split": "testA", "sentences": sentences}]
    (folder / "instances.json").write_text(json.dumps(instances))
    (folder / "refs(unc).json").write_text(json.dumps(refs))
    return tmp_path / "data"


@pytest.mark.parametrize("maps", [False, True])
def test_a_split_is_predicted_into_a_file(maps, home, data, tmp_path, capsys):
    out = tmp_path / "p.parquet"
    call = ["evaluate", "refcoco.tiny", "--results", str(home / "results"), "--data", str(data), "--split", "testA"]
    assert cli.main([*call, "--out", str(out), *(["--maps"] if maps else [])]) == 0
    assert f"{out}: 3 predictions; ris-bench score" in capsys.readouterr().out
    found = predictions.read(out)
    assert [(row.ref_id, row.sentence_index, row.expression) for row in found.rows] == [
        *((5, 0, "a cup"), (5, 1, "cup on the left"), (5, 2, ""))
    ]
    model = load(home / "exported")
    if maps:
        assert found.maps == predictions.Maps(values="logit", geometry="letterbox", size=64)
        assert all(row.map.dtype == np.float16 and np.ptp(row.map) > 0 for row in found.rows)
    for row in found.rows:
        expected = model(data / "images" / "train2014" / "a.jpg", row.expression).mask
        if maps:
            frame = predict.Letterbox(64).frame(40, 60)
            logits_HW = predict.restore(torch.from_numpy(row.map.astype(np.float32))[None], frame)[0].numpy()
            assert (np.mean((logits_HW > evaluation.log_odds(0.35)) != expected)) < 0.01
        else:
            assert (expected == predictions.decode(row.counts, 40, 60).T).mean() > 0.999


def test_a_split_that_cannot_be_predicted_ends_in_one_line(home, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exported = str(home / "exported")
    for arguments, message in (
        ([exported, "--split", "testA"], "does not say what it was trained on: name a data set"),
        ([exported, "--dataset", "cups", "--split", "testA"], "cups"),
        ([exported, "--dataset", "refcoco", "--split", "testC"], "has no split 'testC'"),
        ([exported, "--dataset", "refcoco+", "--split", "testA"], "refcoco\\+ needs"),
        ([exported, "--dataset", "refcoco", "--split", "testA", "--out", "p.txt"], "must end in"),
        ([exported, "--dataset", "refcoco", "--split", "testA", "--out", "gone/p.json"], "gone is not a folder"),
    ):
        assert cli.main(["evaluate", "--data", "data", "--out", "p.parquet", *arguments]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and re.search(message, err), err
    monkeypatch.setattr(evaluation, "forward", lambda *_: torch.full((3, 8, 8), torch.nan))
    assert (
        cli.main(
            ["evaluate", exported, "--dataset", "refcoco", "--split", "testA", "--data", "data", "--out", "p.json"]
        )
        == 2
    )
    assert "logits are not finite for 'a cup'" in capsys.readouterr().err
    assert not list(tmp_path.glob("*p.*"))


@pytest.mark.skipif(not SLICE.is_dir(), reason="the slice of real RefCOCOg is not there")
def test_a_real_photo(model, tmp_path):
    path = next((SLICE / "images" / "train2014").glob("*.jpg"))
    model(path, "the person on the left").save(tmp_path / "m.png", tmp_path / "o.jpg", tmp_path / "p.png")
    with Image.open(path) as photo:
        assert Image.open(tmp_path / "m.png").size == Image.open(tmp_path / "p.png").size == photo.size
        assert Image.open(tmp_path / "o.jpg").width == photo.width
