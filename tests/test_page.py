"""The page of an experiment: what stands in it, that nothing foreign in it runs, and what a browser does with it."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import warnings
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from chromium import BINARY, Chromium
from conftest import STAND_IN
from PIL import Image

from ris_bench import evaluation, sweep
from ris_bench.experiment import Experiment, load
from ris_bench.records import Cost, Epoch, Params, Result
from ris_bench.report import gallery, page
from ris_bench.report.comparison import compare
from ris_bench.results import Store

HOSTILE = "</script><script>window.hacked = 1</script>"
ERROR = 'ValueError: <img src=x onerror="window.hacked = 1">'
EXPRESSIONS = (
    HOSTILE,
    "\" onload='window.hacked = 1' x=\"",
    "\u202eהאיש משמאל",
    "👩‍🚀 & {{ friends }}",
    "plain star",
    "a <b>man</b>",
)
GRID = """\
grid:
  method: [full, frozen, lora, coop]
  seed: [0, 1]
table:
  rows: method
  labels: {frozen: "Fix <i>Backbone</i>", lora: 'LoRA "8" {{ 7 * 7 }}'}
  columns:
    - {header: Params (K), value: params.tunable_backbone, scale: 1.0e-3, best: min}
    - {header: RefCOCO, value: miou, splits: [val], best: max}
    - {header: RefCOCO, value: oiou, splits: [val]}
"""
FIXED, LORA = "Fix <i>Backbone</i>", 'LoRA "8" {{ 7 * 7 }}'
IOUS = {"full": (60, 0), "frozen": (90, 80, 70, 60, 55, 51), "lora": (100, 10, 0, 100, 40, 20)}
"""In percent, image by image and again from the first."""


def frame_of(method: str, seed: int) -> pd.DataFrame:
    """36 expressions of 12 images: each target has 100 pixels, of which so many are found and nothing else."""
    places = np.arange(36)
    found = np.resize(IOUS[method], 12).repeat(3)
    found = found - seed * (found > 50)
    other = np.where(found == 10, 50, 0)
    return pd.DataFrame(
        {
            **{"dataset": "refcoco", "split": "val", "category": "person"},
            **{"ref_id": places // 3, "sent_id": places, "sentence_index": places % 3},
            **{"image_id": places // 3, "ann_id": places // 3},
            "expression": [EXPRESSIONS[place // 3 % 6] for place in places],
            **{"intersection": found, "union": 100, "predicted": found, "target": 100},
            **{"distractors": 1, "other_intersection": other, "other_union": 100},
        }
    )


def finish(store: Store, experiment: Experiment, method: str, seed: int) -> Result:
    [trial] = (run.trial for run in experiment.runs if run.axes["method"] == method and run.trial.seed == seed)
    failed = sweep.failure(trial, ERROR)
    if method == "coop":
        return store.finish(store.begin(trial), failed)
    frame, folder = frame_of(method, seed), store.begin(trial)
    evaluation.write({"val": frame}, folder / "expressions.parquet")
    (folder / "overlays").mkdir()
    generator = np.random.default_rng(0)
    for row in frame.iloc[::3].itertuples():
        photo = Image.fromarray(generator.integers(0, 200, (60, 100, 3), dtype=np.uint8))
        mask_HW = np.arange(6000).reshape(60, 100) < row.predicted
        drawn = evaluation.picture(photo, mask_HW, row.expression, mask_HW, row.intersection / row.union)
        drawn.save(folder / "overlays" / f"{row.ref_id}-{row.sentence_index}.png")
    cost = Cost(
        **{"train_seconds": 60.0, "eval_seconds": 1.0, "train_images_per_second": 9.0, "peak_memory_bytes": 2**30},
        **{"tuned_bytes": 8, "device": "a <GPU>"},
    )
    tuned = {"full": 99_000, "frozen": 0, "lora": 3_000}[method]
    result = replace(
        failed,
        status="done",
        error=None,
        scores={"val": evaluation.scores(frame)},
        history=(Epoch(epoch=1, loss=0.5, lr=1e-3),),
        params=Params(tunable_backbone=tuned, tunable_head=7, moving_statistics=0, total=99),
        cost=cost,
    )
    return store.finish(folder, result)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with experiment.yaml, results/ and the page of them; one trial of `full` has not been run."""
    home = tmp_path_factory.mktemp("page")
    (home / "experiment.yaml").write_text(STAND_IN + GRID, encoding="utf-8")
    experiment, store = load(home / "experiment.yaml"), Store(home / "results")
    for method, seed in [("full", 0), *((method, seed) for method in ("frozen", "lora", "coop") for seed in (0, 1))]:
        finish(store, experiment, method, seed)
    write(home, compared=compare(experiment, store, "frozen", resamples=200), skipped=["a/result.json is cut off"])
    return home


