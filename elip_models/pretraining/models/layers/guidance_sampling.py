"""Sampling of the text that guides each image in a training step.

    own        g_i = t_i, the caption of image i
    negatives  g_i = t_j for a share of the images, j != i drawn by softmax(s f_i f_j^T)
    dropout    g_i = 0 for a share of the images, which means no text: the image alone selects

The paper uses `own`. Then the kept tokens of image i depend on t_i, so ITC can recognise the
caption by them: the caption leaks into the loss.
"""

import torch
from torch import Tensor

from elip_kernels.autocast import no_autocast
from elip_models.pretraining.models.layers.losses import hard_negatives


@torch.no_grad()
def replace_with_negatives(guides: Tensor, features: Tensor, scale: Tensor, share: float) -> Tensor:
    """Replace the guidance (B, D) of a share of the images by hard negatives of this rank's batch.

    `features` (B, E) are those of the texts; more similar texts are drawn more often. `scale` is
    the inverse temperature. A single image keeps its own guidance.
    """
    features = features.float()
    with no_autocast(features):
        others = hard_negatives(scale.float() * features @ features.T)
    return torch.where(_chosen(guides, share), guides[others], guides)


@torch.no_grad()
def drop_guidance(guides: Tensor, share: float) -> Tensor:
    """Set a share of the guidance (B, D) to zero, which means no text; without gradient."""
    return guides.masked_fill(_chosen(guides, share), 0.0)


def _chosen(guides: Tensor, share: float) -> Tensor:
    return torch.rand(len(guides), 1, device=guides.device) < share
