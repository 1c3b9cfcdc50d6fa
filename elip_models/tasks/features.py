"""Features of images and of texts, each alone, and how they rank: what evaluation is made of.

Images are encoded without text and texts without image, so that none sees its own: a text that
guides its image tells by which tokens stay which image is its own.
"""

import math
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from elip_kernels.autocast import no_autocast
from elip_models.reduction.caching import UnguidedWarning

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from elip_models.data import EvaluationBatch
    from elip_models.models.base import PretrainedModel

TIE_TOLERANCE = 1e-6
"""Similarities closer than this are a tie: the rounding of a matrix product must not decide."""


@torch.no_grad()
def encode_images(
    model: "PretrainedModel", batches: Iterable["EvaluationBatch"]
) -> tuple[Tensor, list[tuple[str, ...]]]:
    """Returns features (num_images, E) fp32 and the captions of each image."""
    device = next(model.parameters()).device
    features, captions = [], []
    with warnings.catch_warnings(), isolated_rng(device):
        # Models warn where they get no text to reduce by; here that is meant.
        warnings.simplefilter("ignore", UnguidedWarning)
        for batch in batches:
            features.append(model.image_features(batch.images.to(device)).float())
            captions.extend(batch.captions)
    return torch.cat(features), captions


@torch.no_grad()
def encode_texts(
    model: "PretrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    texts: list[str],
    batch_size: int,
) -> Tensor:
    """Returns features (num_texts, E) fp32."""
    device = next(model.parameters()).device
    features = []
    with warnings.catch_warnings(), isolated_rng(device):
        # Models warn where they get no image to drop text tokens by; here that is meant.
        warnings.simplefilter("ignore", UnguidedWarning)
        for start in range(0, len(texts), batch_size):
            chunk = texts[start : start + batch_size]
            tokens = model.tokenise(tokenizer, chunk)
            tokens = {name: ids.to(device) for name, ids in tokens.items()}
            features.append(model.text_features(**tokens).float())
    return torch.cat(features)


def isolated_rng(device: torch.device) -> AbstractContextManager[None]:
    """Random numbers drawn inside, as a reduction may, leave the generators as they were."""
    if device.type == "cpu":
        return torch.random.fork_rng([])
    return torch.random.fork_rng([device], device_type=device.type)


def ranks_by_chunk(
    queries: Tensor, candidates: Tensor, query_ids: Tensor, ids: Tensor, chunk_size: int = 1024
) -> Tensor:
    """`ranks_of` queries (Q, E) against candidates (C, E), relevant where their ids (Q,), (C,) are
    equal, without the whole Q x C matrix at once -> (Q,).
    """
    chunks = zip(queries.split(chunk_size), query_ids.split(chunk_size), strict=True)
    with no_autocast(queries):
        return torch.cat(
            [ranks_of(query @ candidates.T, own[:, None] == ids) for query, own in chunks]
        )


def ranks_of(similarity: Tensor, relevant: Tensor) -> Tensor:
    """Candidates that rank before the best relevant one, a tie or a NaN counted as before.

    Args:
        similarity: (Q, C).
        relevant: (Q, C) bool, at least one a row.

    Returns:
        (Q,) int64; 0 means the best candidate is relevant.
    """
    best = similarity.masked_fill(~relevant, -math.inf).amax(dim=1, keepdim=True)
    behind = similarity < best - TIE_TOLERANCE
    return (~behind & ~relevant).sum(dim=1)
