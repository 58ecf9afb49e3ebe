"""Pre-trains the tiny backbones on generated scenes: `python -m ris_bench.pretrain NAME`.

The CLIP pairs learn contrastively from captions, of whole images as CLIP does and of their objects as RegionCLIP does
(arXiv:2112.09106): with a world of 144 kinds of objects and minutes on a CPU, the second makes up for 400 million web
images. The DINO one never meets a word: it fills in masked patches. Their scenes come from seeds that no data set uses
(`scenes.PRETRAINING_SEED`).
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from open_clip.model import CLIP
from PIL import Image
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from ris_bench.backbones.clip import residual, transformer
from ris_bench.backbones.tiny import TEXT, tiny_dino_vit, tiny_rn, tiny_vit
from ris_bench.data.scenes import (
    AFTER,
    COLOURS,
    DIAMETERS,
    PLACES,
    PRETRAINING_SEED,
    RELATIONS,
    SHAPES,
    TEXTURES,
    WORDS,
    Object,
    Scene,
    draw_scene,
)
from ris_bench.head import cell_positions
from ris_bench.loading import Tokenizer
from ris_bench.transforms import Letterbox, normalise

WORD_LEN = 17
NUM_OBJECTS = (2, 6)
"""Fewest and most in a scene."""
GRID = 32
"""Side of the grid on which the place of an object is kept; every tiny map's side divides it."""
ANY = -1
"""An attribute that a description leaves open."""
ATTRIBUTES = {"size": list(DIAMETERS), "texture": list(TEXTURES), "colour": list(COLOURS), "shape": list(SHAPES)}
SIDES = {"x": ("left", "", "right"), "y": ("top", "", "bottom")}
CAPTIONS = 4
"""Different captions of every image and descriptions of every object."""


class Book(NamedTuple):
    """M images with their captions, and the N objects in them with their descriptions."""

    image_MSS3: Tensor
    caption_MKL: Tensor
    image_of_object_N: Tensor
    cover_NGG: Tensor
    """uint8, the share of each cell of the grid that the object covers."""
    centre_N2: Tensor
    """x and y, from 0 to 1."""
    facts_NA: Tensor
    """What is true of an object: attributes, then the third of the image that it lies in, across and down."""
    description_NKL: Tensor
    said_NKA: Tensor
    """What a description says of them, or ANY."""


def thirds(thing: Object) -> list[int]:
    return [min(2, int(3 * position)) for position in (thing.x, thing.y)]


def describe(thing: Object, rng: np.random.Generator) -> tuple[str, list[int]]:
    """A description of an object by itself, and what it says."""
    words, said, after = [], [], ""
    for attribute, values in ATTRIBUTES.items():
        value = getattr(thing, attribute)
        spoken = rng.random() < (0.85 if attribute in ("colour", "shape") else 0.5)
        said.append(values.index(value) if spoken else ANY)
        if spoken and attribute != "shape" and not after and rng.random() < 0.15:
            after = " " + str(rng.choice(AFTER.get(value, (f"that is {value}",))))
        elif spoken or attribute == "shape":
            value = value if spoken else ""
            words.append(str(rng.choice(WORDS.get(value, (value,)))))
    text, where = " ".join(words) + after, thirds(thing)
    sides = [SIDES[axis][third] for axis, third in zip("yx", reversed(where), strict=True)]
    place = " ".join(side for side in sides if side) or "middle"
    if rng.random() < 0.5:
        text = str(rng.choice(PLACES[place])).format(text)
    else:
        where = [ANY, ANY]
    return f"the {text}" if rng.random() < 0.4 else text, said + where


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """The whole image: its objects in random order, some of them in relation to the next."""
    things = [scene.objects[i] for i in rng.permutation(len(scene.objects))]
    parts = []
    while things:
        thing = things.pop()
        text, _ = describe(thing, rng)
        if things and rng.random() < 0.5:
            other = things.pop()
            across, down = thing.x - other.x, thing.y - other.y
            side = ("left" if across < 0 else "right") if abs(across) > abs(down) else ("top" if down < 0 else "bottom")
            text = str(rng.choice(RELATIONS[side])).format(text, describe(other, rng)[0])
        parts.append(text)
    return ", ".join(parts)


