"""Tokens and batches: CLIP's ids, one expression per referent and epoch, and an order that nothing can disturb."""

import math
import random
from collections import Counter
from collections.abc import Iterable
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data._utils.pin_memory import pin_memory

from ris_bench import pixels
from ris_bench.backbones.base import Known
from ris_bench.data.refcoco import refcocog_google
from ris_bench.data.samples import Sample, referents
from ris_bench.errors import UserError
from ris_bench.loading import Batch, ReferentBatches, Tokenizer, expression_batches
from ris_bench.transforms import Letterbox, normalise, restore

SLICE = Path(__file__).parents[2] / "shared" / "refcocog_slice"
FULL = Tokenizer(17)
SMALL = Tokenizer(17, 8192)
WORDS = "man on the left in a red shirt with white hat"


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """13 referents with 1 to 4 expressions on 5 images, each image with a different shape."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    made = []
    for ref_id in range(100, 113):
        image_id = ref_id % 5
        height, width = 40 + 3 * image_id, 50 - 2 * image_id
        path = folder / f"{image_id}.png"
        if not path.exists():
            Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        x, y = rng.integers(0, 20, 2).tolist()
        polygons = [[x, y, x + 15, y, x + 15, y + 12, x, y + 12]]
        for i in range(ref_id % 4 + 1):
            names = dict(dataset="d", split="train", ref_id=ref_id, sent_id=len(made), sentence_index=i)
            target = dict(image_id=image_id, ann_id=10 * ref_id, category="thing", segmentation=polygons)
            text = f"thing {ref_id} number {i}"
            made.append(
                Sample(**names, **target, expression=text, raw=text, image_path=path, height=height, width=width)
            )
    return made


def batches(samples: list[Sample], batch_size: int = 4, seed: int = 0, num_workers: int = 0) -> ReferentBatches:
    return ReferentBatches(samples, FULL, 32, batch_size, seed, num_workers)


def order(made: ReferentBatches, epoch: int = 0, start: int = 0) -> list[list[int]]:
    return [batch.index_B.tolist() for batch in made.epoch(epoch, start)]


def same(made: Iterable[Batch], expected: Iterable[Batch]) -> bool:
    pairs = ((a, b) for batch, other in zip(made, expected, strict=True) for a, b in zip(batch, other, strict=True))
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def test_tokens_are_those_of_clip() -> None:
    expressions = [WORDS, "  The  MAN's\tdog ", "candle - holder", "caf\u00e9 \u4eba", "12:00"]
    assert torch.equal(Tokenizer(77)(expressions), open_clip.tokenize(expressions))


def test_what_has_nothing_to_mend_is_what_mending_leaves() -> None:
    letters = [chr(code) for code in range(128)]
    rng = random.Random(0)
    texts = ["".join(rng.choices(letters, k=rng.randint(0, 30))) for _ in range(300)]
    texts += ["".join(rng.choices([c for c in letters if c.isprintable() and c != "&"], k=30)) for _ in range(300)]
    texts += [
        "a\tb \r\n c",
        "R&amp;B",
        "R&B",
        "&lt;b&gt;",
        "\x1b[31mred",
        "schÃ¶n",
        "“quoted”",
        "ﬁre",
        "<b>&eacute;",
        "",
    ]
    assert torch.equal(Tokenizer(77)(texts), open_clip.tokenize(texts))


@pytest.mark.parametrize("tokenizer", [FULL, SMALL])
def test_start_end_padding_and_cut(tokenizer: Tokenizer) -> None:
    start, end = tokenizer.vocab_size - 2, tokenizer.vocab_size - 1
    empty, blank, short, long = tokenizer(["", " \n ", "man", "man " * 200])
    assert empty.dtype == torch.int64 and len(empty) == 17
    assert empty.tolist() == blank.tolist() == [start, end] + [0] * 15
    assert short.tolist() == [start, short[1], end] + [0] * 14
    assert long.tolist() == [start] + [short[1]] * 15 + [end]
    assert all(row.argmax() == (row == end).nonzero()[0, 0] for row in (empty, short, long))


def test_the_small_vocabulary_agrees_where_only_early_merges_are_used() -> None:
    (full,), (small,) = FULL([WORDS]), SMALL([WORDS])
    words = (full > 0) & (full < 49406)
    assert words.sum() == 11  # As many as there are words: each is merged into one piece.
    assert torch.equal(full[words], small[words])
    assert small[~words].tolist() == [8190, 8191] + [0] * 4


def test_the_small_vocabulary_spells_rare_words_in_pieces() -> None:
    rare = "giraffe"
    assert (FULL([rare]) > 8190).sum() == 3
    pieces = [i for i in SMALL([rare])[0].tolist() if 0 < i < 8190]
    assert len(pieces) > 1
    assert "".join(open_clip.tokenizer._tokenizer.decoder[i] for i in pieces) == "giraffe</w>"


def test_the_small_vocabulary_ends_where_it_says() -> None:
    pieces = open_clip.tokenizer._tokenizer
    edge = [i for i in range(8150, 8230) if pieces.decoder[i].removesuffix("</w>").isascii()]
    for i, (first, second) in zip(edge, SMALL([pieces.decode([i]) for i in edge])[:, 1:3].tolist(), strict=True):
        if pieces.decoder[i].endswith("</w>"):  # A whole word: one piece where its merge is kept, several where not.
            assert (first, second) == (i, 8191) if i < 8190 else second < 8190


def test_every_text_fits_the_vocabulary() -> None:
    bytes_only = Tokenizer(60, 514)
    text = "".join(map(chr, range(33, 0x250)))
    for part in range(0, len(text), 20):
        assert bytes_only([text[part : part + 20]]).max() == 513
    for impossible in (513, 49409):
        with pytest.raises(UserError, match="514 to 49408"):
            Tokenizer(17, impossible)


def test_every_referent_once_per_epoch(samples: list[Sample]) -> None:
    made = batches(samples)
    assert made.num_referents == 13
    for epoch in range(3):
        flat = sum(order(made, epoch), [])
        assert Counter(samples[i].ref_id for i in flat) == Counter(range(100, 113))


@pytest.mark.parametrize("batch_size, lengths", [(4, [4, 4, 5]), (5, [5, 5, 3]), (6, [6, 7]), (13, [13]), (64, [13])])
def test_the_last_batch_is_kept_and_never_single(samples: list[Sample], batch_size: int, lengths: list[int]) -> None:
    made = batches(samples, batch_size)
    assert [len(batch) for batch in order(made)] == lengths
    assert len(made) == len(lengths)


def test_one_referent_is_too_few(samples: list[Sample]) -> None:
    with pytest.raises(UserError, match="at least 2 referents and has 1"):
        batches([s for s in samples if s.ref_id == 103])


def test_the_contents_of_a_training_batch(samples: list[Sample]) -> None:
    letterbox = Letterbox(32)
    for batch in batches(samples).epoch(0):
        chosen = [samples[i] for i in batch.index_B]
        pixels = torch.stack([torch.from_numpy(letterbox.image(s.image())) for s in chosen])
        assert torch.equal(batch.image_U3HW[batch.row_B], normalise(pixels))
        assert len(batch.image_U3HW) == len({s.image_path for s in chosen})
        assert torch.equal(batch.tokens_BL, FULL([s.expression for s in chosen]))
        masks = torch.stack([torch.from_numpy(letterbox.mask(s.mask())) for s in chosen])[:, None]
        assert batch.mask_B1HW.dtype == torch.float32
        torch.testing.assert_close(batch.mask_B1HW, masks, rtol=0, atol=1e-6)
        assert ((masks > 0) & (masks < 1)).any()  # Soft at the outline.


def test_epochs_and_seeds_differ_in_order_and_sentence(samples: list[Sample]) -> None:
    orders = [
        tuple(samples[i].ref_id for i in sum(order(batches(samples, seed=s), e), [])) for s in (0, 1) for e in (0, 1)
    ]
    sentences = [tuple(sorted(sum(order(batches(samples, seed=s), e), []))) for s in (0, 1) for e in (0, 1)]
    assert len(set(orders)) == len(set(sentences)) == 4


def test_every_sentence_gets_its_turn_equally_often(samples: list[Sample]) -> None:
    made = batches(samples, 64)
    counts = Counter(i for epoch in range(400) for i in order(made, epoch)[0])
    for positions in referents(samples):
        expected = 400 / len(positions)
        assert all(abs(counts[i] - expected) < 5 * expected**0.5 for i in positions)


def test_the_sentence_depends_on_nothing_but_seed_epoch_and_referent(samples: list[Sample]) -> None:
    everything = {samples[i].ref_id: samples[i].sentence_index for i in sum(order(batches(samples), 2), [])}
    some = [s for s in samples if s.ref_id in (103, 107, 111)]
    alone = {some[i].ref_id: some[i].sentence_index for i in sum(order(batches(some, 2), 2), [])}
    assert alone == {ref_id: everything[ref_id] for ref_id in alone}


def test_an_epoch_can_start_anywhere(samples: list[Sample]) -> None:
    made = batches(samples)
    whole = list(made.epoch(1))
    for start in range(len(made) + 1):
        rest = list(batches(samples).epoch(1, start))
        assert same(rest, whole[start:])


def test_global_random_state_is_neither_used_nor_moved(samples: list[Sample]) -> None:
    def everything() -> list[Batch]:
        return [*batches(samples).epoch(0), *expression_batches(samples, FULL, 32, 4)]

    first = everything()
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(123)
    state, legacy, python = torch.get_rng_state(), np.random.get_state(), random.getstate()
    assert same(first, everything())
    assert torch.equal(state, torch.get_rng_state())
    assert np.array_equal(legacy[1], np.random.get_state()[1]) and legacy[2] == np.random.get_state()[2]
    assert python == random.getstate()


def test_workers_change_nothing(samples: list[Sample]) -> None:
    assert same(batches(samples).epoch(0), batches(samples, num_workers=2).epoch(0))
    evaluated = (expression_batches(samples, FULL, 32, 4, num_workers=n) for n in (0, 2))
    assert same(*evaluated)


def test_what_goes_to_a_gpu_is_pinned(samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def loader(batches: Iterable[Batch], **settings: object) -> Iterable[Batch]:
        asked.append(settings["pin_memory"])
        return batches

    monkeypatch.setattr(pixels, "DataLoader", loader)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for workers in (0, 1):
        next(ReferentBatches(samples, Tokenizer(17), 32, 4, seed=0, num_workers=workers).epoch(0))
    assert asked == [False, True]

    # All that a batch holds is, what is known of images too.
    pinned: list[Tensor] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor, *device: pinned.append(tensor) or tensor)
    known = Known(None, (None, torch.zeros(2, 3), torch.zeros(2, 4)))
    batch = Batch(
        known, torch.arange(2), torch.ones(2, 4, dtype=torch.long), torch.ones(2, 1, 8, 8), torch.arange(2), 2
    )
    found = pin_memory(batch)
    assert len(pinned) == 6 and isinstance(found.image_U3HW, Known) and found.size == 2


def test_evaluation_visits_every_sample_once_and_image_by_image(samples: list[Sample]) -> None:
    made = list(expression_batches(samples, FULL, 32, 4))
    visited = torch.cat([batch.index_B for batch in made]).tolist()
    assert sorted(visited) == list(range(len(samples)))
    assert len(list(groupby(samples[i].image_path for i in visited))) == len({s.image_path for s in samples}) == 5
    # An image is looked at once, where a batch holds its expressions.
    sizes = [len(batch.index_B) for batch in made]
    assert max(sizes) <= 4 and all(sum(pair) > 4 for pair in pairwise(sizes))
    shown = [{samples[i].image_path for i in batch.index_B} for batch in made]
    for path, number in Counter(sample.image_path for sample in samples).items():
        assert sum(path in paths for paths in shown) == math.ceil(number / 4)
    assert all(batch.mask_B1HW is None for batch in made)
    last = made[-1]
    assert torch.equal(last.tokens_BL, FULL([samples[i].expression for i in last.index_B]))
    pixels = torch.from_numpy(Letterbox(32).image(samples[visited[-1]].image()))
    assert torch.equal(last.image_U3HW[last.row_B[-1]], normalise(pixels[None])[0])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_corrupt_image_ends_in_one_line_that_names_it(
    num_workers: int, samples: list[Sample], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"\xff\xd8 no picture")
    broken = [Sample(**{**vars(s), "image_path": bad}) for s in samples[:5]]
    for made in (
        ReferentBatches(broken, FULL, 32, 2, 0, num_workers).epoch(0),
        expression_batches(broken, FULL, 32, 2, num_workers),
    ):
        with pytest.raises(UserError, match=r"bad\.jpg cannot be decoded") as raised:
            next(made)
        assert "\n" not in str(raised.value)


@pytest.mark.skipif(not SLICE.is_dir(), reason="the slice of real RefCOCOg is not there")
def test_real_masks_come_back_to_their_own_frame() -> None:
    real = refcocog_google().read(SLICE, "val")
    seen = []
    for batch in ReferentBatches(real, Tokenizer(22), 416, 4, seed=0).epoch(0):
        for index, mask_1HW in zip(batch.index_B.tolist(), batch.mask_B1HW, strict=True):
            sample = real[index]
            predicted = restore(mask_1HW, Letterbox(416).frame(sample.height, sample.width))[0].numpy() > 0.5
            mask = sample.mask() > 0
            assert (predicted & mask).sum() / (predicted | mask).sum() > 0.95
            seen.append(index)
    assert sorted(seen) == list(range(19))
