"""The tokens of an image or a clip that stay: their placeholders and their features."""

import torch
from torch import Tensor

from elip_models.vlm.strategies.base import ImageContext, ImageTokenStrategy


def shorten_placeholders(
    ids: list[int], is_feature: list[bool], strategy: ImageTokenStrategy
) -> list[int]:
    """Return the ids that replace an image in a prompt, with fewer placeholders.

    Args:
        ids: of the whole image, text such as a start token included.
        is_feature: whether each id is the placeholder of a feature.
        strategy: how many features stay.
    """
    surplus = sum(is_feature) - strategy.count(sum(is_feature))
    kept: list[int] = []
    for token, is_placeholder in zip(reversed(ids), reversed(is_feature), strict=True):
        if is_placeholder and surplus:
            surplus -= 1
        else:
            kept.append(token)
    return kept[::-1]


def select_features(features: Tensor, width: int, strategy: ImageTokenStrategy) -> Tensor:
    """Return the features of an image that stay, in the order of the image.

    Args:
        features: (n, D). The first `width` columns are what the language model reads as embeddings,
            and what the strategy compares; others, as of DeepStack, go with their row.
        width: of the language model, at most D.
        strategy: one that reads nothing but the features.

    Returns:
        (k, D), with k = `strategy.count(n)`.
    """
    count = strategy.count(len(features))
    if count == len(features):
        return features
    positions, values = strategy.reduce(features[None, :, :width], count, ImageContext())
    positions, order = positions[0].sort()
    kept = features[positions]
    return kept if values is None else torch.cat((values[0][order], kept[:, width:]), 1)
