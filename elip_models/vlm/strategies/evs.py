"""Keep the tokens of a video that changed against the frame before."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from elip_models.vlm.strategies.base import ImageContext, ImageTokenStrategy
from elip_models.vlm.strategies.controls import Stride


@dataclass(frozen=True)
class EVS(ImageTokenStrategy):
    """Keep tokens of a video by their change over time (efficient video sampling).

    The change of a token is its cosine distance to the token of the same place in the frame before.
    The first frame stays, and then the tokens that changed most. If `keep` allows fewer tokens than
    a frame has, tokens of the first frame at equal distances stay. Images keep every token.

    Attributes:
        keep: the share of each clip's tokens, or their number, as of `ImageTokenStrategy`.
    """

    name: ClassVar[str] = "evs"
    summary: ClassVar[str] = "keeps tokens that changed against the frame before"
    joins_frames: ClassVar[bool] = True
    reads_frames: ClassVar[bool] = True

    def select(self, tokens: Tensor, count: int, context: ImageContext) -> Tensor:
        """Sort by the change; ties go to the token that comes first."""
        frame = min(context.frame or tokens.shape[1], tokens.shape[1])
        if count < frame:
            return Stride().select(tokens[:, :frame], count, context)
        return change(tokens, frame).sort(dim=1, descending=True, stable=True).indices[:, :count]

    def flops(self, length: int, width: int) -> int:
        """Return the norms of the tokens, and one product for each."""
        return 4 * length * width


def change(tokens: Tensor, frame: int) -> Tensor:
    """Return (R, n) fp32, the cosine distance of each token to that of the frame before.

    It is infinite in the first frame, and lowest for tokens behind the last whole frame, which
    mark the end of the clip.

    Args:
        tokens: (R, n, D), frame after frame.
        frame: the tokens of a frame, at most n.
    """
    R, n, _ = tokens.shape
    end = n // frame * frame
    unit = F.normalize(tokens[:, :end].float(), dim=-1)
    distance = 1 - (unit[:, frame:] * unit[:, :-frame]).sum(-1)
    return torch.cat(
        (
            distance.new_full((R, frame), torch.inf),
            distance,
            distance.new_full((R, n - end), -torch.inf),
        ),
        1,
    )
