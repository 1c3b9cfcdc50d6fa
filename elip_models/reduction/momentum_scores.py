"""Scores from the momentum tower, which runs densely in training anyway, in place of a scorer.

    x~ = fused CLS at the start of a stage (Eq. 1), which passes the stage's blocks alone and
         attends to the tokens in each;  a = its attention row in the last one (Eq. 2)

No token attends to x~, so the tower's output is that of a dense pass. The cost is one row per
stage, and one token through the blocks. With equal weights, fusion=1 and no token dropped yet, a is
the row of scorer 'exact'. With a text the rows differ: in 'exact' x~ also changes other tokens.
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
    """Run the dense tower; return its tokens (B, N, D) and the rows by first block of a stage."""
    stages = {stage.first: stage for stage in strategy.stages(tower.size)}
    rows, stage, cls = {}, None, None
    tokens, tower = tower.embed(images), tower.resized_for(images)
    for i in range(tower.depth):
        if i in stages:
            stage, cls = stages[i], fused_cls(tower, tokens, text_cls, strategy)
        if stage is not None and i == stage.last:
            rows[stage.first] = tower.cls_attention(i, tokens, cls)
        elif stage is not None:
            cls = tower.cls_block(i, tokens, cls)
        tokens = tower.block(i, tokens)
    return tower.finish(tokens), rows
