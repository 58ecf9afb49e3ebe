"""Pre-training of the tiny backbones: what it writes is what they load, and captions are true."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file

from ris_bench import pretrain
from ris_bench.backbones.base import BACKBONES
from ris_bench.backbones.weights import Weights, locate
from ris_bench.data.scenes import PRETRAINING_SEED, draw_scene, scenes

MOST_BYTES = 8_000_000


@pytest.mark.parametrize("name", TINY)
def test_it_makes_what_is_shipped(name, capsys):
    state = pretrain.pretrain(name, steps=2, num_scenes=4, images=3, lr=1e-3)
    shipped = load_file(locate(name, None))
    assert {key: (t.shape, t.dtype) for key, t in state.items()} == {k: (t.shape, t.dtype) for k, t in shipped.items()}
    assert "step 2/2" in capsys.readouterr().out


def test_shipped_weights_are_small_and_load_strictly():
    assert sum(locate(name, None).stat().st_size for name in TINY) <= MOST_BYTES
    for name in TINY:
        BACKBONES[name](Weights(None))


def test_shipped_weights_know_descriptions():
    """On scenes that pre-training saw none of, a description finds its object far more often than by chance."""
    torch.manual_seed(0)
    book = pretrain.write_book(24, 128, seed=2)
    teacher = pretrain.Captions(pretrain.tiny_rn(), 128).eval()
    shuffled = book.description_NKL[torch.randperm(len(book.description_NKL))]
    teacher.clip.load_state_dict(
        {k: t.float() for k, t in load_file(locate("tiny-clip-rn", None)).items()}, strict=False
    )
    # The heads of pre-training are not shipped, so the text tower is judged by itself: two descriptions that say the
    # same in other words must be nearer than those of another object.
    with torch.inference_mode():
        first, second, other = (
            torch.nn.functional.normalize(teacher.run_text(tokens[:, 0])[1], dim=1)
            for tokens in (book.description_NKL, book.description_NKL[:, 1:], shuffled)
        )
    same, different = (first * second).sum(1).mean(), (first * other).sum(1).mean()
    assert same > different + 0.2


def test_descriptions_are_true():
    for i in range(20):
        rng = np.random.default_rng([PRETRAINING_SEED, i])
        scene = draw_scene(rng, 4)
        for thing in scene.objects:
            text, said = pretrain.describe(thing, rng)
            attributes = zip(pretrain.ATTRIBUTES.items(), said, strict=False)
            for (name, values), value in attributes:
                if value != pretrain.ANY:
                    assert getattr(thing, name) == values[value]
            if said[-1] != pretrain.ANY:
                assert any(
                    word in text for word in ("left", "right", "top", "upper", "bottom", "lower", "middle", "center")
                )


def test_data_sets_cannot_have_the_seeds_of_pretraining():
    with pytest.raises(ValueError, match="seed"):
        scenes(seed=PRETRAINING_SEED)


def test_a_text_is_positive_for_every_object_that_it_fits():
    images, texts = torch.eye(3), torch.eye(3)
    fits = torch.eye(3, dtype=torch.bool)
    scale = torch.tensor(4.0)
    right, found = pretrain.contrast(images, texts, fits, scale)
    wrong, missed = pretrain.contrast(images, texts.roll(1, 0), fits, scale)
    assert (found, missed) == (1.0, 0.0)
    assert right < 1e-3 < wrong
    both, found = pretrain.contrast(images, texts.roll(1, 0), fits | fits.roll(1, 1), scale)
    assert found == 1.0
    assert both < 1e-3
