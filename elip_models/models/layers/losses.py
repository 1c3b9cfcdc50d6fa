"""Losses of the models.

Contrastive loss (CLIP, ALBEF's ITC): mean of the cross entropies of image-to-text and text-to-image
similarities, s * f_image @ f_text.T, where pairs share a row.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

Gather = Literal["local", "global"]
"""Over the pairs of this rank, or of all ranks."""


def ranks_of(gather: Gather) -> int:
    """Count the ranks that `gather` goes over."""
    is_global = gather == "global" and dist.is_available() and dist.is_initialized()
    return dist.get_world_size() if is_global else 1


def rank_of(gather: Gather) -> int:
    """Number this rank among those that `gather` goes over."""
    return dist.get_rank() if ranks_of(gather) > 1 else 0


def all_gather(values: Tensor, gather: Gather = "global") -> Tensor:
    """Gather (B, ..) of all ranks in order -> (ranks * B, ..); the gradient returns to each
    rank."""
    if ranks_of(gather) == 1:
        return values
    from torch.distributed import _functional_collectives as collectives

    now, before = "all_gather_single_autograd", "all_gather_tensor_autograd"  # torch renamed it
    gather_values = getattr(collectives, now, None) or getattr(collectives, before)
    return gather_values(values.contiguous(), 0, dist.group.WORLD)


def labelled_count(labelled: Tensor, gather: Gather) -> Tensor:
    """Count the positions that a loss is the mean over: True in `labelled`, or their mean over
    ranks.

    At least as many as keep an empty sum at 0.
    """
    count, ranks = labelled.sum().float(), ranks_of(gather)
    if ranks > 1:
        dist.all_reduce(count)
        count = count / ranks
    return count.clamp_min(1 / ranks)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Turn autocast off inside, for products that have to be in the dtype of their inputs."""
    on_meta = device.type == "meta"  # which has no autocast
    return nullcontext() if on_meta else torch.autocast(device.type, enabled=False)


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    scale: Tensor,
    *,
    gather: Gather = "local",
) -> Tensor:
    """Compute the symmetric cross entropy over the batch.

    Args:
        image_features, text_features: (B, E), normalised; row i of both is one pair.
        scale: scalar, the inverse temperature.
        gather: 'local' takes negatives from this rank; 'global' from all ranks, so that the mean
            over ranks, and its gradient, equal one process with the whole batch.

    Returns:
        Scalar, fp32.
    """
    B = image_features.shape[0]
    images, texts = image_features.float(), text_features.float()
    all_images, all_texts = all_gather(images, gather), all_gather(texts, gather)
    labels = torch.arange(B, device=images.device) + rank_of(gather) * B
    with without_autocast(images.device):
        image_to_text = F.cross_entropy(scale.float() * images @ all_texts.T, labels)
        text_to_image = F.cross_entropy(scale.float() * texts @ all_images.T, labels)
    return (image_to_text + text_to_image) / 2
