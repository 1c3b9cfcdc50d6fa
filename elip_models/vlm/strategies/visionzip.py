"""Keep the tokens with the most attention in the image tower, and means of the others."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from elip_kernels.ops.gather_ops import take_rows
from elip_models.validation import Share
from elip_models.vlm.strategies.base import ImageContext, ImageTokenStrategy


@dataclass(frozen=True)
class VisionZip(ImageTokenStrategy):
    """Keep dominant tokens, and merge the others into contextual ones (VisionZip, CVPR 2025).

    The dominant tokens receive the most attention from the class token in the layer of the image
    tower whose features the model takes; without a class token, from all patches. Of the others,
    tokens at equal distances become the mean of themselves and of those whose keys are most similar
    to theirs. The paper merges the tower's features and adds the mean; here the features behind the
    projector are averaged. Each run of image tokens must be the patches of one image.

    Attributes:
        contextual: the share of the kept tokens that are means.
        keep: as of `ImageTokenStrategy`.
    """

    name: ClassVar[str] = "visionzip"
    summary: ClassVar[str] = "keeps attended tokens, and means of the others"
    reads_tower: ClassVar[bool] = True

    contextual: Share = 0.15625

    def reduce(
        self, tokens: Tensor, count: int, context: ImageContext
    ) -> tuple[Tensor, Tensor | None]:
        """Return the positions of dominant and contextual tokens, and their features."""
        means = min(round(self.contextual * count), count - 1)
        dominant, targets, others, nearest = choose(
            context.attention, context.keys, count - means, means
        )
        features = take_rows(tokens, targets)
        if means:
            index = nearest.unsqueeze(-1).expand(-1, -1, tokens.shape[2])
            merged = take_rows(tokens, others)
            features = features.scatter_reduce(1, index, merged, "mean", include_self=True)
        dominant = dominant.clone()
        last = tokens.shape[1] - 1
        has_last = (dominant == last).any(1) | (targets == last).any(1)
        dominant[:, -1] = dominant[:, -1].where(has_last, last)
        features = torch.cat((take_rows(tokens, dominant), features), 1)
        return torch.cat((dominant, targets), 1), features

    def flops(self, length: int, width: int) -> int:
        """Return the additions of the means; the attention row of the tower is not counted."""
        return length * width


def choose(
    attention: Tensor, keys: Tensor, dominant: int, means: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Select dominant tokens and targets, and assign the others to targets.

    Args:
        attention: (R, n) the attention that each token receives.
        keys: (R, n, d).
        dominant: how many dominant tokens there are.
        means: how many targets there are, at most n - dominant.

    Returns:
        int64 positions in the image: (R, dominant) from the most attended, (R, means) targets,
        (R, n - dominant - means) others; and for each of these the index of its target.
    """
    best = attention.topk(dominant, dim=1).indices
    is_left = torch.ones_like(attention, dtype=torch.bool).scatter(1, best, False)
    left = is_left.nonzero()[:, 1].view(len(attention), -1)
    step = max(1, left.shape[1] // max(means, 1))
    is_target = torch.zeros(left.shape[1], dtype=torch.bool, device=left.device)
    is_target[: step * means : step] = True
    targets, others = left[:, is_target], left[:, ~is_target]
    unit = F.normalize(keys.float(), dim=-1)
    similarity = take_rows(unit, others) @ take_rows(unit, targets).mT
    nearest = similarity.argmax(2) if means else others.new_zeros(others.shape)
    return best, targets, others, nearest
