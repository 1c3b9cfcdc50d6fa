"""Agreement of the scorers: how many of the tokens that `exact` drops another scorer drops too."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from elip_models.engine.forward_state import ForwardState
from elip_models.strategies.elip import ELIP
from elip_models.strategies.scorers import SCORERS
from elip_models.towers import Tower, as_tower

OTHERS = tuple(name for name in SCORERS if name != "exact")


@torch.no_grad()
def scorer_agreement(
    model: nn.Module,
    images: Tensor,
    text_cls: Tensor | None,
    strategy: ELIP,
    scorers: Sequence[str | int] = OTHERS,
) -> dict[str | int, list[float]]:
    """Return, by stage, the share of tokens dropped by `exact` that each scorer drops too.

    All scorers are applied to the tokens that `exact` keeps. 'chance' is the share of a random
    choice. The images are (B, 3, H, W), `text_cls` is the guidance (B, D) or None: vision only. The
    strategy's own scorer is not used.
    """
    tower = as_tower(model).resized_for(images)
    others = {name: replace(strategy, scorer=name) for name in scorers}
    forward = ForwardState(tower, replace(strategy, scorer="exact"), text_cls)
    shares: dict[str | int, list[float]] = {name: [] for name in (*scorers, "chance")}
    tokens = tower.embed(images)
    for i in range(tower.depth):
        entered, positions = tokens, forward.positions(i)
        tokens, info = forward.run_block(i, tokens)
        if info is None:
            continue
        keep = info.stage.keep
        reference = _dropped(tower, entered, info.attention, keep)
        scores = {
            name: other.score(tower.with_positions(positions), info.stage, entered, text_cls)
            for name, other in others.items()
        }
        forward.add(i, info)
        for name, row in scores.items():
            both = _dropped(tower, entered, row, keep) & reference
            shares[name].append((both.sum(1) / reference.sum(1)).mean().item())
        candidates = entered.shape[1] - tower.num_prefix_tokens
        shares["chance"].append((candidates - keep) / candidates)
    return shares


def _dropped(tower: Tower, tokens: Tensor, attention: Tensor, keep: int) -> Tensor:
    """Return (B, N) bool: the tokens that are dropped with this attention row."""
    _, info = tower.reduce(tokens, attention, keep, merge="none")
    dropped = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    dropped[:, : tower.num_prefix_tokens] = False
    return dropped.scatter_(1, info.kept, False)
