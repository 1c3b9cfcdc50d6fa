"""What a reduced model keeps of the dense model's features, image by image.

cosine and neighbours are those of `elip_models.analysis.feature_measures`.

self        1 where the dense feature nearest to an image's reduced feature is its own
patches     mean cosine of the image's patch features, after `unmerge`

text_to_image_r1, r5    share of the image's captions that rank it first among all images, or among
                        the first five
image_to_text_r1, r5    1 where one of the image's captions ranks first, or among the first five
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from elip_models.pretraining.tasks.features import ranks_of

KS = (1, 5)


def finds_itself(dense: Tensor, reduced: Tensor) -> Tensor:
    """Return (n,) ones where the nearest dense feature is that of the same image."""
    similarity = F.normalize(reduced, dim=1) @ F.normalize(dense, dim=1).T
    return (similarity.argmax(1) == torch.arange(len(dense))).float()


def patch_cosine(dense: Tensor, reduced: Tensor) -> Tensor:
    """Return (n,) mean cosines of patch features (n, N, D)."""
    return F.cosine_similarity(dense, reduced, dim=2).mean(1)


def retrieved(images: Tensor, texts: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the measures of retrieval, (n,) each, in the order of the images.

    Args:
        images: (n, D), normalised.
        texts: the features (captions, D) of each image's captions, normalised.
    """
    counts = [len(each) for each in texts]
    numbers = torch.arange(len(images))
    relevant = numbers[:, None] == numbers.repeat_interleave(torch.tensor(counts))
    similarity = images @ torch.cat(list(texts)).T
    by_image = ranks_of(similarity, relevant)
    by_text = ranks_of(similarity.T, relevant.T).split(counts)
    found = {
        f"text_to_image_r{k}": torch.stack([(ranks < k).double().mean() for ranks in by_text])
        for k in KS
    }
    return found | {f"image_to_text_r{k}": (by_image < k).double() for k in KS}
