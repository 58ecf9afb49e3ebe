"""The loop: schedule, accumulation, losses, and the end of a run that has gone wrong."""

from __future__ import annotations

import pytest
import torch
from conftest import TINY_HEAD
from torch import nn

from ris_bench.head import coordinates
from ris_bench.loading import Batch
from ris_bench.records import Training
from ris_bench.training import Loop, learning_rate, reduced, segmentation_loss, settle, train

CPU = torch.device("cpu")


def training(**changes) -> Training:
    given = {"epochs": 3, "batch_size": 4, "lr": 0.1, "milestones": (1, 2), "gamma": 0.5, "precision": "fp32"}
    return Training(**{**given, **changes})


class Batches:
    """Fixed batches of random images; the mask is one channel's sign."""

    def __init__(self, sizes: tuple[int, ...] = (4, 3)) -> None:
        generator = torch.Generator().manual_seed(0)
        self.batches = []
        for size in sizes:
            image = torch.randn(size, 3, 8, 8, generator=generator)
            mask = (image[:, :1] > 0).float()
            rows = torch.arange(size)
            self.batches.append(Batch(image, rows, torch.ones(size, 4, dtype=torch.long), mask, rows, size))

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int, start: int = 0):
        return iter(self.batches[start:])


class Pixelwise(nn.Module):
    """Logits of single pixels; no statistics, so that parts of a batch sum up to the batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(3, 1, 1)

    def known(self, image):
        return image

    def forward(self, image, tokens):
        return self.layer(image)


def run(model, batches, settings) -> list:
    loop, steps = Loop(model, settings, CPU), []
    epochs = list(train(loop, batches, lambda loss: steps.append((loop.epoch, loop.batch))))
    assert steps == [(epoch, i + 1) for epoch in range(len(epochs)) for i in range(len(batches))]
    return epochs


def test_rate_is_multiplied_after_each_milestone():
    assert [epoch.lr for epoch in run(Pixelwise(), Batches(), training())] == pytest.approx([0.1, 0.05, 0.025])


@pytest.mark.parametrize("milestones", [(), (1, 2), (2, 2, 3), (0, 4), (7,)])
def test_the_rate_is_that_of_torch_to_the_last_bit(milestones):
    settings = training(lr=0.3, milestones=milestones, gamma=0.3)
    optimizer = torch.optim.SGD(Pixelwise().parameters(), lr=settings.lr)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, settings.gamma)
    for epoch in range(6):
        if len(set(milestones)) == len(milestones):
            assert learning_rate(settings, epoch) == schedule.get_last_lr()[0]
        else:  # torch takes gamma to a power where milestones coincide
            assert learning_rate(settings, epoch) == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()


def test_it_learns():
    epochs = run(Pixelwise(), Batches(), training(epochs=30, milestones=()))
    assert epochs[-1].loss < epochs[0].loss / 2


def test_accumulation_is_the_same_step():
    whole, parts = Pixelwise(), Pixelwise()
    expected = run(whole, Batches(), training())
    got = run(parts, Batches(), training(accumulate=2))
    assert [e.loss for e in got] == pytest.approx([e.loss for e in expected], rel=1e-5)
    assert torch.allclose(parts.layer.weight, whole.layer.weight, atol=1e-5)


class Narrow(Pixelwise):
    """Has no memory for more than two images, and statistics."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error, self.norm, self.noise = error, nn.BatchNorm2d(3), nn.Dropout(0.5)

    def moving_statistics(self):
        return dict(self.norm.named_buffers())

    def forward(self, image, tokens):
        image = self.noise(self.norm(image))  # a part that does not fit has moved the statistics, and drawn
        if len(image) > 2:
            raise self.error
        return super().forward(image, tokens)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("can't allocate memory: 1 TB")]
)
def test_a_step_that_does_not_fit_is_split_and_so_are_all_after_it(error):
    settings = training(out_of_memory="split")
    split, expected = Narrow(error), Narrow(error)
    torch.manual_seed(1)
    got = run(split, Batches((4, 4)), settings)
    torch.manual_seed(1)
    assert got == run(expected, Batches((4, 4)), training(accumulate=2))
    for name, tensor in expected.state_dict().items():
        assert torch.equal(split.state_dict()[name], tensor), name
    with pytest.raises(type(error)):
        run(Narrow(error), Batches((4, 4)), training())
    with pytest.raises(type(error)):  # parts of one could not be normalised
        run(Narrow(error), Batches((3,)), settings)


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    with pytest.raises(RuntimeError, match="shapes"):
        run(Narrow(RuntimeError("shapes do not fit")), Batches((4, 4)), training(out_of_memory="split"))


