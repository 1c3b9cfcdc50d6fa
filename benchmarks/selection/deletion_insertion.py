"""Deletion and insertion: how the matching score falls as patches leave, and rises as they come.

    score(S)     = cos(feature of the image of whose patches only S are shown, feature of the text)
    insertion(x) = score(the share x of the patches that a row of scores puts first)
    deletion(x)  = score(the share x that it puts last), the others deleted
    area         = the mean over x from 1/8 to 1, by trapezoids

A row that knows what the text names has a large area of insertion and a small one of deletion;
those of a random order are alike. Patches of equal score come in an order drawn.
Source: RISE (Petsiuk et al., BMVC 2018).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from elip_models.models.base import PretrainedModel
from elip_models.reduction.encode import run_tower
from elip_models.reduction.strategies import PatchDropout

POINTS = 8
"""Shares of the patches that are shown, evenly from 1/8 to 1."""


@dataclass(frozen=True)
class _Shown(PatchDropout):
    """The patches that a given row puts first enter block 0, the others are gone."""

    name: ClassVar[str] = "shown"

    def reduces(self, text_cls: Tensor | None, training: bool) -> bool:
        return True


@torch.no_grad()
def removal_areas(
    model: PretrainedModel, images: Tensor, text_features: Tensor, row: Tensor
) -> dict[str, Tensor]:
    """The areas under the curves of each image, and its score with all patches.

    Args:
        model: one that `ranks`, in eval mode.
        images: (B, 3, H, W), normalised.
        text_features: (B, E), normalised, the text that each image is matched with.
        row: (B, P), scores of the patches.

    Returns:
        'insertion', 'deletion', 'random' (drawn by torch's generator) and 'all_patches', (B,) each.
    """
    drawn = torch.rand_like(row)
    places = _places(row, drawn.argsort(1))
    rows = {"insertion": places, "deletion": -places, "random": drawn}
    whole = _score(model, images, text_features, row, row.shape[1])
    areas = {"all_patches": whole}
    for name, order in rows.items():
        counts = [max(1, round(row.shape[1] * i / POINTS)) for i in range(1, POINTS)]
        scores = [_score(model, images, text_features, order, count) for count in counts]
        curve = torch.stack([*scores, whole], dim=1)
        areas[name] = torch.trapezoid(curve, dx=1 / (POINTS - 1), dim=1)
    return areas


def _places(row: Tensor, drawn: Tensor) -> Tensor:
    """The place (B, P) of each patch by its score, from the last; of equal ones as `drawn`."""
    order = drawn.gather(1, row.gather(1, drawn).argsort(dim=1, stable=True))
    return order.argsort(dim=1).to(row.dtype)


def _score(
    model: PretrainedModel, images: Tensor, text_features: Tensor, row: Tensor, count: int
) -> Tensor:
    """The score of the `count` patches that the row puts first -> (B,)."""
    B, P = row.shape
    shown = _Shown(keep=min(1.0, (count + 0.5) / P))  # rounds down to `count`
    rows = {0: torch.cat([row.new_zeros(B, model.tower.num_prefix_tokens), row], dim=1)}
    tokens, _ = run_tower(model.tower, images, None, shown, cls_only=True, rows=rows)
    return (model.project_image(tokens) * text_features).sum(1)
