"""What a reduced model keeps of the dense model's features, with intervals over images.

cosine      of the reduced feature with the dense feature of the same image
neighbours  the share of an image's ten nearest neighbours, by dense features among the same
            images, that are its ten nearest by reduced features too
self        1 where the dense feature nearest to an image's reduced feature is its own
patches     mean cosine of the image's patch features, after `unmerge`
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOURS = 10
DRAWS = 2000


class Interval(NamedTuple):
    """A mean over images and its 95% confidence interval, by the percentile bootstrap."""

    mean: float
    low: float
    high: float


def cosine(dense: Tensor, reduced: Tensor) -> Tensor:
    """Return (n,) cosines of features (n, D)."""
    return F.cosine_similarity(dense, reduced, dim=1)


def neighbours(dense: Tensor, reduced: Tensor) -> Tensor:
    """Return (n,) shares of the dense neighbours that stay, of features (n, D)."""
    is_dense, is_reduced = _is_neighbour(dense), _is_neighbour(reduced)
    return (is_dense & is_reduced).sum(1) / NEIGHBOURS


def finds_itself(dense: Tensor, reduced: Tensor) -> Tensor:
    """Return (n,) ones where the nearest dense feature is that of the same image."""
    similarity = F.normalize(reduced, dim=1) @ F.normalize(dense, dim=1).T
    return (similarity.argmax(1) == torch.arange(len(dense))).float()


def patch_cosine(dense: Tensor, reduced: Tensor) -> Tensor:
    """Return (n,) mean cosines of patch features (n, N, D)."""
    return F.cosine_similarity(dense, reduced, dim=2).mean(1)


def _is_neighbour(features: Tensor) -> Tensor:
    """Return (n, n), whether j is one of the ten nearest neighbours of i."""
    if len(features) <= NEIGHBOURS:
        raise ValueError(
            f"features: expected more than {NEIGHBOURS} images, got {len(features)}; "
            "the measure `neighbours` needs others to compare with"
        )
    unit = F.normalize(features, dim=1)
    nearest = (unit @ unit.T).fill_diagonal_(-2).topk(NEIGHBOURS, dim=1).indices
    return torch.zeros(len(features), len(features), dtype=torch.bool).scatter_(1, nearest, True)


def interval(values: Tensor, seed: int = 0) -> Interval:
    """Return mean and interval of values (n,), one an image."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(values), (DRAWS, len(values)), generator=generator)
    means = values.double()[drawn].mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(values.double().mean().item(), low, high)