def write_book(num_scenes: int, image_size: int, seed: int) -> Book:
    letterbox = Letterbox(image_size)
    of_caption, of_object = (
        Tokenizer(TEXT["context_length"], TEXT["vocab_size"]),
        Tokenizer(WORD_LEN, TEXT["vocab_size"]),
    )
    images, captions, owners, covers, centres, facts, descriptions, said = [], [], [], [], [], [], [], []
    for i in range(num_scenes):
        rng = np.random.default_rng([PRETRAINING_SEED + seed, i])
        scene = draw_scene(rng, int(rng.integers(NUM_OBJECTS[0], NUM_OBJECTS[1] + 1)))
        images.append(torch.from_numpy(letterbox.image(Image.fromarray(scene.image))))
        captions += [caption(scene, rng) for _ in range(CAPTIONS)]
        for thing in scene.objects:
            owners.append(i)
            cover = torch.from_numpy(letterbox.mask(thing.mask.astype(np.uint8)))[None]
            covers.append((255 * F.adaptive_avg_pool2d(cover, GRID)[0]).byte())
            centres.append([thing.x, thing.y])
            facts.append([values.index(getattr(thing, name)) for name, values in ATTRIBUTES.items()] + thirds(thing))
            for text, says in (describe(thing, rng) for _ in range(CAPTIONS)):
                descriptions.append(text)
                said.append(says)
    return Book(
        torch.stack(images),
        of_caption(captions).unflatten(0, (-1, CAPTIONS)),
        torch.tensor(owners),
        torch.stack(covers),
        torch.tensor(centres),
        torch.tensor(facts),
        of_object(descriptions).unflatten(0, (-1, CAPTIONS)),
        torch.tensor(said).unflatten(0, (-1, CAPTIONS)),
    )


class Page(NamedTuple):
    """A batch of a book: image_of_object_N counts within it, and one text is drawn for each image and object."""

    image_B3HW: Tensor
    caption_BL: Tensor
    image_of_object_N: Tensor
    cover_NGG: Tensor
    centre_N2: Tensor
    facts_NA: Tensor
    description_NL: Tensor
    said_NA: Tensor


def pages(book: Book, batch_size: int, steps: int) -> Iterator[Page]:
    objects_of = [torch.empty(0, dtype=torch.long)] * len(book.image_MSS3)
    for image, positions in enumerate(book.image_of_object_N.bincount(minlength=len(objects_of)).tolist()):
        start = int(objects_of[image - 1][-1]) + 1 if image else 0
        objects_of[image] = torch.arange(start, start + positions)
    order: list[int] = []
    for _ in range(steps):
        if len(order) < batch_size:
            order = torch.randperm(len(objects_of)).tolist()
        chosen, order = order[:batch_size], order[batch_size:]
        objects = torch.cat([objects_of[image] for image in chosen])
        owner = torch.arange(len(chosen)).repeat_interleave(torch.tensor([len(objects_of[image]) for image in chosen]))
        which, told = torch.randint(CAPTIONS, (len(chosen),)), torch.randint(CAPTIONS, (len(objects),))
        yield Page(
            normalise(book.image_MSS3[chosen]),
            book.caption_MKL[chosen, which],
            owner,
            book.cover_NGG[objects].float(),
            book.centre_N2[objects],
            book.facts_NA[objects],
            book.description_NKL[objects, told],
            book.said_NKA[objects, told],
        )