def write(home: Path, **options) -> str:
    experiment, store = load(home / "experiment.yaml"), Store(home / "results")
    found = {run.trial.id: result for run in experiment.runs if (result := store.read(run.trial))}
    page.write(home / "report.html", experiment, store, found, **options)
    return (home / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def text(home) -> str:
    return (home / "report.html").read_text(encoding="utf-8")


class Parsed(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.texts = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes) -> None:
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data) -> None:
        self.texts.append(data)


def test_what_comes_from_results_is_text(text):
    parsed = Parsed(text)
    assert parsed.tags.count("script") == parsed.tags.count("style") == 1
    assert not {"i", "iframe", "object", "form action"} & set(parsed.tags)
    assert not [name for name, _ in parsed.attributes if name.startswith("on") or name in ("style", "srcdoc")]
    assert not [value for name, value in parsed.attributes if name == "src" and not value.startswith("data:")]
    for shown in (*EXPRESSIONS, FIXED, LORA, ERROR, "a <GPU>, unknown"):
        assert any(shown in each for each in parsed.texts), shown


def test_only_the_page_s_own_style_and_script_may_run(text):
    [policy] = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy.startswith("default-src &#39;none&#39;; img-src data:; ")
    for tag in ("style", "script"):
        [content] = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src &#39;sha256-{digest.replace('+', '&#43;')}&#39;".replace("&#43;", "+") in policy
    assert text.index("Content-Security-Policy") < text.index("<style>")
    assert not re.findall(r"(?:src|href)=\"(?:https?:)?//", text)


def test_what_is_there_and_what_is_not(text):
    said = " ".join(" ".join(Parsed(text).texts).split())
    assert "5 of 8 trials done" in said and "2 failed" in said
    assert "a/result.json is cut off" in said
    assert "There are none: they are drawn" in said
    assert "Selected on val by mIoU: checkpoints." in said
    assert "refcoco: no image that is trained on is evaluated" in said
    assert "method: [full, frozen, lora, coop]" in said and "name: tiny-clip-vit" in said
    assert "67.17" in said and "Against Fix <i>Backbone</i>" in said and "95% interval" in said


def test_every_row_has_the_same_expressions(home):
    experiment, store = load(home / "experiment.yaml"), Store(home / "results")
    found = {run.trial.id: result for run in experiment.runs if (result := store.read(run.trial))}
    pictures, notes = gallery.gallery(experiment, store, found, limit=10)
    rows = ["full", FIXED, LORA]
    assert [picture.row for picture in pictures] == 3 * rows  # 12 are drawn, and there is room for 10 // 3 of each
    assert [picture.key.ref_id for picture in pictures[::3]] == [0, 6, 11]
    assert notes[0].startswith("3 of the 12 expressions of refcoco val that trials drew")
    picture = pictures[0]
    assert (picture.width, picture.height) == (400, 240)  # the photo, enlarged, without the caption
    every, _ = gallery.gallery(experiment, store, found)
    assert len(every) == 36
    outcomes = {(picture.row, round(100 * picture.iou)): picture.kinds for picture in every}
    assert outcomes[LORA, 100] == ("right",)
    assert outcomes[LORA, 10] == ("wrong instance",) and outcomes[LORA, 40] == ("imprecise",)
    assert {kinds for (row, _), kinds in outcomes.items() if row == FIXED} == {("right",)}


def test_outcomes(tmp_path, home):
    frame = (
        frame_of("lora", 0)
        .iloc[:4]
        .assign(
            intersection=[10, 0, 0, 0], predicted=[10, 0, 7, 9], union=[100, 100, 107, 9], target=[100, 100, 100, 0]
        )
    )
    frame["other_intersection"] = [50, 0, 0, 0]
    run = load(home / "experiment.yaml").runs[0]
    store = Store(tmp_path)
    folder = store.folder(run.trial)
    (folder / "overlays").mkdir(parents=True)
    evaluation.write({"val": frame}, folder / "expressions.parquet")
    for row in frame.itertuples():
        (folder / "overlays" / f"{row.ref_id}-{row.sentence_index}.png").touch()
    kinds = [outcome.kinds for outcome in gallery._outcomes(run, store).values()]
    assert kinds == [("wrong instance",), ("empty", "zero IoU"), ("zero IoU",), ("no target",)]


