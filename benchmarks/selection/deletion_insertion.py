"""Deletion and insertion: the matching score as patches are removed or added in order of score.

    score(S)     = cos(feature of the image with only the patches S, feature of the text)
    insertion(x) = score(the share x of the patches with the highest scores)
    deletion(x)  = score(the share x of the patches with the lowest scores)
    area         = the mean over x from 1/8 to 1, by trapezoids

Scores that locate what the text names have a large area of insertion and a small area of deletion.
The two areas of a random order are similar. Patches of equal score are in random order. Source:
RISE (Petsiuk et al., BMVC 2018).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from elip_models.pretraining.models.base import PretrainedModel
from elip_models.reduction.encode import run_tower
from elip_models.reduction.strategies import PatchDropout

POINTS = 8
"""Number of shares of the patches, evenly spaced from 1/8 to 1."""


@dataclass(frozen=True)
class _SelectedPatches(PatchDropout):
    """A strategy that passes only the patches with the highest given scores to block 0."""

    name: ClassVar[str] = "selected_patches"

    def reduces(self, text_cls: Tensor | None, training: bool) -> bool:
        return True


@torch.no_grad()
def removal_areas(
    model: PretrainedModel, images: Tensor, text_features: Tensor, row: Tensor
) -> dict[str, Tensor]:
    """Return the areas under the curves of each image, and its score with all patches.

    Args:
        model: A model that `ranks`, in eval mode.
        images: (B, 3, H, W), normalised.
        text_features: (B, E), normalised, the text of each image.
        row: (B, P), scores of the patches.

    Returns:
        'insertion', 'deletion', 'random' (by torch's generator) and 'all_patches', (B,) each.
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
    """Return the rank (B, P) of each patch by its score, from the lowest; `drawn` breaks ties."""
    order = drawn.gather(1, row.gather(1, drawn).argsort(dim=1, stable=True))
    return order.argsort(dim=1).to(row.dtype)


def _score(
    model: PretrainedModel, images: Tensor, text_features: Tensor, row: Tensor, count: int
) -> Tensor:
    """Return the score (B,) of the `count` patches with the highest scores."""
    B, P = row.shape
    selected = _SelectedPatches(keep_ratio=min(1.0, (count + 0.5) / P))  # rounds down to `count`
    rows = {0: torch.cat([row.new_zeros(B, model.tower.num_prefix_tokens), row], dim=1)}
    tokens, _ = run_tower(model.tower, images, None, selected, cls_only=True, rows=rows)
    return (model.project_image(tokens) * text_features).sum(1)
