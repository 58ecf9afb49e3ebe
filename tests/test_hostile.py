"""Files that mean harm or are merely odd: each ends as documented, and none takes memory without bound."""

import json
import os
import pickle
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import replica
from PIL import Image
from test_evaluation import SETTINGS, Bright

from ris_bench import evaluation
from ris_bench.data.check import check
from ris_bench.data.dataset import named
from ris_bench.data.samples import MOST_PIXELS, Sample
from ris_bench.errors import UserError
from ris_bench.loading import Tokenizer

PRELUDE = """
import resource, sys
from pathlib import Path
import numpy
from ris_bench.data.refer import ReferDataset
from ris_bench.data.samples import Sample
from ris_bench.data.untrusted import read_json, read_pickle
from ris_bench.errors import UserError

def sample(segmentation=(), height=480, width=640, path=Path("x")):
    return Sample("d", "val", 1, 1, 0, 1, 7, "cup", "cup", "cup", path, height, width, segmentation)

taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + 512 * 2**20,) * 2)
folder = Path(sys.argv[1])
"""


def bounded(code: str, folder: Path) -> str:
    """What the code prints, or its UserError's message, in a process that may take 512 MB more than its packages do."""
    body = "".join(f"\n    {line}" for line in code.strip().splitlines())
    code = f"{PRELUDE}\ntry:{body}\nexcept UserError as error:\n    print('UserError', error)\n"
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


MEMORY = {
    "a million points of an outline": (
        "angle = numpy.linspace(0, 2 * numpy.pi, 10**6, endpoint=False)\n"
        "points = numpy.stack([320 + 100 * numpy.cos(angle), 240 + 100 * numpy.sin(angle)], axis=1)\n"
        "print(abs(sample([points.ravel().tolist()]).mask().sum() / (numpy.pi * 100**2) - 1) < 0.01)",
        "True",
    ),
    "a million points far apart": (
        "print(sample([[0, 0, 90000, 90000] * 500000]).mask())",
        "UserError the segmentation of annotation 7 of d (image 1) is malformed (a coordinate is not a number or far",
    ),
    "a run length of a million digits": (
        "sample({'size': [480, 640], 'counts': 'o' * 10**6}).mask()",
        "too many digits",
    ),
    "an annotation of 30,000 x 30,000": (
        "sample(height=30000, width=30000).mask()",
        "30000 x 30000 pixels is too large",
    ),
    "a million nested lists in JSON": (
        "(folder / 'a.json').write_text('[' * 10**6 + ']' * 10**6)\nread_json(folder / 'a.json')",
        "a.json is damaged (maximum recursion depth",
    ),
    "a million nested lists in a pickle": (
        "(folder / 'd').mkdir()\n(folder / 'images/train2014').mkdir(parents=True)\n"
        "(folder / 'd/instances.json').write_text('{}')\n"
        "(folder / 'd/refs(unc).p').write_bytes(b'\\x80\\x02' + b']' * 10**6 + b'a' * (10**6 - 1) + b'.')\n"
        "ReferDataset('d', 'd', 'unc', 17, ('val',)).read(folder, 'val')",
        "is not in the REFER layout",
    ),
    "a pickle that says it is long": (
        "(folder / 'a.p').write_bytes(b'\\x80\\x04\\x8e' + (1 << 40).to_bytes(8, 'little') + b'abc.')\n"
        "read_pickle(folder / 'a.p')",
        "a.p is damaged",
    ),
    **{
        f"a pickle that {what}": (
            f"(folder / 'a.p').write_bytes({content!r})\nprint(read_pickle(folder / 'a.p'))",
            answer,
        )
        for what, content, answer in (
            ("remembers under a large number", b"\x80\x02]r\xff\xff\xff\x7f.", "[]"),
            ("remembers under a large number in letters", b"\x80\x02]p2147483647\n.", "[]"),
            ("says it has many bytes", b"\x80\x05\x96\x00\x00\x00\x80\x00\x00\x00\x00abc.", "a.p is damaged"),
            ("has an integer of 2 GB", b"\x80\x02\x8b\xff\xff\xff\x7fabc.", "a.p is damaged"),
            ("says it has a long frame", b"\x80\x04\x95" + bytes(4) + b"\x00\x01\x00\x00].", "[]"),
        )
    },
    "a pickle of a gigabyte": (
        "with (folder / 'a.p').open('wb') as file:\n    file.truncate(1 << 30)\nread_pickle(folder / 'a.p')",
        "a.p is refused: it has more than 268,435,456 bytes",
    ),
    "ids that hold each other many times over": (
        "(folder / 'd').mkdir()\n(folder / 'images/train2014').mkdir(parents=True)\n"
        "(folder / 'd/instances.json').write_text('{}')\n"
        "import pickle\na, b = [], []\nfor _ in range(60):\n    a, b = [a, a], [b, b]\n"
        "refs = [{'ref_id': a}, {'ref_id': b}]\n"
        "(folder / 'd/refs(unc).p').write_bytes(pickle.dumps(refs))\n"
        "ReferDataset('d', 'd', 'unc', 17, ('val',)).read(folder, 'val')",
        "is not in the REFER layout (TypeError: 'list' object cannot be interpreted as an integer)",
    ),
}


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is limited as Linux does it")
@pytest.mark.parametrize("name", MEMORY)
def test_memory_is_bounded(name: str, tmp_path: Path) -> None:
    code, message = MEMORY[name]
    assert message in bounded(code, tmp_path)


