"""Losses of the models.

Contrastive loss (CLIP, ALBEF's ITC): mean of the cross entropies of image-to-text and text-to-image
similarities, s * f_image @ f_text.T, where pairs share a row.
"""

from contextlib import nullcontext
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def gather_with_gradient(features: Tensor) -> Tensor:
    """Features of all ranks, (world * B, E), in rank order; the gradient returns to every rank."""
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(features.contiguous()))


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    scale: Tensor,
    *,
    gather: Literal["local", "global"] = "local",
) -> Tensor:
    """Symmetric cross entropy over the batch.

    Args:
        image_features, text_features: (B, E), normalised; row i of both is one pair.
        scale: scalar, the inverse temperature.
        gather: 'local' takes negatives from this rank; 'global' from all ranks, so that the mean
            over ranks, and its gradient, equal one process with the whole batch.

    Returns:
        Scalar, fp32.
    """
    B, rank = image_features.shape[0], 0
    images, texts = image_features.float(), text_features.float()
    all_images, all_texts = images, texts
    if gather == "global" and dist.is_available() and dist.is_initialized():
        rank = dist.get_rank()
        all_images, all_texts = gather_with_gradient(images), gather_with_gradient(texts)
    labels = torch.arange(B, device=images.device) + rank * B
    device = images.device.type
    with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
        image_to_text = F.cross_entropy(scale.float() * images @ all_texts.T, labels)
        text_to_image = F.cross_entropy(scale.float() * texts @ all_images.T, labels)
    return (image_to_text + text_to_image) / 2
