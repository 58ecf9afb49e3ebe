"""Several processes come to what one comes to. All tests share two of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import TINY_HEAD, inputs, tiny_model
from torch import Tensor, nn

from ris_bench import code, evaluation, parallel, speed
from ris_bench.backbones.base import BACKBONES
from ris_bench.data.dataset import DATASETS
from ris_bench.head import HEADS
from ris_bench.loading import Batch, ReferentBatches, Tokenizer
from ris_bench.methods.base import METHODS
from ris_bench.parallel import ALONE, Team
from ris_bench.records import Evaluation, Places, Training, Trial
from ris_bench.training import Loop, train
from ris_bench.trial import _Run

pytestmark = pytest.mark.usefixtures("cache")

CPU = torch.device("cpu")
MODELS = {
    "full": ("tiny-clip-rn", "full", {"norm_stats": "batch"}),
    "statistics": ("tiny-clip-rn", "frozen", {"norm_stats": "batch"}),
    "bridger": ("tiny-clip-rn", "bridger", {}),
    "lora": ("tiny-clip-vit", "lora", {}),
    "detris": ("tiny-dino", "detris", {}),
}
SCENES = DATASETS.resolve("scenes", {"num_train": 6, "num_eval": 8})


def training(**changes) -> Training:
    # The rate of the papers: what training makes of a rounding grows with it.
    given = {"epochs": 7, "batch_size": 5, "lr": 1e-4, "milestones": (), "gamma": 0.1, "precision": "fp32", "dice": 1.0}
    return Training(**{**given, **changes})


@pytest.fixture(scope="module")
def duo(cache):
    """Calls a function in two processes, which serve all tests that need no others."""
    with parallel.team(2, serve) as team:

        def both(function, *args):
            team.told((function, args))
            return function(team, *args)

        yield both
        team.told()


# What both processes do.


def serve(team: Team) -> None:
    torch.set_num_threads(1)
    while task := team.told():
        function, args = task
        function(team, *args)


def normalise(team: Team, rows: list[int], weighted: bool) -> dict[str, Tensor]:
    """Batch norm of rows of which each process has a number; what comes out, and the gradients."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(sum(rows), 3, 4, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    torch.manual_seed(1)
    norm = nn.BatchNorm2d(3, affine=weighted, dtype=torch.float64)
    if weighted:
        nn.init.normal_(norm.weight)
    start, stop = (0, sum(rows)) if team.size == 1 else (sum(rows[: team.rank]), sum(rows[: team.rank + 1]))
    present = stop > start
    x = (x[start:stop] if present else x[:1]).requires_grad_()
    for _ in range(2):
        with parallel.batch_norms(team, present):
            y = norm(5 + x)
            (y * dy[start:stop] if present else 0 * y).sum().backward()
    found = {"y": y.detach()[: stop - start], "dx": x.grad[: stop - start]}
    found = {name: torch.cat(team.gather(tensor)) for name, tensor in found.items()}
    assert present or not x.grad.any()
    gradients = {f"d{name}": p.grad for name, p in norm.named_parameters()}
    team.sum(*gradients.values())
    return found | gradients | dict(norm.named_buffers())


def without_dropout(name: str) -> nn.Module:
    backbone, method, options = MODELS[name]
    model = tiny_model(backbone, method, head={"dropout": 0.0}, **options).to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return model