def png(path: Path, width: int, height: int) -> None:
    """A header that claims a size, and hardly any pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is limited as Linux does it")
@pytest.mark.parametrize(
    "size, says, message",
    [
        (30_000, 30_000, "cannot be decoded (Image size (900000000 pixels) exceeds limit"),
        (30_000, 640, "cannot be decoded (Image size (900000000 pixels) exceeds limit"),
        (9_000, 9_000, "has 9000 x 9000 pixels, and at most 67,108,864 are read"),
        (9_000, 640, "has 9000 x 9000 pixels where its annotation says 640 x 640"),
    ],
)
def test_a_header_that_claims_many_pixels(size: int, says: int, message: str, tmp_path: Path) -> None:
    png(tmp_path / "a.png", size, size)
    for method in ("image", "check_image"):
        code = f"sample(height={says}, width={says}, path=folder / 'a.png').{method}()"
        assert message in bounded(code, tmp_path)
    assert MOST_PIXELS == 67_108_864


def photo(path: Path, width: int = 40, height: int = 30) -> Sample:
    return Sample("d", "val", 1, 1, 0, 1, 7, "cup", "cup", "cup", path, height, width, replica.SQUARE)


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (40, 30), (0, 255, 255, 0)).save(path := tmp_path / "a.jpg")
    red, green, blue = photo(path).image().getpixel((5, 5))
    assert red > 250 and green < 5 and blue < 5


def test_palettes_and_transparency_become_rgb(tmp_path: Path) -> None:
    Image.new("P", (40, 30)).save(tmp_path / "p.png")
    Image.new("RGBA", (40, 30), (9, 8, 7, 0)).save(tmp_path / "a.png")
    assert photo(tmp_path / "p.png").image().mode == "RGB"
    assert photo(tmp_path / "a.png").image().getpixel((0, 0)) == (9, 8, 7)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_grey_values_of_more_than_8_bits_are_refused(dtype: type, tmp_path: Path) -> None:
    Image.fromarray(np.full((30, 40), 1000, dtype)).save(path := tmp_path / "a.tif")
    for act in (photo(path).image, photo(path).check_image):
        with pytest.raises(UserError, match=r"a\.tif has grey values of more than 8 bits; save it with 8 bits"):
            act()


def test_an_exif_orientation_is_not_applied(tmp_path: Path) -> None:
    pixels = np.zeros((30, 40, 3), np.uint8)
    pixels[:15] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(path := tmp_path / "a.jpg", exif=exif)
    stored = np.asarray(photo(path).image())
    assert stored.shape == (30, 40, 3) and stored[2].min() > 200 and stored[-2].max() < 50
    message = "has 40 x 30 pixels, before its EXIF orientation turns them, where its annotation says 30 x 40; turn its"
    with pytest.raises(UserError, match=message):
        photo(path, width=30, height=40).image()


def test_an_image_of_no_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    with pytest.raises(UserError, match=r"a\.jpg cannot be decoded"):
        photo(tmp_path / "a.jpg").check_image()


class Harm:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


def test_a_check_runs_nothing_of_a_pickle(tmp_path: Path) -> None:
    dataset, marker = replica.write(named("refcoco"), tmp_path), tmp_path / "marker"
    (tmp_path / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps([Harm(marker)]))
    (row,) = check(dataset, tmp_path)
    assert row.verdict == "bad files: 1" and "is refused: it would load" in row.faults.bad_files[0]
    assert not marker.exists()


ODD = {
    "emoji": "the 👨‍👩‍👧 left of the 🐕‍🦺",
    "right to left": "הכלב משמאל‏ الكلب على اليسار",
    "control characters": "a\x00 dog\x1b[31m\x07 \u202e on\r\nthe\u2028left\x7f",
    "ten thousand words": "dog " * 9_999 + "dog",
    "one long word": "d" * 10_000,
    "combined": "z" + "\u0301" * 500,
    "beyond the first plane": "𝔞 𝔡𝔬𝔤 \U0010fffd",
}


@pytest.mark.parametrize("name", ODD)
def test_odd_expressions_are_kept_cut_scored_and_shown(name: str, tmp_path: Path) -> None:
    text = ODD[name]
    Image.new("RGB", (64, 48)).save(tmp_path / "a.jpg")
    record = {
        "images": [{"id": 1, "file_name": "a.jpg", "height": 48, "width": 64}],
        "annotations": [{"id": 7, "image_id": 1, "segmentation": replica.SQUARE}],
        "expressions": [{"id": 5, "image_id": 1, "annotation_ids": [7], "split": "val", "sentences": [text]}],
    }
    (tmp_path / "a.json").write_text(json.dumps(record))
    samples = named({"own": {"file": "a.json"}}).read(tmp_path, "val")
    assert (samples[0].expression, samples[0].raw) == (text, text)
    (tokens,) = Tokenizer(22)([text])
    assert tokens.shape == (22,) and tokens[0] == 49406 and tokens.max() == 49407
    frame = evaluation.evaluate(Bright(), samples, **SETTINGS)
    evaluation.write({"val": frame}, tmp_path / "expressions.parquet")
    assert pd.read_parquet(tmp_path / "expressions.parquet")["expression"].tolist() == [text]
    evaluation.overlays(Bright(), samples, tmp_path / "overlays", **SETTINGS)
    (picture,) = (tmp_path / "overlays").iterdir()
    assert max(Image.open(picture).size) < 1000
