"""How far the scorers choose alike: the share of what `exact` drops that another drops too."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from elip_models.reduction.strategies.elip import Elip
from elip_models.reduction.strategy import Context
from elip_models.towers import Tower, as_tower


@torch.no_grad()
def scorer_agreement(
    model: nn.Module,
    images: Tensor,
    text_cls: Tensor | None,
    settings: Elip,
    scorers: tuple[str, ...] = ("official", "cls", "last"),
) -> dict[str, list[float]]:
    """Share of the tokens that `exact` drops which each scorer drops too, by stage.

    All scorers see the tokens that `exact` lets through. 'chance' is what a random choice shares.

    Args:
        model: an image model that a tower reads.
        images: (B, 3, H, W).
        text_cls: (B, D), the guidance in the tower's width, or None: vision only.
        settings: of the reduction; its scorer is not used.
    """
    tower, tokens = as_tower(model), as_tower(model).embed(images)
    stages = {stage.first: stage for stage in settings.schedule.stages(tower.num_patches)}
    shares: dict[str, list[float]] = {name: [] for name in (*scorers, "chance")}
    for i in range(tower.depth):
        if i in stages:
            dropped = {}
            for name in scorers:
                scorer = replace(settings, scorer=name)
                row = scorer.score(tower, stages[i], tokens, text_cls)
                dropped[name] = _dropped(tower, tokens, row, stages[i].keep)
            exact = replace(settings, scorer="exact")
            entered = tokens
            tokens, info = exact.step(tower, stages[i], tokens, Context(text_cls))
            reference = _dropped(tower, entered, info.attention, stages[i].keep)
            for name in scorers:
                shares[name].append(((dropped[name] & reference).sum() / reference.sum()).item())
            candidates = entered.shape[1] - tower.num_prefix_tokens
            shares["chance"].append((candidates - stages[i].keep) / candidates)
        tokens = tower.block(i, tokens)
    return shares


def _dropped(tower: Tower, tokens: Tensor, attention: Tensor, keep: int) -> Tensor:
    """(B, N) bool: the tokens that this attention row drops."""
    _, info = tower.reduce(tokens, attention, keep, merge=False)
    dropped = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    dropped[:, : tower.num_prefix_tokens] = False
    return dropped.scatter_(1, info.kept, False)
