"""Several processes of a trial come to what one comes to, end together, and tell what went wrong in any of them."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import tiny_model
from torch import nn

from ris_bench import checkpoints, evaluation, parallel
from ris_bench.data.dataset import DATASETS
from ris_bench.data.loading import Batch, ReferentBatches, Tokenizer
from ris_bench.parallel import ALONE, Team
from ris_bench.records import Training
from ris_bench.training import Loop, train

CPU = torch.device("cpu")
MODELS = [
    ("tiny-clip-rn", "full", {"norm_stats": "batch"}),
    ("tiny-clip-rn", "bridger", {}),
    ("tiny-clip-vit", "lora", {}),
    ("tiny-dino", "detris", {}),
]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Scenes are generated once for all tests of this file, and other processes find them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RIS_BENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(checkpoints, "code", lambda: "the same")
        yield


@pytest.fixture(scope="module")
def duo(cache):
    """Two processes, for all tests that need no more."""
    with parallel.team(2, serve) as team:
        yield lambda function, *args: (team.told((function, args)), function(team, *args))[1]
        team.told()


def serve(team: Team) -> None:
    torch.set_num_threads(1)
    while task := team.told():
        function, args = task
        function(team, *args)


# What both processes do.


def normalise(team: Team, rows: list[int], weighted: bool) -> dict[str, torch.Tensor]:
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
    return found | gradients | {name: buffer.clone() for name, buffer in norm.named_buffers()}


def learn(
    team: Team, backbone: str, method: str, options: dict, changes: dict, epochs: int
) -> tuple[list[float], pd.DataFrame]:
    """The losses of a training, whose last batch is short, and what the model predicts then."""
    model = tiny_model(backbone, method, head={"dropout": 0.0}, **options).to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    dataset = DATASETS.build(DATASETS.resolve("scenes", {"num_train": 6, "num_eval": 8}))
    tokenizer = Tokenizer(dataset.word_len, model.backbone.vocab_size)
    given = {"epochs": epochs, "batch_size": 5, "lr": 1e-3, "milestones": (), "gamma": 0.1, "precision": "fp32"}
    training = Training(**{**given, "dice": 1.0, **changes})
    batches = ReferentBatches(
        dataset.read(Path("nowhere"), "train"), tokenizer, model.backbone.image_size, training.batch_size, 0, team=team
    )
    losses: list[float] = []
    for _ in train(Loop(model, training, CPU, team), batches, losses.append):
        pass
    frame = evaluation.evaluate(
        model,
        dataset.read(Path("nowhere"), "val"),
        tokenizer=tokenizer,
        threshold=0.35,
        others=evaluation.THRESHOLDS,
        batch_size=5,
        device=CPU,
        team=team,
    )
    return losses, frame


class Narrow(nn.Module):
    """Has no memory for more rows than its process is given room for; with what a step must put back."""

    def __init__(self, room: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.room, self.layer, self.norm = room, nn.Conv2d(3, 1, 1), nn.BatchNorm2d(3)
        self.known = lambda image: image

    def moving_statistics(self) -> dict[str, torch.Tensor]:
        return dict(self.norm.named_buffers())

    def forward(self, image, tokens):
        x = self.norm(image)
        if len(image) > self.room:
            raise MemoryError
        return self.layer(self.norm(x))


def split(team: Team, rooms: tuple[int, int]) -> tuple[int, list[torch.Tensor]]:
    """Micro-batches after a step of eight rows, and what the step came to."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(8, 3, 4, 4, generator=generator)
    own = torch.tensor(team.share(range(8)))
    rows = torch.arange(len(own))
    batch = Batch(image[own], rows, torch.ones(len(own), 4), (image[own, :1] > 0).float(), own, 8)
    model = Narrow(rooms[team.rank])
    given = {"epochs": 1, "batch_size": 8, "lr": 0.1, "milestones": (), "gamma": 0.1, "precision": "fp32"}
    loop = Loop(model, Training(**given, out_of_memory="split"), CPU, team)
    loop.step(batch)
    return loop.parts, list(model.state_dict().values())


# The tests.


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("rows", [[2, 2], [3, 1], [2, 0]])
def test_batch_norm_is_that_of_all_rows(rows, weighted, duo):
    expected, found = normalise(ALONE, rows, weighted), duo(normalise, rows, weighted)
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.allclose(found[name], expected[name], rtol=1e-12, atol=1e-12), name


@pytest.mark.parametrize(("backbone", "method", "options"), MODELS, ids=lambda value: str(value))
def test_twenty_steps_and_an_evaluation_are_those_of_one_process(backbone, method, options, duo):
    """13 referents: in the last batch of an epoch one process has two rows, and the other one."""
    expected, alone = learn(ALONE, backbone, method, options, {}, 7)
    losses, frame = duo(learn, backbone, method, options, {}, 7)
    assert len(losses) == len(expected) >= 20
    difference = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
    ours, theirs = evaluation.scores(frame), evaluation.scores(alone)
    print([f"{a-b:.0e}" for a, b in zip(losses, expected)], [round(a, 3) for a in expected])
    print(f"losses differ by {difference:.1e}, mIoU by {abs(ours.miou - theirs.miou):.1e}")
    assert difference < 1e-4
    assert expected[-1] < expected[0]