class Captions(nn.Module):
    """A CLIP that is taught by captions of images and of regions, the latter on the maps that a RIS head sees."""

    def __init__(self, clip: CLIP, image_size: int) -> None:
        super().__init__()
        self.clip = clip
        convolutional = hasattr(clip.visual, "attnpool")
        self.towers = residual(clip, image_size, "batch") if convolutional else transformer(clip, image_size)
        self.towers.open()
        if convolutional:
            # Not part of CLIP: it meets the trained maps with the statistics that it will have afterwards.
            connect = self.towers.image.attnpool.connect.requires_grad_(False)
            self.towers.fixed_norms = [connect[1]]
        # Place is told apart from looks: what a region shows does not say where it is.
        self.to_text = nn.Linear(sum(self.towers.image.out_channels), self.towers.sentence_width)
        self.place_to_text = nn.Linear(4, self.towers.sentence_width)
        self.logit_scale = nn.Parameter(clip.logit_scale.detach().clone())

    def forward(self, page: Page) -> tuple[Tensor, float]:
        """The loss, and the share of descriptions that find an object which they fit among those of the batch."""
        image = self.towers.image
        x, maps = image.stem(page.image_B3HW), []
        for stage in image.stages:
            x = stage(x)
            maps.append(image.to_map(x))
        maps[-1] = image.head(x)
        _, caption_BD = self.run_text(page.caption_BL)
        same_image = torch.eye(len(page.image_B3HW), dtype=torch.bool)
        loss, _ = contrast(self.pooled(x), caption_BD, same_image, self.clip.logit_scale)
        regions = []
        for map_BCHW in maps:
            share_NHW = F.adaptive_avg_pool2d(page.cover_NGG, map_BCHW.shape[-2:])
            share_NHW = share_NHW / share_NHW.sum((1, 2), keepdim=True)
            regions.append(torch.einsum("nchw,nhw->nc", map_BCHW[page.image_of_object_N], share_NHW))
        _, description_ND = self.run_text(page.description_NL)
        fits_NN = ((page.said_NA[None] == ANY) | (page.said_NA[None] == page.facts_NA[:, None])).all(dim=2)
        region_ND = self.to_text(torch.cat(regions, 1))
        region_ND = region_ND + self.place_to_text(torch.cat([page.centre_N2, page.centre_N2.square()], 1))
        region_loss, score = contrast(region_ND, description_ND, fits_NN, self.logit_scale)
        return loss + region_loss, score

    def run_text(self, tokens_BL: Tensor) -> tuple[Tensor, Tensor]:
        state = self.towers.text.stem(tokens_BL)
        for stage in self.towers.text.stages:
            state = stage(state)
        return self.towers.text.head(state)

    def weights(self) -> dict[str, Tensor]:
        """The CLIP's state dict; its packed projections are trained in the towers."""
        for library, tower in ((self.clip.visual, self.towers.image), (self.clip, self.towers.text)):
            if hasattr(library, "transformer"):
                trained = (block.attention for stage in tower.stages for block in stage.blocks)
                for block, attention in zip(library.transformer.resblocks, trained, strict=True):
                    weight, bias = attention.packed()
                    block.attn.load_state_dict({"in_proj_weight": weight, "in_proj_bias": bias}, strict=False)
        return self.clip.state_dict()

    def pooled(self, x: Tensor) -> Tensor:
        """CLIP's own embedding of the whole image, from the state after the last stage."""
        visual = self.clip.visual
        return visual.attnpool(x) if hasattr(visual, "attnpool") else visual.ln_post(x[:, 0]) @ visual.proj


def contrast(image_ND: Tensor, text_ND: Tensor, fits_NN: Tensor, logit_scale: Tensor) -> tuple[Tensor, float]:
    """Symmetric contrastive loss in which an image may have several texts and a text several images (UniCL,
    arXiv:2204.03610), and how often a text finds an image that it fits. fits_NN is image by text."""
    logits_NN = (
        logit_scale.clamp(max=math.log(100)).exp() * F.normalize(image_ND, dim=1) @ F.normalize(text_ND, dim=1).T
    )
    found = fits_NN.T.gather(1, logits_NN.T.argmax(1, keepdim=True)).float().mean().item()
    loss = 0
    for logits, fits in ((logits_NN, fits_NN), (logits_NN.T, fits_NN.T)):
        loss = loss + (logits.logsumexp(1) - logits.masked_fill(~fits, -torch.inf).logsumexp(1)).mean() / 2
    return loss, found


