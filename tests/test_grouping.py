"""Expressions of an image that are trained on side by side: what is shared, and that it is the same training."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import groupby

import numpy as np
import pytest
import torch
from conftest import TINY_HEAD, inputs, tiny_model

from ris_bench import evaluation
from ris_bench.backbones.base import BACKBONES, Known
from ris_bench.backbones.weights import Weights
from ris_bench.data.samples import Sample, draw, draw_keys, referents
from ris_bench.head import HEADS
from ris_bench.loading import Batch, ReferentBatches, Tokenizer
from ris_bench.methods.base import METHODS, Method
from ris_bench.model import RISModel
from ris_bench.parallel import Team
from ris_bench.records import Training, plain
from ris_bench.speed import choose
from ris_bench.training import Loop

CPU = torch.device("cpu")
ROW_B = torch.tensor([0, 0, 1, 1, 1, 2])
TOKENIZER = Tokenizer(17)
TRAINING = Training(epochs=1, batch_size=6, lr=1e-3, milestones=(), gamma=0.1, precision="fp32")


def samples(number: int = 40) -> list[Sample]:
    """Referents of 1 to 3 expressions on 12 images, some of which have many."""
    rng = np.random.default_rng(0)
    made = []
    for ref_id in range(number):
        image_id = int(rng.integers(12)) if ref_id % 3 else 0
        for i in range(ref_id % 3 + 1):
            names = dict(dataset="d", split="train", ref_id=ref_id, sent_id=len(made), sentence_index=i)
            target = dict(image_id=image_id, ann_id=ref_id, category="thing", segmentation=[])
            text = f"thing {ref_id} number {i}"
            made.append(Sample(**names, **target, expression=text, raw=text, image_path=image_id, height=8, width=8))
    return made


def batches(together: int, batch_size: int = 8, seed: int = 0, team: Team | None = None) -> ReferentBatches:
    more = {"team": team} if team else {}
    made = samples()
    return ReferentBatches(made, TOKENIZER, 8, batch_size, seed, known=len, expressions_per_image=together, **more)


def test_one_by_one_the_order_is_that_of_the_draws():
    made = samples()
    keys = draw_keys(made)
    for seed, epoch in ((0, 0), (0, 3), (7, 1)):
        chosen = []
        for positions in referents(made):
            key = keys[positions[0]]
            chosen.append(
                (draw("order", seed, epoch, *key), positions[draw("sentence", seed, epoch, *key) % len(positions)])
            )
        assert sum(batches(1, seed=seed)._plan(epoch), []) == [position for _, position in sorted(chosen)]


@pytest.mark.parametrize("together", [2, 3, 5, 100])
def test_an_epoch_has_the_same_expressions_in_groups_of_an_image(together):
    made = samples()
    for epoch in range(3):
        alone, grouped = batches(1)._plan(epoch), batches(together)._plan(epoch)
        assert [len(batch) for batch in grouped] == [len(batch) for batch in alone]
        order = sum(grouped, [])
        assert sorted(order) == sorted(sum(alone, []))
        # As few groups of an image as there can be, which may follow each other.
        runs = Counter(image for image, _ in groupby(made[i].image_path for i in order))
        for image, number in Counter(made[i].image_path for i in order).items():
            assert runs[image] <= -(-number // together)
        # In a group referents have no order that lasts, nor do the groups.
        assert order != sum(batches(together)._plan(epoch + 1), [])


def test_groups_are_cut_anew_in_every_epoch_and_no_image_is_early():
    made = samples(60)
    plan = ReferentBatches(made, TOKENIZER, 8, 8, 0, known=len, expressions_per_image=3)
    first, beside = Counter(), set()
    for epoch in range(200):
        order = sum(plan._plan(epoch), [])
        first[made[order[0]].image_path] += 1
        beside.add(frozenset(made[i].ref_id for i in order[:3]))
    sizes = Counter(made[positions[0]].image_path for positions in referents(made))
    groups = {image: -(-number // 3) for image, number in sizes.items()}
    assert len(beside) > 100
    for image, number in groups.items():  # each group is as likely to come first
        expected = 200 * number / sum(groups.values())
        assert abs(first[image] - expected) < 5 * expected**0.5


def test_grouped_epochs_can_start_anywhere_and_are_shared_in_a_team():
    whole = [batch.index_B.tolist() for batch in batches(3).epoch(2)]
    assert [batch.index_B.tolist() for batch in batches(3).epoch(2, 3)] == whole[3:]
    shares = [batches(3, team=Team(rank, 2)).epoch(2) for rank in range(2)]
    for expected, one, other in zip(whole, *shares, strict=True):
        assert (one.index_B.tolist(), other.index_B.tolist()) == (expected[::2], expected[1::2])
    # Neighbours have one image, which is there once.
    for batch in batches(3).epoch(0):
        assert batch.image_U3HW == len(batch.row_B.unique()) < len(batch.index_B)


def test_a_trial_of_before_is_still_the_same_trial():
    assert "expressions_per_image" not in plain(TRAINING)
    assert plain(replace(TRAINING, expressions_per_image=3))["expressions_per_image"] == 3


def gradients(model: RISModel, together: int, accumulate: int = 1, seed: int = 0) -> tuple[float, dict]:
    """Loss and gradients of a step on six expressions of three images, and the statistics after it."""
    images, _ = inputs(model, 3, seed)
    _, tokens = inputs(model, 6, seed)
    mask = (torch.rand(6, 1, *images.shape[2:], generator=torch.Generator().manual_seed(seed)) > 0.5).double()
    known, row = (images.double(), ROW_B) if together > 1 else (images.double()[ROW_B], torch.arange(6))
    loop = Loop(model, replace(TRAINING, expressions_per_image=together, accumulate=accumulate), CPU)
    before = {name: tensor.clone() for name, tensor in model.moving_statistics().items()}
    model.train()
    model.zero_grad()
    torch.manual_seed(0)
    loss = loop._gradients(Batch(known, row, tokens, mask, torch.arange(6), 6))
    found = {name: p.grad for name, p in loop.tuned.items()}
    after = {name: tensor.clone() for name, tensor in model.moving_statistics().items()}
    for name, tensor in model.moving_statistics().items():
        tensor.copy_(before[name])
    return loss, found | after


def check(model: RISModel, **more) -> None:
    model.double()
    (loss, found), (expected, theirs) = gradients(model, 3, **more), gradients(model, 1, **more)
    assert loss == pytest.approx(expected, rel=1e-9)
    for name, tensor in theirs.items():
        if tensor is None:
            assert found[name] is None
        else:
            torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-9, msg=name)


def passes(model: RISModel, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Steps of the image tower as they are made, with the rows of each."""
    tower, seen = model.backbone.image, []
    step = type(tower).step

    def watched(self, number, x):
        if not isinstance(x, Known):
            seen.append((number, len(x)))
        return step(self, number, x)

    monkeypatch.setattr(type(tower), "step", watched)
    return seen


