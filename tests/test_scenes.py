"""Generated scenes: every expression means one object, whoever reads it; the same options give the same files."""

import hashlib
import json
import pickle
import re
import threading
import time

import numpy as np
import pytest

from ris_bench.data import scenes as module
from ris_bench.data.dataset import DATASETS
from ris_bench.data.scenes import COLOURS, KINDS, PRETRAINING_SEED, ROUND, SHAPES, draw_scene, expressions
from ris_bench.errors import UserError
from ris_bench.loading import Tokenizer

NUM_TRAIN, NUM_EVAL = 60, 40
SPLITS = {"train": NUM_TRAIN, "val": NUM_EVAL, "testA": NUM_EVAL, "testB": NUM_EVAL}


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """A small data set, and where it lies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RIS_BENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        dataset = DATASETS["scenes"](num_train=NUM_TRAIN, num_eval=NUM_EVAL)
        dataset.locate(None)
        yield dataset


@pytest.fixture(scope="module")
def drawn():
    return [draw_scene(np.random.default_rng([7, i]), 3 + i % 4) for i in range(200)]


def refs(dataset):
    return pickle.loads((dataset.home / "scenes" / "refs(generated).p").read_bytes())


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# A second reading of the language, from the words alone and without any margin.

ADJECTIVES = {
    **{colour: ("colour", colour) for colour in COLOURS},
    **dict.fromkeys(("small", "little"), ("size", "small")),
    **dict.fromkeys(("large", "big"), ("size", "large")),
    **dict.fromkeys(("plain", "solid"), ("texture", "plain")),
    "striped": ("texture", "striped"),
}
SIDE = "(left|right|top|bottom)"
SIDES_OF_WORDS = {
    "upper": "top",
    "lower": "bottom",
    "above": "top",
    "over": "top",
    "below": "bottom",
    "under": "bottom",
}


def along(side, thing, origin=(0.0, 0.0)):
    """How far towards a side the middle of the visible box lies."""
    left, top, width, height = thing.box
    rows, columns = thing.mask.shape
    right, down = (left + width / 2) / columns - origin[0], (top + height / 2) / rows - origin[1]
    return {"left": -right, "right": right, "top": -down, "bottom": down}[side]


def middle(thing):
    return along("right", thing), along("bottom", thing)


def noun_phrase(text, things):
    """Those of the things that "small red circle with stripes" describes."""
    wanted = {}
    text = re.sub("^(the )?(only )?", "", text)
    if match := re.fullmatch(r"(.*) (with|without) stripes", text):
        text, wanted["texture"] = match[1], "striped" if match[2] == "with" else "plain"
    if match := re.fullmatch(r"(.*) that is (\w+)", text):
        text = f"{match[2]} {match[1]}"
    *adjectives, noun = text.split()
    wanted.update(ADJECTIVES[word] for word in adjectives)
    if noun not in ("object", "thing", "one"):
        assert noun in SHAPES, text
        wanted["shape"] = noun
    return [thing for thing in things if all(getattr(thing, name) == value for name, value in wanted.items())]


def meant(text, things):
    """Every thing that the expression could mean."""
    if match := re.fullmatch(rf"(.*?) (?:(?:to |on )?the )?{SIDE} of (.*)|(.*?) (above|over|below|under) (.*)", text):
        subject, side, anchor = match[1] or match[4], match[2] or SIDES_OF_WORDS[match[5]], match[3] or match[6]
        subject = subject.removesuffix(" to").removesuffix(" on")
        (anchor,) = noun_phrase(anchor, things)
        candidates = [thing for thing in noun_phrase(subject, things) if thing is not anchor]
        return [thing for thing in candidates if along(side, thing, middle(anchor)) > 0]
    if match := re.fullmatch(rf"(?:the )?(first|second|third) (.*) from (?:the )?{SIDE}", text):
        order = sorted(noun_phrase(match[2], things), key=lambda thing: -along(match[3], thing))
        return order[("first", "second", "third").index(match[1]) :][:1]
    if match := re.fullmatch(r"(?:the )?far (left|right) (.*)|(.*) on the far (left|right)", text):
        side, subject = match[1] or match[4], match[2] or match[3]
        return [max(noun_phrase(subject, things), key=lambda thing: along(side, thing))]
    if match := re.fullmatch(r"(?:the )?center (.*)|(.*) in the (?:middle|center)", text):
        things = noun_phrase(match[1] or match[2], things)
        return [thing for thing in things if all(0.3 < position < 0.7 for position in middle(thing))]
    words = [SIDES_OF_WORDS.get(word, word) for word in text.removeprefix("the ").split()]
    place = "((?:top |bottom )?(?:left|right)|top|bottom)"
    match = re.fullmatch(
        rf"{place} (?P<a>.*)|(?P<b>.*?) (?:on|at|in) (?:the )?{place}(?: side| corner)?", " ".join(words)
    )
    if match:
        things = noun_phrase(match["a"] or match["b"], things)
        sides = (match[1] or match[4]).split()
        return [thing for thing in things if all(along(side, thing, (0.5, 0.5)) > 0 for side in sides)]
    return noun_phrase(text, things)


def test_every_expression_means_its_referent_and_nothing_else(drawn):
    rng = np.random.default_rng(0)
    checked = 0
    for scene in drawn:
        for thing, statements in zip(scene.objects, scene.statements, strict=True):
            for text in (statement.draw(rng) for statement in statements):
                assert meant(text, scene.objects) == [thing], text
                checked += 1
    assert checked > 5000


def test_the_second_reading_can_object(drawn):
    """The parser above finds expressions ambiguous where margins are ignored: it is not true of everything."""
    texts = ["circle", "left object", "red object above the object"]
    assert any(len(meant(text, scene.objects)) != 1 for scene in drawn for text in texts[:2])


def test_the_kind_names_the_words_that_single_out(drawn):
    """Without what makes its kind, an expression would fit another object too."""
    rng = np.random.default_rng(0)
    for scene in drawn:
        for statement in (statement for statements in scene.statements for statement in statements):
            if statement.kind in ("place", "relation", "ordinal"):
                assert len(noun_phrase(statement.phrases[0][0], scene.objects)) > 1, statement
            elif statement.kind != "category":
                words = [w for w in statement.draw(rng).split() if ADJECTIVES.get(w, ("",))[0] != statement.kind]
                rest = re.sub(" (with|without) stripes| that is$", "", " ".join(words))
                assert len(noun_phrase(rest, scene.objects)) > 1, statement


def test_expressions_list_every_wording(drawn):
    rng = np.random.default_rng(0)
    scene = drawn[3]
    for thing, statements in zip(scene.objects, scene.statements, strict=True):
        listed = expressions(scene, thing)
        assert all((statement.kind, statement.draw(rng)) in listed for statement in statements)


def test_every_expression_is_short_in_words_and_in_tokens(drawn):
    rng = np.random.default_rng(0)
    texts = {statement.draw(rng) for scene in drawn for statements in scene.statements for statement in statements}
    texts |= {text for scene in drawn[:2] for thing in scene.objects for _, text in expressions(scene, thing)}
    assert 2 <= max(len(text.split()) for text in texts) <= 9
    # A sentence that is cut ends all the same, so a longer row must show no more tokens.
    fitting, longer = (Tokenizer(length, 8192)(sorted(texts)) for length in (17, 40))
    assert (longer[:, 17:] == 0).all() and (fitting == longer[:, :17]).all()


def test_objects_lie_in_the_frame_and_can_be_seen(drawn):
    occluded = 0
    for scene in drawn:
        height, width = scene.image.shape[:2]
        covered = np.zeros((height, width), int)
        for thing in scene.objects:
            whole = module._filled(thing.contours, height, width)
            assert thing.mask.sum() >= 0.6 * whole.sum()
            assert all((contour >= 0).all() and (contour <= (width, height)).all() for contour in thing.contours)
            occluded += thing.occluded
            covered += thing.mask
        assert covered.max() == 1
    assert occluded > 50


def test_sizes_differ_clearly(drawn):
    things = [thing for scene in drawn for thing in scene.objects if not thing.occluded]
    for shape in SHAPES:
        area = {
            size: [thing.mask.mean() for thing in things if (thing.shape, thing.size) == (shape, size)]
            for size in ("small", "large")
        }
        assert min(area["large"]) > 2 * max(area["small"])


def test_the_object_is_where_its_mask_says(drawn):
    """The rim is dark and the inside coloured, so the picture differs from its surroundings along the mask."""
    for scene in drawn[:50]:
        thing = scene.objects[-1]
        colour = np.median(scene.image[thing.mask], axis=0)
        if thing.texture == "plain":
            assert np.abs(colour - COLOURS[thing.colour]).max() < 25


def test_a_scene_takes_little_time():
    start = time.process_time()
    for i in range(40):
        assert draw_scene(np.random.default_rng([9, i]), 5).statements
    assert (time.process_time() - start) / 40 < 0.05


def test_the_same_options_give_the_same_bytes(tmp_path, monkeypatch):
    written = []
    for cache in ("a", "b"):
        monkeypatch.setenv("RIS_BENCH_CACHE", str(tmp_path / cache))
        dataset = DATASETS["scenes"](num_train=6, num_eval=2)
        dataset.locate(None)
        written.append(digests(dataset.home))
    assert written[0] == written[1] and len(written[0]) == 6 + 3 * 2 + 2
    other = DATASETS["scenes"](num_train=6, num_eval=2, seed=1)
    other.locate(None)
    assert other.home != dataset.home
    assert not set(digests(other.home).values()) & set(written[0].values())


def test_splits_share_no_scene_and_have_their_referents(generated):
    images = {}
    for split, num_scenes in SPLITS.items():
        samples = generated.read(None, split)
        images[split] = {hashlib.sha256(sample.image_path.read_bytes()).hexdigest() for sample in samples}
        assert len(images[split]) == num_scenes == len({sample.image_id for sample in samples})
        shapes = {sample.category for sample in samples}
        assert shapes == {"testA": set(ROUND), "testB": set(SHAPES) - set(ROUND)}.get(split, set(SHAPES))
    assert len(set().union(*images.values())) == sum(SPLITS.values())


def test_every_kind_of_expression_is_in_every_split(generated):
    for split in SPLITS:
        sentences = [sentence for ref in refs(generated) if ref["split"] == split for sentence in ref["sentences"]]
        assert {sentence["kind"] for sentence in sentences} == set(KINDS)


def test_the_image_alone_never_tells_the_referent(generated):
    by_image = {}
    for ref in refs(generated):
        kinds = [sentence["kind"] for sentence in ref["sentences"]]
        assert 1 <= len(kinds) == len({sentence["sent"] for sentence in ref["sentences"]}) <= 3
        by_image.setdefault(ref["image_id"], []).append({sentence["sent"] for sentence in ref["sentences"]})
    assert len(by_image) == sum(SPLITS.values())
    for spoken in by_image.values():
        assert len(spoken) >= 2 and len(set().union(*spoken)) == sum(map(len, spoken))


def test_most_referents_have_a_distractor(drawn):
    shared = [
        any(
            thing is not other and (thing.shape == other.shape or thing.colour == other.colour)
            for other in scene.objects
        )
        for scene in drawn
        for thing in scene.objects
    ]
    assert np.mean(shared) > 0.85


def test_the_reader_returns_the_visible_pixels(generated):
    forms = set()
    samples = generated.read(None, "train")
    for i in range(NUM_TRAIN):
        scene, chosen = module._scene_with_referents(np.random.default_rng([0, 0, i]), "train")
        read = {sample.ann_id: sample for sample in samples if sample.image_id == i + 1}
        assert len(read) == len(chosen)
        for sample in read.values():
            forms.add(isinstance(sample.segmentation, dict))
            (thing,) = [thing for thing in chosen if np.array_equal(thing.mask, sample.mask())]
            assert thing.shape == sample.category and sample.image().size == thing.mask.shape[::-1]
    assert forms == {True, False}  # Run lengths and polygons.


def test_every_object_is_annotated(generated):
    instances = json.loads((generated.home / "scenes" / "instances.json").read_text())
    per_image = np.bincount([annotation["image_id"] for annotation in instances["annotations"]])[1:]
    assert per_image.min() >= 3 and per_image.sum() > len(refs(generated))
    assert {category["name"] for category in instances["categories"]} == set(SHAPES)


def test_an_interrupted_generation_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RIS_BENCH_CACHE", str(tmp_path))
    dataset = DATASETS["scenes"](num_train=4, num_eval=1)
    annotate, left = module._annotation, iter(range(8))

    def interrupted(*args):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return annotate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_annotation", interrupted)
        with pytest.raises(KeyboardInterrupt):
            dataset.locate(None)
    assert list(tmp_path.iterdir()) == []
    assert dataset.read(None, "train")


def test_generating_twice_at_once_gives_one_whole_data_set(tmp_path, monkeypatch):
    monkeypatch.setenv("RIS_BENCH_CACHE", str(tmp_path))
    dataset = DATASETS["scenes"](num_train=6, num_eval=1)
    barrier, moved = threading.Barrier(2), []
    move = module._move

    def move_together(source, target):
        barrier.wait(60)  # Both have generated before either is done.
        move(source, target)
        moved.append(source)

    monkeypatch.setattr(module, "_move", move_together)
    threads = [threading.Thread(target=dataset.locate, args=(None,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(moved) == 1 and list(tmp_path.iterdir()) == [dataset.home]
    assert len({sample.image_id for sample in dataset.read(None, "train")}) == 6


@pytest.mark.parametrize("options", [{"num_train": 0}, {"num_eval": 0}, {"seed": -1}, {"seed": PRETRAINING_SEED}])
def test_impossible_options_are_refused(options):
    with pytest.raises(UserError, match=f"{[*options.values()][0]}"):
        DATASETS["scenes"](**options)


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("RIS_BENCH_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="RIS_BENCH_CACHE"):
        DATASETS["scenes"](num_train=1, num_eval=1).locate(None)