class MaskedPatches(nn.Module):
    """Masked image modelling (SimMIM, arXiv:2111.09886): the pixels of hidden patches are told from the others."""

    def __init__(self, vit: VisionTransformer, hidden_share: float = 0.6) -> None:
        super().__init__()
        self.vit, self.hidden_share, self.patch = vit, hidden_share, vit.patch_embed.patch_size[0]
        self.mask_token = nn.Parameter(torch.zeros(vit.embed_dim))
        self.to_pixels = nn.Linear(vit.embed_dim, 3 * self.patch**2)
        with torch.no_grad():  # small random positions take most of a short training to tell places apart
            grid = vit.patch_embed.grid_size
            vit.pos_embed.copy_(cell_positions(vit.embed_dim, *grid, torch.float32, torch.device("cpu")))

    def forward(self, page: Page) -> tuple[Tensor, float]:
        """The mean squared error of the hidden patches, and the share of their variance that is explained."""
        target_BNP = F.unfold(page.image_B3HW, self.patch, stride=self.patch).mT
        x_BHWC = self.vit.patch_embed(page.image_B3HW)
        hidden_BHW = torch.rand(x_BHWC.shape[:3]) < self.hidden_share
        x_BNC = self.vit._pos_embed(torch.where(hidden_BHW[..., None], self.mask_token, x_BHWC))
        x_BNC = self.vit.norm(self.vit.blocks(self.vit.norm_pre(x_BNC)))[:, self.vit.num_prefix_tokens :]
        hidden_BN = hidden_BHW.flatten(1)
        error = F.mse_loss(self.to_pixels(x_BNC)[hidden_BN], target_BNP[hidden_BN])
        return error, 1 - (error / target_BNP[hidden_BN].var()).item()

    def weights(self) -> dict[str, Tensor]:
        return self.vit.state_dict()


def fit(teacher: nn.Module, book: Book, held_out: Book, steps: int, batch_size: int, lr: float) -> None:
    """AdamW with a linear warm-up and a cosine; prints the loss and the score on held-out scenes as it goes."""
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=lr, weight_decay=0.05, betas=(0.9, 0.98))
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * i / steps))
    )
    started = time.monotonic()
    for i, page in enumerate(pages(book, batch_size, steps)):
        teacher.train()
        loss, _ = teacher(page)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (i + 1) % max(1, steps // 20) == 0:
            teacher.eval()
            with torch.inference_mode():
                scores = [teacher(held)[1] for held in pages(held_out, batch_size, 4)]
            seconds = time.monotonic() - started
            print(f"step {i + 1}/{steps}  loss {loss:.3f}  held-out {np.mean(scores):.3f}  {seconds:.0f} s", flush=True)


RECIPES = {
    "tiny-clip-rn": {"steps": 2600, "num_scenes": 8000, "lr": 2e-3},
    "tiny-clip-vit": {"steps": 2000, "num_scenes": 8000, "lr": 1e-3},
    "tiny-dino": {"steps": 2000, "num_scenes": 4000, "lr": 1e-3},
}
"""What made the shipped weights: half an hour on one core for the longest."""
IMAGES = 48
"""In a batch."""


def pretrain(name: str, *, steps: int, num_scenes: int, lr: float, images: int = IMAGES) -> dict[str, Tensor]:
    """The state dict of a tiny backbone, rounded to the fp16 in which it is shipped."""
    torch.manual_seed(0)
    model, image_size = {
        "tiny-clip-rn": lambda: (tiny_rn(), 128),
        "tiny-clip-vit": lambda: (tiny_vit(), 64),
        "tiny-dino": lambda: (tiny_dino_vit(), 64),
    }[name]()
    teacher = Captions(model, image_size) if isinstance(model, CLIP) else MaskedPatches(model)
    book, held_out = write_book(num_scenes, image_size, seed=0), write_book(256, image_size, seed=1)
    fit(teacher, book, held_out, steps, images, lr)
    return {key: t.half() if t.is_floating_point() else t for key, t in teacher.weights().items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "backbones" / "tiny")
    args = parser.parse_args()
    # One thread, so that the same machine makes the same weights.
    torch.set_num_threads(1)
    state = pretrain(args.name, **RECIPES[args.name])
    args.out.mkdir(parents=True, exist_ok=True)
    save_file(state, args.out / f"{args.name}.safetensors")


if __name__ == "__main__":
    main()
