"""Zhou et al., "Learning to Prompt for Vision-Language Models" (CoOp), IJCV 2022. arXiv:2109.01134."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ris_bench.backbones.base import Backbone, TextState
from ris_bench.errors import UserError
from ris_bench.methods.base import METHODS, Method, Serial


class Context(nn.Module):
    """The same M words in every sentence, after its start token."""

    def __init__(self, num_tokens: int, width: int) -> None:
        super().__init__()
        self.words_ME = nn.Parameter(nn.init.normal_(torch.empty(num_tokens, width), std=0.02))

    def forward(self, state: TextState) -> TextState:
        x_BLE, eot_B, pad_BL = state
        words_BME = self.words_ME.expand(len(x_BLE), -1, -1)
        pad_BM = pad_BL.new_zeros(words_BME.shape[:2])
        return TextState(after_start(x_BLE, words_BME), eot_B + pad_BM.shape[1], after_start(pad_BL, pad_BM))


def after_start(x: Tensor, new: Tensor) -> Tensor:
    return torch.cat([x[:, :1], new, x[:, 1:]], dim=1)


@METHODS("coop")
class CoOp(Method):
    """`[start] v_1 ... v_M [the expression] [end]`: one learned context for all expressions (section 3.2, equation 2).

    As KaiyangZhou/CoOp trainers/coop.py:60-177 with class token position "end" and no class-specific contexts:
    v ~ N(0, 0.02^2), spliced in before positions are added. (That code tokenises M placeholders and replaces their
    embeddings, which comes to the same.) The longer sentence must fit the text tower's positions.

    The paper uses the feature at the end token alone. The decoder here also attends to the words, and the learned ones
    are among them, since what ETRIS hands on as words is the whole sequence, start token included (model/segmenter.py).

    Of the paper's 4, 8 and 16 tokens (the code's default is 16, train.py:91-95) only 8 are consistent with the
    published 4.10K on CLIP R101: 4,096. That proves nothing about position or initialisation.
    """

    def __init__(self, backbone: Backbone, *, num_tokens: int = 8) -> None:
        super().__init__(backbone)
        if num_tokens < 1:
            raise UserError(f"method 'coop' has num_tokens {num_tokens}; it must be positive")
        for site in backbone.sites("prompt", ("text",)):
            site.wrap(partial(Serial, after=Context(num_tokens, site.width)))
