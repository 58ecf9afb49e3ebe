"""Batches of images, tokens and masks: what comes next depends on (seed, epoch) alone, so training resumes anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from ris_bench.data.samples import Sample, draw, draw_keys, referents
from ris_bench.errors import UserError
from ris_bench.parallel import ALONE, Team
from ris_bench.pixels import Images, Masks, in_order


class Batch(NamedTuple):
    image_U3HW: Any
    """float32, normalised: the different images of the batch, or what is known of them."""
    row_B: Tensor
    """int64, which of them is the sample's."""
    tokens_BL: Tensor
    """int64."""
    mask_B1HW: Tensor | None
    """float32 in [0, 1] at the size of the input. None in evaluation, which measures on `Sample.mask()`."""
    index_B: Tensor
    """int64, positions in the list of samples."""
    size: int
    """Rows of the whole batch: where several processes share it, these are every so-manyth of them, as `Team.share` has
    it, or where there is none for this process its first row, which stands in."""


class Tokenizer:
    """CLIP's byte-pair encoding: start, pieces, end, zeros; a longer expression is cut, and the end stays last.

    A `vocab_size` below CLIP's 49,408 keeps the first `vocab_size - 514` merges (512 entries are single bytes, two are
    special). Start and end are always the two highest ids, so the end is the argmax of a row.
    """

    def __init__(self, word_len: int, vocab_size: int = 49408) -> None:
        self._bpe = bpe = SimpleTokenizer(context_length=word_len)
        if not 514 <= vocab_size <= bpe.vocab_size:
            raise UserError(f"a vocabulary of {vocab_size} is not possible; it has 514 to {bpe.vocab_size} entries")
        self.word_len, self.vocab_size = word_len, vocab_size
        bpe.clean_fn = partial(_cleaned, clean=bpe.clean_fn)
        special = [bpe.decoder[bpe.sot_token_id], bpe.decoder[bpe.eot_token_id]]
        pieces = [bpe.decoder[i] for i in range(vocab_size - 2)]
        bpe.encoder = {piece: i for i, piece in enumerate(pieces + special)}
        bpe.bpe_ranks = {pair: rank for pair, rank in bpe.bpe_ranks.items() if rank < vocab_size - 514}
        bpe.sot_token_id, bpe.eot_token_id = vocab_size - 2, vocab_size - 1

    def __call__(self, expressions: Sequence[str]) -> Tensor:
        """-> (B, word_len) int64. An empty expression is start, end."""
        return self._bpe(list(expressions))


def _cleaned(text: str, clean: Callable[[str], str]) -> str:
    """`clean(text)`, which mends encodings and reads HTML: where there is nothing of the kind, at a hundredth of its
    cost, which is most of the tokenizer's."""
    if text.isascii() and text.isprintable() and "&" not in text:
        return " ".join(text.split()).lower()
    return clean(text)


