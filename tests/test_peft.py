"""The tuners of peft on our sites: each trains what is its own, is counted and read back; LoRA there is LoRA here."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from conftest import TINY_HEAD, inputs
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors import safe_open

from ris_bench.backbones.base import BACKBONES
from ris_bench.backbones.weights import Weights
from ris_bench.errors import UserError
from ris_bench.experiment import load
from ris_bench.head import HEADS
from ris_bench.methods.base import METHODS
from ris_bench.model import RISModel, count_parameters
from ris_bench.records import Trial

ROOT = Path(__file__).parents[1]

# Options without which a tuner does not fit layers of 64 channels, or would need minutes.
TUNERS = {
    "adamss": {"r": 16, "num_subspaces": 2},
    "beft": {},
    "boft": {},
    "c3a": {"block_size": 16},
    "deft": {},
    "delora": {},
    "fourierft": {"n_frequency": 64},
    "frod": {"progressbar": False},
    "glora": {},
    "gralora": {"r": 8},
    "hira": {"r": 4},
    "hra": {},
    "ia3": {"feedforward_modules": []},
    "lily": {"r": 4},
    "loha": {},
    "lokr": {},
    "lora": {},
    "miss": {"r": 8},
    "oft": {"oft_block_size": 16},
    "osf": {},
    "peanut": {"r": 4},
    "psoft": {"r": 8},
    "pvera": {"r": 16},
    "randlora": {"r": 8},
    "road": {"group_size": 16},
    "shira": {"r": 4},
    "supertuning": {"sparsity": 0.9},
    "tinylora": {},
    "unilora": {},
    "vblora": {"vector_length": 16, "num_vectors": 32},
    "vera": {"r": 16},
    "waveft": {"n_frequency": 64},
}
CASES = [(name, options) for name, options in TUNERS.items()] + [
    ("lora", {"use_dora": True}),
    ("lora", {"init_lora_weights": "pissa"}),
    ("lora", {"bias": "lora_only", "rank_pattern": {"text.*v": 2}, "exclude_modules": ["text.layers.0.q"]}),
]
ON_CONVOLUTIONS = ["boft", "hira", "hra", "ia3", "loha", "lokr", "lora"]
NOT_IDENTITY = {"c3a", "fourierft", "unilora", "vblora"}
"""Of which peft draws the start at random."""


def built(backbone: str, method: str, *, seed: int = 0, weights: Weights | None = None, **options) -> RISModel:
    torch.manual_seed(0)
    body = BACKBONES[backbone](weights)
    torch.manual_seed(seed)
    injected = METHODS[method](body, **options)
    torch.manual_seed(0)
    return RISModel(body, injected, HEADS["etris"](body, **TINY_HEAD))


def model(tuner: str, config: dict, backbone: str = "tiny-clip-vit", **options) -> RISModel:
    if tuner.upper() not in PEFT_TYPE_TO_CONFIG_MAPPING:
        pytest.skip(f"this version of peft has no {tuner}")
    if tuner == "adamss":
        pytest.importorskip("sklearn")
    return built(backbone, "peft", weights=Weights(None), tuner=tuner, config=config, **options)


def train(tuned: RISModel, steps: int = 2) -> None:
    tuned.train()
    optimizer = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    for seed in range(steps):
        optimizer.zero_grad()
        tuned(*inputs(tuned, batch=2, seed=seed)).square().mean().backward()
        optimizer.step()
    tuned.eval()


def check(tuner: str, config: dict, tmp_path, **options) -> None:
    """What is promised of every method, of one configuration of peft."""
    backbone = options.setdefault("backbone", "tiny-clip-vit")
    tuned = model(tuner, config, **options)
    images, tokens = inputs(tuned, batch=2)
    if tuner not in NOT_IDENTITY:
        frozen = built(backbone, "frozen", weights=Weights(None)).eval()
        with torch.inference_mode():
            assert torch.allclose(tuned.eval()(images, tokens), frozen(images, tokens), atol=1e-5)

    before = copy.deepcopy(tuned.backbone.state_dict())
    train(tuned)
    now = tuned.backbone.state_dict(keep_vars=True)
    moved = {name for name in before if not torch.equal(before[name], now[name])}
    assert moved == {name for name, t in now.items() if t.requires_grad}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tuned.parameters() if p.requires_grad)

    tuned.save_tuned(tmp_path / "tuned.safetensors")
    other = model(tuner, config, seed=5, **options).eval()
    other.load_tuned(tmp_path / "tuned.safetensors")
    with torch.inference_mode():
        assert torch.equal(other(images, tokens), tuned(images, tokens))

    with torch.device("meta"):
        counted = built(tuner=tuner, config=config, method="peft", **options)
    assert counted.count() == tuned.count()
    assert tuned.count().tunable_backbone == sum(p.numel() for p in tuned.backbone.parameters() if p.requires_grad) > 0


@pytest.mark.parametrize("tuner, config", CASES, ids=lambda value: value if isinstance(value, str) else "-".join(value))
def test_every_tuner_trains_its_own_and_is_read_back(tuner, config, tmp_path):
    check(tuner, config, tmp_path)


@pytest.mark.parametrize("tuner", ON_CONVOLUTIONS)
def test_convolutions_too(tuner, tmp_path):
    check(tuner, TUNERS[tuner], tmp_path, backbone="tiny-clip-rn", targets=("q", "kernel"))


@pytest.mark.parametrize("backbone", ["tiny-clip-vit", "tiny-clip-rn"])
def test_its_lora_is_ours(backbone):
    """The same weights give the same logits and gradients."""
    targets = ("q", "v", "out")
    ours = built(backbone, "lora", targets=targets, text_rank=4, image_rank=4, scale=0.5)
    theirs = built(backbone, "peft", tuner="lora", targets=targets, config={"r": 4, "lora_alpha": 2})
    pairs = []
    for one, other in zip(*(places(m, targets) for m in (ours, theirs)), strict=True):
        delta = one.parametrizations.weight[0].delta
        pairs += [(delta.A, other.lora_A["default"].weight), (delta.B, other.lora_B["default"].weight)]
    assert {id(p) for p in theirs.backbone.parameters() if p.requires_grad} == {id(p) for _, p in pairs}
    assert ours.count() == theirs.count()
    generator = torch.Generator().manual_seed(0)
    for own, their in pairs:
        torch.nn.init.normal_(own, std=0.1, generator=generator)
        their.data.copy_(own)
    images, tokens = inputs(ours)
    logits = [m.eval()(images, tokens) for m in (ours, theirs)]
    assert torch.allclose(*logits, atol=1e-5)
    for each in logits:
        each.square().mean().backward()
    assert all((own.grad - their.grad).norm() <= 1e-5 * own.grad.norm() > 0 for own, their in pairs)


def places(tuned: RISModel, kinds: tuple[str, ...]) -> list[torch.nn.Module]:
    return [getattr(site.parent, site.attr) for kind in kinds for site in tuned.backbone.sites(kind)]


def test_projections_that_layers_share_are_saved_once(tmp_path):
    tuned = model("vera", {"r": 16})
    tuned.save_tuned(tmp_path / "tuned.safetensors")
    with safe_open(tmp_path / "tuned.safetensors", "pt") as file:
        projections = [name for name in file.keys() if "vera_A" in name or "vera_B" in name]  # noqa: SIM118
    assert len(projections) == 2
    # One number for each rank and for each channel that leaves a layer: 9 blocks, q and v, 64 wide.
    assert tuned.count().tunable_backbone == 18 * (16 + 64)
    assert not any("vera_A" in name for name in model("vera", {"r": 16, "save_projection": False}).tuned_tensors())


def test_what_is_excluded_stays_untouched():
    layers = {"exclude_modules": [f"image.layers.{depth}.{kind}" for depth in range(4) for kind in "qv"]}
    assert model("loha", layers).backbone.image.untouched == 3  # the first four of six blocks make two stages
    assert model("loha", {}, towers=("text",)).backbone.image.untouched == 5
    opened = model("lora", {"bias": "all"})
    assert all("attention.q" in name or "attention.v" in name for name in opened.tuned_tensors() if "head" not in name)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tuner": "lhoa"}, "option 'tuner' of method 'peft' is 'lhoa'; it may be .*boft.*loha"),
        ({"tuner": "prefix_tuning"}, "'prefix_tuning', which cannot be used here: it tunes a prompt; it may be"),
        ({"tuner": "adalora"}, "a step of its own in the training loop"),
        (
            {"config": {"rank": 8}},
            "option 'config' of method 'peft' for loha has no key 'rank'; its keys are .*r, alpha",
        ),
        ({"config": {"target_modules": ["q"]}}, "no key 'target_modules'"),
        ({"config": {"r": "8"}}, "loha: r is '8', which is not int"),
        ({"config": {"rank_dropout": True}}, "which is not float"),
        ({"tuner": "lora", "config": {"bias": "some"}}, "one of 'none', 'all', 'lora_only'"),
        ({"tuner": "lora", "config": {"init_lora_weights": "eva"}}, "wants data"),
        ({"tuner": "oft", "config": {"r": 4, "oft_block_size": 4}}, "refused by peft: .*oft_block_size"),
        ({"targets": ["ffn"]}, "option 'targets' of method 'peft' is .*give some of q, k, v"),
        ({"targets": []}, "option 'targets'"),
        ({"towers": ["text", "text"]}, "option 'towers'.*each once"),
        ({"config": 8}, "option 'config' of method 'peft' is 8, which is not a mapping or null"),
    ],
)
def test_what_peft_does_not_know_is_refused_before_anything_is_built(options, message):
    with pytest.raises(UserError, match=message) as error:
        METHODS.resolve("peft", options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "backbone, options, message",
    [
        ("tiny-clip-vit", {"targets": ("kernel",)}, "no 'kernel' site"),
        ("tiny-clip-rn", {"tuner": "oft", "targets": ("kernel",)}, "oft on convolutions"),
        ("tiny-clip-rn", {"tuner": "vera", "targets": ("kernel",)}, "vera refuses this: No layers types compatible"),
        ("tiny-clip-rn", {"tuner": "osf", "targets": ("kernel",)}, "osf tunes nothing at kernel"),
        ("tiny-clip-vit", {"tuner": "c3a"}, "c3a refuses this: .*block size"),
    ],
)
def test_what_does_not_fit_the_layers_is_refused(backbone, options, message):
    with pytest.raises(UserError, match=message) as error, torch.device("meta"):
        built(backbone, "peft", **options)
    assert "\n" not in str(error.value)


def test_an_experiment_names_a_tuner_and_its_mistakes_have_a_line(tmp_path):
    text = (ROOT / "experiments" / "quickstart.yaml").read_text(encoding="utf-8")
    path = tmp_path / "peft.yaml"
    method = (
        "{peft: {tuner: lokr, targets: [fc1, fc2], config: {r: 4, rank_pattern: {fc2: 2}, layers_to_transform: [0]}}}"
    )
    path.write_text(re.sub(r"\n  method: \S+\n", f"\n  method: {method}\n", text, count=1), encoding="utf-8")
    trial = next(iter(load(path, [f"method={method}"]).trials()))
    assert trial.method.options["config"]["layers_to_transform"] == (0,)
    assert Trial.from_dict(json.loads(json.dumps(asdict(trial)))) == trial
    assert count_parameters(trial).tunable_backbone > 0
    with pytest.raises(UserError, match=r"--set method=.*: option 'config' of method 'peft' for lokr has no key 'rr'"):
        load(path, [f"method={method.replace('r: 4', 'rr: 4')}"])


def test_the_examples_of_the_readme():
    text = re.search(r"```yaml\n( *- peft.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL).group(1)
    for entry in yaml.safe_load(text):
        METHODS.build(METHODS.resolve("peft", entry["peft"]), BACKBONES["tiny-clip-vit"](None))
