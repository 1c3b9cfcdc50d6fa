"""How far the scorers choose alike: the share of what `exact` drops that another drops too."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from elip_models.reduction.scorers import SCORERS
from elip_models.reduction.step import Forward
from elip_models.reduction.strategies.elip import ELIP
from elip_models.towers import Tower, as_tower

OTHERS = tuple(name for name in SCORERS if name != "exact")


def scorer_agreement(
    model: nn.Module,
    images: Tensor,
    text_cls: Tensor | None,
    strategy: ELIP,
    scorers: Sequence[str | int] = OTHERS,
    *,
    rows: Mapping[int, Tensor] | None = None,
) -> dict[str | int, list[float]]:
    """Share of the tokens that `exact` drops which each scorer drops too, by stage.

    All scorers see the tokens that `exact` lets through. 'chance' is what a random choice shares.

    Args:
        model: an image model that a tower reads.
        images: (B, 3, H, W).
        text_cls: (B, D), the guidance in the tower's width, or None: vision only.
        strategy: whose scorer is not used.
        scorers: by default all that have a name.
        rows: of the momentum tower, see `forward_with_scores`, whose share is 'momentum'.
    """
    shares = agreement_by_image(model, images, text_cls, strategy, scorers, rows=rows)
    return {name: [each.mean().item() for each in stages] for name, stages in shares.items()}


@torch.no_grad()
def agreement_by_image(
    model: nn.Module,
    images: Tensor,
    text_cls: Tensor | None,
    strategy: ELIP,
    scorers: Sequence[str | int],
    *,
    rows: Mapping[int, Tensor] | None = None,
) -> dict[str | int, list[Tensor]]:
    """`scorer_agreement` of each image, (B,) a stage."""
    tower, others = as_tower(model), {name: replace(strategy, scorer=name) for name in scorers}
    forward = Forward(tower, replace(strategy, scorer="exact"), text_cls)
    names = (*scorers, *(["momentum"] if rows else []), "chance")
    shares: dict[str | int, list[Tensor]] = {name: [] for name in names}
    reader = Forward(tower, forward.strategy, text_cls, rows=rows)
    tokens = tower.embed(images)
    for i in range(tower.depth):
        entered, positions = tokens, forward.positions(i)
        tokens, info = forward.block(i, tokens)
        if info is None:
            continue
        keep = info.stage.keep
        reference = _dropped(tower, entered, info.attention, keep)
        found = {
            name: other.score(tower.at(positions), info.stage, entered, text_cls)
            for name, other in others.items()
        }
        if rows:
            found["momentum"] = reader.row(i)
        forward.infos[i] = reader.infos[i] = info
        for name, row in found.items():
            both = _dropped(tower, entered, row, keep) & reference
            shares[name].append(both.sum(1) / reference.sum(1))
        candidates = entered.shape[1] - tower.num_prefix_tokens
        dropped = reference.new_full(reference.shape[:1], candidates - keep, dtype=torch.float64)
        shares["chance"].append(dropped / candidates)
    return shares


def _dropped(tower: Tower, tokens: Tensor, attention: Tensor, keep: int) -> Tensor:
    """(B, N) bool: the tokens that this attention row drops."""
    _, info = tower.reduce(tokens, attention, keep, merge="none")
    dropped = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    dropped[:, : tower.num_prefix_tokens] = False
    return dropped.scatter_(1, info.kept, False)