def test_what_is_frozen_stays():
    model = nn.Sequential()
    model.frozen, model.tuned = nn.Conv2d(3, 3, 1).requires_grad_(False), Pixelwise()
    model.known = model.tuned.known
    model.forward = lambda image, tokens: model.tuned(model.frozen(image), tokens)
    before = model.frozen.weight.clone()
    run(model, Batches(), training())
    assert torch.equal(before, model.frozen.weight)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_run(bad):
    batches = Batches()
    batches.batches[1].image_U3HW[0, 0, 0, 0] = bad
    with pytest.raises(FloatingPointError, match="epoch 1, batch 2 of 2"):
        run(Pixelwise(), batches, training())


def test_the_mask_is_brought_to_the_logits():
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1
    right = torch.where(mask[..., ::4, ::4] > 0, 20.0, -20.0)
    assert segmentation_loss(right, mask, dice=0) < 1e-6
    assert segmentation_loss(-right, mask, dice=0) == pytest.approx(20)


def test_dice_is_zero_for_the_truth_and_one_for_its_opposite():
    mask = torch.zeros(2, 1, 8, 8)
    mask[:, :, :, :4] = 1
    logits = torch.where(mask > 0, 30.0, -30.0)
    for sign, expected in ((1, 0.0), (-1, 1.0)):
        with_dice, without = (segmentation_loss(sign * logits, mask, dice=d) for d in (1.0, 0.0))
        assert (with_dice - without).item() == pytest.approx(expected, abs=0.02)


def test_a_cpu_computes_in_full_precision():
    assert [reduced(p, CPU) for p in ("fp32", "fp16", "bf16")] == [None] * 3
    assert reduced("bf16", torch.device("cuda")) is torch.bfloat16


@pytest.mark.parametrize(
    "asked, device, capability, used",
    [
        ("fp32", "cuda", (9, 0), "fp32"),
        ("tf32", "cuda", (8, 0), "tf32"),
        ("tf32", "cuda", (7, 5), "fp32"),
        ("bf16", "cuda", (9, 0), "bf16"),
        ("tf32", "cpu", None, "fp32"),
        ("fp16", "cpu", None, "fp32"),
    ],
)
def test_tf32_is_used_where_it_is_asked_for_and_nowhere_else(asked, device, capability, used, monkeypatch):
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = used != "tf32", True
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert settle(asked, torch.device(device)) == used
    assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == (used == "tf32")
    # What a compiler asks must be answered: PyTorch refuses where old and new switches say different things.
    assert torch.get_float32_matmul_precision() == ("high" if used == "tf32" else "highest")
    settle("fp32", CPU)


def test_coordinates_run_from_edge_to_edge():
    places = coordinates(3, 4, torch.float32, CPU)
    assert places.shape == (2, 3, 4)
    assert places[0, 1].tolist() == pytest.approx([-1, -1 / 3, 1 / 3, 1])
    assert places[1, :, 2].tolist() == [-1, 0, 1]


def test_heads_refuse_widths_that_do_not_divide():
    from ris_bench.backbones.base import BACKBONES
    from ris_bench.errors import UserError
    from ris_bench.head import HEADS

    with pytest.raises(UserError, match="multiple"):
        HEADS["etris"](BACKBONES["tiny-clip-vit"](None), **{**TINY_HEAD, "width": 18, "heads": 4})