def gradients(
    team: Team, name: str, size: int, accumulate: int, recompute: bool = False, together: int = 1
) -> dict[str, Tensor]:
    """Those of a batch of so many rows, of which `together` have one image, and the moving statistics after it."""
    model = without_dropout(name).train()
    speed.choose(model, "fast", recompute)
    images, tokens = inputs(model, size)
    mask = torch.nn.functional.interpolate(images[:, :1], scale_factor=0.25, mode="area").gt(0).float()
    own = torch.tensor(team.share(range(size)) or [0])
    used, row = (own // together).unique(return_inverse=True)
    batch = Batch(images[used], row, tokens[own], mask[own], own, size)
    loop = Loop(model, training(accumulate=accumulate, expressions_per_image=together), CPU, team)
    loop._gradients(batch)
    return {name: p.grad for name, p in loop.tuned.items() if p.grad is not None} | model.moving_statistics()


def evaluated(team: Team, model: nn.Module, dataset) -> pd.DataFrame:
    tokenizer = Tokenizer(dataset.word_len, model.backbone.vocab_size)
    samples = dataset.read(Path("nowhere"), "val")
    settings = {"tokenizer": tokenizer, "threshold": 0.35, "batch_size": 5, "device": CPU}
    return evaluation.evaluate(model, samples, others=evaluation.THRESHOLDS, team=team, **settings)


def learn(team: Team, name: str) -> tuple[pd.DataFrame, list[float]]:
    """What it predicts before, and the losses of 21 steps of five rows."""
    model, dataset = without_dropout(name), DATASETS.build(SCENES)
    tokenizer = Tokenizer(dataset.word_len, model.backbone.vocab_size)
    learnt = dataset.read(Path("nowhere"), "train")
    batches = ReferentBatches(learnt, tokenizer, model.backbone.image_size, training().batch_size, 0, team=team)
    before = evaluated(team, model, dataset)
    losses: list[float] = []
    for _ in train(Loop(model, training(), CPU, team), batches, losses.append):
        pass
    return before, losses


class Narrow(nn.Module):
    """Has no memory for more rows than its process is given room for; with what a step must put back."""

    def __init__(self, room: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.room, self.layer, self.norm = room, nn.Conv2d(3, 1, 1), nn.BatchNorm2d(3)

    def known(self, image: Tensor) -> Tensor:
        return image

    def moving_statistics(self) -> dict[str, Tensor]:
        return dict(self.norm.named_buffers())

    def forward(self, image, tokens):
        x = self.norm(image)
        if len(image) > self.room:
            raise MemoryError("no room")
        return self.layer(self.norm(x))


def split(team: Team, rooms: tuple[int, int]) -> tuple[int, dict[str, Tensor]]:
    """Micro-batches after a step of eight rows, and what the model is then."""
    images = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    own = torch.tensor(team.share(range(8)))
    batch = Batch(images[own], torch.arange(len(own)), torch.ones(len(own), 4), (images[own, :1] > 0).float(), own, 8)
    model = Narrow(rooms[team.rank])
    loop = Loop(model, training(out_of_memory="split", lr=0.1), CPU, team)
    loop.step(batch)
    return loop.parts, model.state_dict()


def attempt(team: Team, trial: Trial, folder: Path, kept: Path | None = None) -> _Run:
    """A trial with a checkpoint after every step; those that there are when the second one is over go to `kept` too."""

    def report(progress) -> None:
        if progress.step == 2 and kept and team.leads:
            shutil.copytree(folder / "checkpoints", kept / "checkpoints")

    code.digest = lambda: "the same"
    run = _Run(trial, folder, Places(Path("nowhere"), None, checkpoint_seconds=1e-9), report, team)
    run.execute()
    return run


# The tests.


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("rows", [[2, 2], [3, 1], [2, 0]])
def test_batch_norm_is_that_of_all_rows(rows, weighted, duo):
    expected, found = normalise(ALONE, rows, weighted), duo(normalise, rows, weighted)
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.allclose(found[name], expected[name], rtol=1e-12, atol=1e-12), name


@pytest.mark.parametrize(("size", "accumulate"), [(1, 1), (3, 1), (5, 2)])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_one_process(name, size, accumulate, duo):
    """Of a single row one process has none, and stands in."""
    expected, found = (run(gradients, name, size, accumulate) for run in (lambda f, *a: f(ALONE, *a), duo))
    assert found.keys() == expected.keys()
    largest = max(tensor.abs().max() for tensor in expected.values())
    for key in expected:
        assert torch.allclose(found[key].double(), expected[key].double(), rtol=1e-3, atol=1e-5 * largest), key


@pytest.mark.parametrize("name", ["lora", "full"])
def test_expressions_of_an_image_may_lie_in_several_processes(name, duo):
    arguments = (name, 5, 1, False, 3)
    expected, found = gradients(ALONE, *arguments), duo(gradients, *arguments)
    largest = max(tensor.abs().max() for tensor in expected.values())
    for key in expected:
        assert torch.allclose(found[key].double(), expected[key].double(), rtol=1e-3, atol=1e-5 * largest), key


def test_what_is_recomputed_is_normalised_by_the_rows_of_all_again(duo):
    expected, found = (duo(gradients, "detris", 5, 2, recompute) for recompute in (False, True))
    assert found.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(found[key], expected[key])


@pytest.mark.parametrize("name", ["statistics", "bridger", "lora"])
def test_an_evaluation_and_twenty_steps_are_those_of_one_process(name, duo):
    alone, expected = learn(ALONE, name)
    frame, losses = duo(learn, name)
    pd.testing.assert_frame_equal(frame, alone)  # to the last pixel
    assert len(losses) == len(expected) == 21
    difference = max(abs(one - other) for one, other in zip(losses, expected, strict=True))
    print(f"the losses differ by {difference:.1e}")
    assert difference < 1e-4


@pytest.mark.parametrize("rooms", [(4, 2), (2, 4), (1, 2)])
def test_if_memory_is_short_in_one_process_all_split_their_batch(rooms, duo):
    smallest = min(rooms)
    parts, found = duo(split, rooms)
    assert parts == 4 // smallest
    alone, expected = split(ALONE, (2 * smallest, 0))
    assert alone == parts
    for name in expected:
        assert torch.allclose(found[name], expected[name], atol=1e-5), name


TRIAL = Trial(
    dataset=DATASETS.resolve("scenes", {"num_train": 3, "num_eval": 2}),
    backbone=BACKBONES.resolve("tiny-clip-rn", {"norm_stats": "batch"}),
    method=METHODS.resolve("frozen", {}),
    head=HEADS.resolve("etris", {**TINY_HEAD, "dropout": 0.1}),
    train=training(epochs=2, batch_size=3),
    eval=Evaluation(select_on="val", every=2, splits=("testA",)),
    seed=3,
)


def test_a_trial_that_was_cut_off_goes_on_also_in_another_number_of_processes(tmp_path, duo):
    whole, kept, again, alone = (tmp_path / name for name in ("whole", "kept", "again", "alone"))
    whole.mkdir()
    first = duo(attempt, TRIAL, whole, kept)
    for folder in (again, alone):
        shutil.copytree(kept, folder)
    second, third = duo(attempt, TRIAL, again), attempt(ALONE, TRIAL, alone)
    for folder in (again, alone):
        assert "goes on from the checkpoint" in (folder / "log.txt").read_text()
    assert second.history == first.history and second.scores == first.scores
    for name in ("tuned.safetensors", "expressions.parquet"):
        assert (again / name).read_bytes() == (whole / name).read_bytes()
    # One process draws other numbers for dropout than two.
    assert third.history != first.history
    assert [one.loss for one in third.history] == pytest.approx([one.loss for one in first.history], rel=0.1)