def test_results_without_pictures_get_a_page_that_says_why(home, tmp_path):
    shutil.copytree(home, tmp_path / "bare")
    for folder in (tmp_path / "bare" / "results").rglob("overlays"):
        shutil.rmtree(folder)
    text = write(tmp_path / "bare")
    assert "There are no pictures: a trial draws some into its folder overlays/" in text
    assert "<figure" not in text and "ris-bench report --against METHOD" in text


def test_a_picture_that_is_none_is_named(home, tmp_path):
    shutil.copytree(home, tmp_path / "broken")
    for place, path in enumerate(sorted((tmp_path / "broken" / "results" / "trials").glob("*.s0.*/overlays/0-0.png"))):
        path.write_bytes([b"GIF89a", path.read_bytes()[:900], b""][place])
    Image.new("L", (5000, 2)).save(path.with_name("1-0.png"))
    text = write(tmp_path / "broken")
    assert "0-0.png is no picture that can be read" in text and "1-0.png is no picture" in text
    assert text.count("<figure") == 36 - 4


def test_the_page_appears_whole_or_not_at_all(home, tmp_path, monkeypatch):
    shutil.copytree(home, tmp_path / "kept")
    before = (tmp_path / "kept" / "report.html").read_bytes()
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write(tmp_path / "kept")
    assert (tmp_path / "kept" / "report.html").read_bytes() == before
    assert not list((tmp_path / "kept").glob(".report*"))


