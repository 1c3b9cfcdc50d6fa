"""What reduction changes in the features of images, measured image by image.

cosine      cosine of the reduced and the dense feature of the same image
neighbours  share of an image's ten nearest neighbours, by dense features among the same images,
            that are its ten nearest by reduced features too
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOURS = 10
OUTPUTS = ("image_embeds", "pooler_output", "logits", "last_hidden_state")
"""Of a transformers model; the first that is there is the feature."""


def output_feature(output: Any) -> Tensor:
    """Return what a model gives for each image, (B, D): its pooled output, or else its token 0."""
    if not isinstance(output, Tensor):
        named = (output.get(name) for name in OUTPUTS) if isinstance(output, Mapping) else output
        output = next(value for value in named if isinstance(value, Tensor))
    return output[:, 0] if output.dim() == 3 else output


def cosine(dense: Tensor, reduced: Tensor) -> Tensor:
    """Return (n,) cosines of features (n, D)."""
    return F.cosine_similarity(dense, reduced, dim=1)


def neighbours(dense: Tensor, reduced: Tensor) -> Tensor:
    """Return (n,) shares of the dense neighbours that stay, of features (n, D).

    Raises:
        ValueError: ten images or fewer, which have no ten neighbours.
    """
    return (_is_neighbour(dense) & _is_neighbour(reduced)).sum(1) / NEIGHBOURS


def _is_neighbour(features: Tensor) -> Tensor:
    """Return (n, n), whether j is one of the ten nearest neighbours of i."""
    if len(features) <= NEIGHBOURS:
        raise ValueError(
            f"images: expected more than {NEIGHBOURS}, whose neighbours are compared, got "
            f"{len(features)}; add images, or measure the cosine"
        )
    unit = F.normalize(features, dim=1)
    nearest = (unit @ unit.T).fill_diagonal_(-2).topk(NEIGHBOURS, dim=1).indices
    return torch.zeros(len(features), len(features), dtype=torch.bool).scatter_(1, nearest, True)
