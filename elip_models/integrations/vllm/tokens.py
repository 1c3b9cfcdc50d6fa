"""The tokens of an image or a clip that stay: their placeholders and their features."""

import torch
from torch import Tensor

from elip_models.vlm.strategies.base import ImageContext, ImageTokenStrategy
from elip_models.vlm.strategies.controls import RandomTokens


def shorten_placeholders(ids: list[int], is_feature: list[bool], count: int) -> list[int]:
    """Return the ids that replace an image in a prompt, with fewer placeholders.

    Args:
        ids: of the whole image, text such as a start token included.
        is_feature: whether each id is the placeholder of a feature.
        count: how many features stay.
    """
    surplus = sum(is_feature) - count
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
    context = context_of(features, strategy)
    positions, values = strategy.reduce(features[None, :, :width], count, context)
    positions, order = positions[0].sort()
    kept = features[positions]
    return kept if values is None else torch.cat((values[0][order], kept[:, width:]), 1)


def context_of(features: Tensor, strategy: ImageTokenStrategy) -> ImageContext:
    """Return the context of an image with features (n, D).

    Random numbers follow from the features, which the ranks of tensor parallelism share. The
    generator of the device would differ between ranks that have drawn other numbers before.
    """
    if not isinstance(strategy, RandomTokens):
        return ImageContext()
    seed = int(features.double().sum().view(torch.int64))
    return ImageContext(generator=torch.Generator(features.device).manual_seed(seed))
