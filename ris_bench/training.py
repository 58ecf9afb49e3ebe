"""One training loop, ignorant of methods: Adam on what is trainable, a step schedule, one epoch at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ris_bench.data.loading import ReferentBatches
from ris_bench.records import Epoch, Training


def reduced(precision: str, device: torch.device) -> torch.dtype | None:
    """The dtype of mixed precision, or None for fp32: a CPU computes in fp32 whatever is asked."""
    if device.type == "cpu":
        return None
    return {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]


def segmentation_loss(logits_B1hw: Tensor, mask_B1HW: Tensor, dice: float) -> Tensor:
    """Binary cross-entropy at the resolution of the logits, to which the mask is brought by nearest neighbour as in the
    released code (ETRIS model/segmenter.py:66-70), plus `dice` times a soft Dice loss per expression."""
    logits_B1hw = logits_B1hw.float()
    mask_B1hw = F.interpolate(mask_B1HW, logits_B1hw.shape[-2:], mode="nearest")
    loss = F.binary_cross_entropy_with_logits(logits_B1hw, mask_B1hw)
    if dice:
        probability_B1hw = logits_B1hw.sigmoid()
        overlap_B = (probability_B1hw * mask_B1hw).flatten(1).sum(1)
        size_B = (probability_B1hw + mask_B1hw).flatten(1).sum(1)
        loss = loss + dice * (1 - (2 * overlap_B + 1) / (size_B + 1)).mean()
    return loss


def train(
    model: nn.Module,
    batches: ReferentBatches,
    training: Training,
    device: torch.device,
    on_step: Callable[[int, int, float], None],
) -> Iterator[Epoch]:
    """Yield after every epoch, so that the caller can validate; `on_step(epoch, batch, loss)` after every step.

    Raises FloatingPointError as soon as a loss is not finite.
    """
    tuned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(tuned, lr=training.lr)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, training.milestones, training.gamma)
    dtype = reduced(training.precision, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    for epoch in range(training.epochs):
        model.train()
        total, seen = 0.0, 0
        for i, batch in enumerate(batches.epoch(epoch)):
            size = len(batch.index_B)
            # BatchNorm in the head needs two samples in each part of a batch that is split.
            parts = min(training.accumulate, max(1, size // 2))
            loss = 0.0
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                known = model.known(batch.image_U3HW.to(device, non_blocking=True))
            for row, tokens, mask in zip(
                *(
                    t.to(device, non_blocking=True).tensor_split(parts)
                    for t in (batch.row_B, batch.tokens_BL, batch.mask_B1HW)
                ),
                strict=True,
            ):
                with torch.autocast(device.type, dtype, enabled=dtype is not None):
                    logits = model(known[row], tokens)
                part = segmentation_loss(logits, mask, training.dice)
                part = part * (len(row) / size)
                scaler.scale(part).backward()
                loss += part.item()
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} at epoch {epoch + 1}, batch {i + 1} of {len(batches)}")
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            total, seen = total + loss * size, seen + size
            on_step(epoch, i, loss)
        yield Epoch(epoch=epoch + 1, loss=total / seen, lr=schedule.get_last_lr()[0])
        schedule.step()
