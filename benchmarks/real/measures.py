"""What a reduced model keeps of the dense model's features, image by image.

cosine and neighbours are those of `elip_models.analysis.feature_measures`.

self        1 where the dense feature nearest to an image's reduced feature is its own
patches     mean cosine of the image's patch features, after `unmerge`
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def finds_itself(dense: Tensor, reduced: Tensor) -> Tensor:
    """Return (n,) ones where the nearest dense feature is that of the same image."""
    similarity = F.normalize(reduced, dim=1) @ F.normalize(dense, dim=1).T
    return (similarity.argmax(1) == torch.arange(len(dense))).float()


def patch_cosine(dense: Tensor, reduced: Tensor) -> Tensor:
    """Return (n,) mean cosines of patch features (n, N, D)."""
    return F.cosine_similarity(dense, reduced, dim=2).mean(1)
