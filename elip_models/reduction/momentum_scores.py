"""Rows of a dense tower that runs anyway, in place of a scorer: the momentum tower's, in training.

    x~ = fused CLS where a stage begins (Eq. 1);  it goes alone through the stage's blocks, and
    attends to the tokens as they are in each;  a = its attention row in the last one (Eq. 2)

No token sees x~, so the tower's output is that of a dense pass, and three rows and a token's way
through the blocks are all that it costs. With the weights of the online tower, where no token has
left yet and x~ is its own CLS token (fusion 1), a is the row of scorer `exact`; a text's share in
x~ moves the tokens of `exact`, and not these.
"""

import torch
from torch import Tensor

from elip_models.reduction.strategies.elip import ELIP, fused_cls
from elip_models.towers import Tower, in_forward

Rows = dict[int, Tensor]
"""A row (B, N) over the tokens of block 0, by the block that a stage begins with."""


@in_forward
@torch.no_grad()
def forward_with_scores(
    tower: Tower, images: Tensor, text_cls: Tensor | None, strategy: ELIP
) -> tuple[Tensor, Rows]:
    """Run the dense tower -> tokens (B, N, D) after its final norm, and the rows that select where
    `strategy` reduces, guided by text_cls (B, D).
    """
    stages = {stage.first: stage for stage in strategy.stages(tower.size)}
    rows, stage, cls = {}, None, None
    tokens = tower.embed(images)
    for i in range(tower.depth):
        if i in stages:
            stage, cls = stages[i], fused_cls(tower, tokens, text_cls, strategy)
        if stage is not None and i == stage.last:
            rows[stage.first] = tower.cls_attention(i, tokens, cls)
        elif stage is not None:
            cls = tower.cls_block(i, tokens, cls)
        tokens = tower.block(i, tokens)
    return tower.finish(tokens), rows
