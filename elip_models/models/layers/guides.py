"""Which text guides each image of a training step, where that is drawn.

    own        g_i = t_i, the caption that image i is contrasted with
    negatives  g_i = t_j for a share of the images, j by the softmax of s f_i f_j^T, j != i
    dropout    g_i = 0 for a share of them, which is no text: the image alone selects

The paper guides by `own`. But what stays of image i then says what t_i asked for, and ITC, which
asks which caption is that of image i, can read it off there: a leak.
"""

import torch
from torch import Tensor

from elip_kernels.autocast import no_autocast
from elip_models.models.layers.losses import hard_negatives


@torch.no_grad()
def with_negatives(guides: Tensor, features: Tensor, scale: Tensor, share: float) -> Tensor:
    """Let hard negatives guide a share of the images, drawn as those of ITM, from this rank's
    batch.

    Args:
        guides: (B, D), what guides otherwise.
        features: (B, E) of the texts, normalised: the more alike, the more often drawn.
        scale: scalar, the inverse temperature.
        share: how often; a single image keeps its own.

    Returns:
        (B, D), without gradient.
    """
    features = features.float()
    with no_autocast(features):
        others = hard_negatives(scale.float() * features @ features.T)
    return torch.where(_chosen(guides, share), guides[others], guides)


@torch.no_grad()
def with_dropout(guides: Tensor, share: float) -> Tensor:
    """Leave a share of the images without text: guides (B, D) with rows of zeros, without
    gradient.
    """
    return guides.masked_fill(_chosen(guides, share), 0.0)


def _chosen(guides: Tensor, share: float) -> Tensor:
    """(B, 1) bool, True for `share` of the rows, at random."""
    return torch.rand(len(guides), 1, device=guides.device) < share