def test_a_page_of_no_results(home, tmp_path):
    shutil.copy(home / "experiment.yaml", tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = write(tmp_path)
    assert "0 of 8 trials done" in text and "No trial failed." in text


def test_the_caption_is_cut_off_where_it_is_found():
    mask_HW = np.ones((50, 500), dtype=bool)
    for letters in (5, 60, 500):
        drawn = evaluation.picture(Image.new("RGB", (500, 50)), mask_HW, "word " * (letters // 5), mask_HW, 0.5)
        assert gallery._photo(drawn).size == (500, 50)
    white = Image.new("RGB", (500, 50), "white")
    drawn = evaluation.picture(white, np.zeros((50, 500), dtype=bool), "word")
    assert gallery._photo(drawn).size == drawn.size


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if BINARY is None:
        pytest.skip("no Chromium is installed")
    browser = Chromium(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def opened(browser, home):
    """The page, freshly opened; afterwards nothing must have gone wrong, or left the page."""
    browser.problems.clear()
    browser.requests.clear()
    browser.resize(1280, 800)
    browser.media(prefers_color_scheme="light", prefers_reduced_motion="reduce")
    browser.open(home / "report.html")
    yield browser
    assert browser.do("window.hacked") is None
    assert browser.problems == []
    assert browser.requests[0] == (home / "report.html").as_uri()
    assert not [address for address in browser.requests[1:] if not address.startswith("data:")]


def change(browser: Chromium, **values: str) -> str:
    """Set fields by id, as a reader does; returns what is told of the gallery."""
    for name, value in values.items():
        field = f"document.getElementById('{name}')"
        browser.do(f"{field}.value = {value!r}; {field}.dispatchEvent(new Event('input', {{bubbles: true}}))")
    return browser.do("document.getElementById('shown').textContent")


FIRST_COLUMN = "[...document.querySelectorAll('#table tbody tr:not([hidden])')].map(row => row.cells[0].textContent)"


def test_a_table_is_sorted_by_the_keyboard_and_filtered(opened):
    original = opened.do(FIRST_COLUMN)
    assert original == ["full", FIXED, LORA, "coop"]
    opened.do("document.querySelectorAll('#table thead button')[2].focus()")
    told = "document.querySelectorAll('#table thead button')[2].parentElement.getAttribute('aria-sort')"
    opened.press("Enter", 13)
    assert (opened.do(told), opened.do(FIRST_COLUMN)) == ("descending", [FIXED, LORA, "full", "coop"])
    opened.press("Enter", 13)
    assert (opened.do(told), opened.do(FIRST_COLUMN)) == ("ascending", ["full", LORA, FIXED, "coop"])
    opened.press("Enter", 13)
    assert (opened.do(told), opened.do(FIRST_COLUMN)) == (None, original)
    field = "document.querySelector('[data-filters=table]')"
    opened.do(f"{field}.value = 'lora 8'; {field}.dispatchEvent(new Event('input'))")
    assert opened.do(FIRST_COLUMN) == [LORA]
    assert opened.do("document.querySelector('[data-counts=table]').textContent") == "1 of 4 rows"


def test_the_gallery_is_filtered(opened):
    assert change(opened) == "36 pictures"
    assert change(opened, first=FIXED) == "12 of 36 pictures"
    assert change(opened, first="", kind="right") == "22 of 36 pictures"
    assert change(opened, kind="", least="95") == "4 of 36 pictures"
    assert change(opened, least="0", most="0") == "8 of 36 pictures"
    assert change(opened, most="", words="</SCRIPT>") == "6 of 36 pictures"
    opened.do("document.querySelector('#choose [type=reset]').click()")
    opened.do("new Promise(done => setTimeout(done, 50))")
    assert change(opened) == "36 pictures"
    change(opened, order="low")
    ious = opened.do("[...document.querySelectorAll('#pictures figure')].map(figure => Number(figure.dataset.iou))")
    assert ious == sorted(ious) and len(ious) == 36


def test_two_rows_are_compared_on_the_same_expressions(opened):
    assert change(opened, first=FIXED, second=LORA) == "12 expressions"
    pairs = opened.do(
        "[...document.querySelectorAll('#pictures li')].map(item => [...item.querySelectorAll('figure')]"
        ".map(figure => [figure.dataset.row, figure.dataset.key]))"
    )
    assert all([a, b] == [[FIXED, a[1]], [LORA, a[1]]] for a, b in pairs)
    change(opened, order="difference")
    changes = opened.do("[...document.querySelectorAll('.pair > p .quiet')].map(change => change.textContent.trim())")
    assert len(changes) == 12 and changes[0].startswith(("+", "−"))
    sizes = [abs(float(change[1:])) for change in changes]
    assert sizes == sorted(sizes, reverse=True)
    opened.do("document.querySelector('#pictures .open').focus()")
    opened.press("Enter", 13)
    assert opened.do("document.getElementById('large').open")
    shown = "document.querySelectorAll('#enlarged figure')"
    assert opened.do(f"{shown}.length") == 2
    first = opened.do(f"{shown}[0].dataset.key")
    opened.press("ArrowRight", 39)
    assert opened.do(f"{shown}[0].dataset.key") != first
    opened.press("Escape", 27)
    assert not opened.do("document.getElementById('large').open")


def test_hostile_text_reads_as_it_is(opened):
    shown = opened.do("[...new Set([...document.querySelectorAll('.expression')].map(each => each.textContent))]")
    assert set(shown) == set(EXPRESSIONS)
    assert opened.do("[...document.querySelectorAll('#first option')].map(each => each.value)") == [
        "",
        "full",
        FIXED,
        LORA,
    ]
    assert opened.do("getComputedStyle(document.querySelector('bdi')).unicodeBidi") == "isolate"


def test_light_and_dark(opened):
    paper = "getComputedStyle(document.body).backgroundColor"
    light = opened.do(paper)
    opened.media(prefers_color_scheme="dark", prefers_reduced_motion="reduce")
    dark = opened.do(paper)
    assert dark != light
    opened.do("document.getElementById('theme').click()")
    assert opened.do(paper) == light
    assert opened.do("document.getElementById('theme').getAttribute('aria-pressed')") == "false"


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_screen(opened, width):
    opened.resize(width, 740, mobile=width < 600)
    assert opened.do("document.documentElement.scrollWidth") <= width
    change(opened, first=FIXED, second=LORA)
    assert opened.do("document.documentElement.scrollWidth") <= width


def test_everything_that_acts_has_a_name(opened):
    unnamed = opened.do(
        "[...document.querySelectorAll('button, input, select')].filter(each => !(each.labels?.length || "
        "each.textContent.trim() || each.getAttribute('aria-label') || each.querySelector('img[alt]'))).length"
    )
    assert unnamed == 0
    opened.do("document.activeElement.blur()")
    opened.press("Tab", 9)
    assert opened.do("document.activeElement.className") == "skip"
    assert opened.do("getComputedStyle(document.activeElement).outlineStyle") == "solid"