def test_a_grouped_batch_is_the_same_step(model, monkeypatch):
    seen = passes(model, monkeypatch)
    check(model)
    if type(model.method).forward is Method.forward:
        steps = range(len(model.backbone.image.stages) + 2)
        assert seen == [(number, rows) for rows in (3, 6) for number in steps]


@torch.inference_mode()
def test_an_evaluation_of_an_image_s_expressions_is_that_of_each(model):
    model.double().eval()
    images, _ = inputs(model, 3)
    _, tokens = inputs(model, 6)
    images, one = images.double(), torch.tensor([0])
    together = evaluation.forward(model, images, ROW_B, tokens, CPU, None)
    alone = [
        evaluation.forward(model, images[row][None], one, tokens[i][None], CPU, None)
        for i, row in enumerate(ROW_B.tolist())
    ]
    torch.testing.assert_close(together, torch.cat(alone))


@pytest.mark.parametrize("backbone, method", [("tiny-clip-rn", "lora"), ("tiny-clip-vit", "adapter")])
def test_each_part_of_a_batch_shares_its_images(backbone, method, monkeypatch):
    model = tiny_model(backbone, method)
    check(model, accumulate=3)
    seen = passes(model, monkeypatch)
    gradients(model, 3, accumulate=3)  # parts of the rows 0 0, 1 1 and 1 2
    assert [rows for number, rows in seen if number == len(model.backbone.image.stages) + 1] == [1, 1, 2]


@pytest.mark.parametrize("method", ["full", "adapter", "frozen"])
def test_where_norms_take_the_statistics_of_the_batch_rows_are_apart(method, monkeypatch):
    model = tiny_model("tiny-clip-rn", method, norm_stats="batch")
    seen = passes(model, monkeypatch)
    check(model)
    assert {rows for _, rows in seen} == {6}


def test_dropout_draws_for_each_expression(monkeypatch):
    backbone = BACKBONES["tiny-clip-vit"](Weights(None))
    method = METHODS["peft"](backbone, tuner="lora", targets=("fc1",), towers=("image",), config={"lora_dropout": 0.5})
    model = RISModel(backbone, method, HEADS["etris"](backbone, **TINY_HEAD))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_B" in name:
                parameter.normal_()
    seen = passes(model, monkeypatch)
    check(model)
    assert [rows for number, rows in seen if number == len(backbone.image.stages) + 1] == [6, 6]


def test_the_plain_way_looks_at_an_image_for_each_expression(monkeypatch):
    model = tiny_model("tiny-clip-vit", "lora").double()
    choose(model, "plain")
    seen = passes(model, monkeypatch)
    gradients(model, 3)
    assert {rows for _, rows in seen} == {6}
