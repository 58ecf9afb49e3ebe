"""Pre-trains the tiny backbones on generated scenes: `python -m ris_bench.pretrain NAME`.

The CLIP pair learns as CLIP does, contrastively from images and captions of the whole image; the DINO one never meets a
word and fills in masked patches. Their scenes come from seeds that no data set uses (`scenes.PRETRAINING_SEED`).
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from open_clip.model import CLIP
from PIL import Image
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from ris_bench.backbones.tiny import TEXT, tiny_dino_vit, tiny_rn, tiny_vit
from ris_bench.data.loading import Tokenizer
from ris_bench.data.scenes import PRETRAINING_SEED, caption, draw_scene
from ris_bench.data.transforms import Letterbox, normalise

CAPTIONS = 4
"""Captions of every image."""


def picture_book(num_scenes: int, image_size: int, seed: int, max_objects: int) -> tuple[Tensor, Tensor]:
    """Letterboxed images (M, S, S, 3) uint8 and the tokens of their captions (M, CAPTIONS, L)."""
    tokenizer, letterbox = Tokenizer(TEXT["context_length"], TEXT["vocab_size"]), Letterbox(image_size)
    images, texts = [], []
    for i in range(num_scenes):
        rng = np.random.default_rng([PRETRAINING_SEED + seed, i])
        scene = draw_scene(rng, int(rng.integers(1, max_objects + 1)))
        images.append(torch.from_numpy(letterbox.image(Image.fromarray(scene.image))))
        texts += [caption(scene, rng) for _ in range(CAPTIONS)]
    return torch.stack(images), tokenizer(texts).unflatten(0, (num_scenes, CAPTIONS))


def contrastive_loss(clip: CLIP, image_B3HW: Tensor, tokens_BL: Tensor) -> tuple[Tensor, Tensor]:
    """CLIP's symmetric cross-entropy, and the share of images that find their caption among the batch's."""
    image_logits_BB, text_logits_BB = clip.get_logits(image_B3HW, tokens_BL)
    target_B = torch.arange(len(image_B3HW))
    loss = (F.cross_entropy(image_logits_BB, target_B) + F.cross_entropy(text_logits_BB, target_B)) / 2
    return loss, (image_logits_BB.argmax(1) == target_B).float().mean()


class MaskedPatches(nn.Module):
    """Masked image modelling (SimMIM, arXiv:2111.09886): the pixels of hidden patches are told from the others."""

    def __init__(self, vit: VisionTransformer, hidden_share: float = 0.6) -> None:
        super().__init__()
        self.vit, self.hidden_share, self.patch = vit, hidden_share, vit.patch_embed.patch_size[0]
        self.mask_token = nn.Parameter(torch.zeros(vit.embed_dim))
        self.to_pixels = nn.Linear(vit.embed_dim, 3 * self.patch**2)

    def forward(self, image_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """The mean squared error of the hidden patches, and the share of their variance that was explained."""
        target_BNP = F.unfold(image_B3HW, self.patch, stride=self.patch).mT
        spread = target_BNP.std(dim=2, keepdim=True) + 0.1
        target_BNP = (target_BNP - target_BNP.mean(dim=2, keepdim=True)) / spread + target_BNP.mean(dim=2, keepdim=True)
        x_BHWC = self.vit.patch_embed(image_B3HW)
        hidden_BHW = torch.rand(x_BHWC.shape[:3]) < self.hidden_share
        x_BNC = self.vit._pos_embed(torch.where(hidden_BHW[..., None], self.mask_token, x_BHWC))
        x_BNC = self.vit.norm(self.vit.blocks(self.vit.norm_pre(x_BNC)))[:, self.vit.num_prefix_tokens :]
        error = (self.to_pixels(x_BNC) - target_BNP)[hidden_BHW.flatten(1)].square().mean()
        return error, 1 - error.detach() / target_BNP.var()


def fit_model(
    model: nn.Module,
    step: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    book: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
    *,
    steps: int,
    batch_size: int,
    lr: float,
) -> None:
    """AdamW with a linear warm-up and a cosine; prints the loss and the held-out score as it goes."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05, betas=(0.9, 0.98))
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * i / steps))
    )
    started = time.monotonic()
    for i, (images, tokens) in enumerate(batches(book, batch_size, steps)):
        model.train()
        loss, _ = step(images, tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (i + 1) % max(1, steps // 20) == 0:
            model.eval()
            with torch.inference_mode():
                images, tokens = next(batches(held_out, len(held_out[0]), 1))
                _, score = step(images, tokens)
            seconds = time.monotonic() - started
            print(f"step {i + 1}/{steps}  loss {loss:.3f}  held-out {score:.3f}  {seconds:.0f} s", flush=True)


def batches(book: tuple[Tensor, Tensor], batch_size: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    images, tokens = book
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < batch_size:
            order = torch.randperm(len(images))
        chosen, order = order[:batch_size], order[batch_size:]
        which = torch.randint(CAPTIONS, (batch_size,))
        yield normalise(images[chosen]), tokens[chosen, which]


def pretrain(name: str, steps: int, num_scenes: int, batch_size: int, lr: float, seed: int) -> dict[str, Tensor]:
    """The state dict of a tiny backbone; floats are rounded to fp16, which is how they are shipped."""
    torch.manual_seed(seed)
    image_size, max_objects = (128, 3) if name == "tiny-clip-rn" else (64, 3) if name == "tiny-clip-vit" else (64, 6)
    book = picture_book(num_scenes, image_size, 0, max_objects)
    held_out = picture_book(256, image_size, 1, max_objects)
    if name == "tiny-dino":
        model = MaskedPatches(tiny_dino_vit())
        pretrained = model.vit
        step = lambda images, tokens: model(images)  # noqa: E731
    else:
        model = pretrained = tiny_rn() if name == "tiny-clip-rn" else tiny_vit()
        step = lambda images, tokens: contrastive_loss(model, images, tokens)  # noqa: E731
    fit_model(model, step, book, held_out, steps=steps, batch_size=batch_size, lr=lr)
    return {key: t.half() if t.is_floating_point() else t for key, t in pretrained.state_dict().items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=["tiny-clip-rn", "tiny-clip-vit", "tiny-dino"])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--scenes", type=int, default=20000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "backbones" / "tiny")
    args = parser.parse_args()
    state = pretrain(args.name, args.steps, args.scenes, args.batch_size, args.lr, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    save_file(state, args.out / f"{args.name}.safetensors")


if __name__ == "__main__":
    main()