class ReferentBatches:
    """Training batches: each referent once per epoch, with one of its expressions.

    The expression is drawn from (seed, epoch, referent) and the order from (seed, epoch). The last batch may be
    smaller; if a single sample were left for it, that sample joins the batch before, since BatchNorm needs two.

    With `expressions_per_image` N > 1 the order is one of groups. In every epoch the referents of each image are
    shuffled and cut into groups of N, the last of which may be smaller; a group comes when it is the turn of its first
    referent, and the others follow. Nothing else changes: neither the expressions of an epoch nor the sizes of its
    batches, the end of which may part a group.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        tokenizer: Tokenizer,
        image_size: int,
        batch_size: int,
        seed: int,
        num_workers: int = 0,
        known: Callable[[Sequence[Sample]], Any] | None = None,
        team: Team = ALONE,
        expressions_per_image: int = 1,
        masks: Callable[[Sequence[Sample]], Tensor] | None = None,
    ) -> None:
        """`known` and `masks` give samples' images, or what stands in their place, and masks, if not from their files.

        Each process of the team has its share of every batch.
        """
        self._referents = referents(samples)
        keys = draw_keys(samples)
        self._keys = [keys[positions[0]] for positions in self._referents]
        images: dict[Path, int] = {}
        shown = (samples[positions[0]].image_path for positions in self._referents)
        self._image_R = np.array([images.setdefault(path, len(images)) for path in shown])
        self._together = expressions_per_image
        if self.num_referents < 2:
            raise UserError(f"training needs at least 2 referents and has {self.num_referents}; use another split")
        self._samples, self._batch_size, self._seed, self._num_workers = samples, batch_size, seed, num_workers
        self._images, self._masks, self._team = known or Images(image_size), masks or Masks(image_size), team
        self._tokens_NL = tokenizer([sample.expression for sample in samples])

    @property
    def num_referents(self) -> int:
        return len(self._referents)

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self._cut(list(range(self.num_referents))))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from the one with index `start`."""
        plan = self._plan(epoch)[start:]
        batches = _Batches(self._samples, self._tokens_NL, self._images, plan, self._masks, self._team)
        return in_order(batches, self._num_workers)

    def _plan(self, epoch: int) -> list[list[int]]:
        turn_R = self._draws("order", epoch)
        order_R = np.argsort(turn_R)
        if self._together > 1:
            by_image_R = np.lexsort((self._draws("group", epoch), self._image_R))
            _, start_I, number_I = np.unique(self._image_R[by_image_R], return_index=True, return_counts=True)
            place_R = np.arange(len(turn_R)) - start_I.repeat(number_I)  # in its image
            first_R = by_image_R[np.arange(len(turn_R)) - place_R % self._together]  # of its group
            order_R = by_image_R[np.lexsort((place_R, turn_R[first_R]))]
        chosen = []
        for referent in order_R.tolist():
            positions = self._referents[referent]
            sentence = 0
            if len(positions) > 1:
                sentence = draw("sentence", self._seed, epoch, *self._keys[referent]) % len(positions)
            chosen.append(positions[sentence])
        return self._cut(chosen)

    def _draws(self, what: str, epoch: int) -> np.ndarray:
        """(R,) uint64, for every referent."""
        draws = (draw(what, self._seed, epoch, *key) for key in self._keys)
        return np.fromiter(draws, np.uint64, len(self._keys))

    def _cut(self, order: list[int]) -> list[list[int]]:
        plan = _cut(order, self._batch_size)
        if len(plan) > 1 and len(plan[-1]) == 1:
            plan[-2:] = [plan[-2] + plan[-1]]
        return plan


def expression_batches(
    samples: Sequence[Sample],
    tokenizer: Tokenizer,
    image_size: int,
    batch_size: int,
    num_workers: int = 0,
    team: Team = ALONE,
    known: Callable[[Sequence[Sample]], Any] | None = None,
) -> Iterator[Batch]:
    """Evaluation batches: every sample once, without mask; the expressions of an image in one batch, if they fit.

    Each process of the team has some of the batches, and these are what they would be for one. `known` gives samples'
    images, or what stands in their place, if not from their files.
    """
    images: dict[Path, list[int]] = {}
    for position, sample in enumerate(samples):
        images.setdefault(sample.image_path, []).append(position)
    plan: list[list[int]] = []
    for part in (part for positions in images.values() for part in _cut(positions, batch_size)):
        if plan and len(plan[-1]) + len(part) <= batch_size:
            plan[-1] += part
        else:
            plan.append(part)
    tokens_NL = tokenizer([sample.expression for sample in samples])
    return in_order(_Batches(samples, tokens_NL, known or Images(image_size), team.share(plan)), num_workers)


class _Batches(torch.utils.data.Dataset):
    """Batch number -> Batch."""

    def __init__(
        self,
        samples: Sequence[Sample],
        tokens_NL: Tensor,
        images: Callable[[Sequence[Sample]], Any],
        plan: list[list[int]],
        masks: Callable[[Sequence[Sample]], Tensor] | None = None,
        team: Team = ALONE,
    ) -> None:
        self._samples, self._tokens_NL, self._images, self._plan, self._masks = samples, tokens_NL, images, plan, masks
        self._team = team

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, number: int) -> Batch:
        whole = self._plan[number]
        own = self._team.share(whole) or whole[:1]
        index_B = torch.tensor(own)
        samples = [self._samples[i] for i in own]
        first = {sample.image_path: sample for sample in reversed(samples)}
        row = {path: row for row, path in enumerate(first)}
        image_U3HW = self._images(list(first.values()))
        mask_B1HW = self._masks and self._masks(samples)
        row_B = torch.tensor([row[sample.image_path] for sample in samples])
        return Batch(image_U3HW, row_B, self._tokens_NL[index_B], mask_B1HW, index_B, len(whole))


def _cut(order: list[int], batch_size: int) -> list[list[int]]:
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
