"""Ranks of images and texts by the similarities of their features.

Ties within 1e-6 count against the model: constant features have a recall of 0. Similarities are
computed for `CHUNK` queries at once: the whole matrix of 100,000 images with five captions each has
200 GB.
"""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from elip_kernels.autocast import no_autocast

TIE_TOLERANCE = 1e-6
"""Similarities closer than this are a tie, so that rounding errors do not decide."""
CHUNK = 1024


def similarities(queries: Tensor, candidates: Tensor) -> Tensor:
    """Return the products (Q, C) of features (Q, E) and (C, E), in fp32 also under autocast."""
    with no_autocast(queries):
        return queries @ candidates.T


def similarities_in_chunks(queries: Tensor, candidates: Tensor) -> Iterator[Tensor]:
    """Yield the similarities (.., C) of all queries, of `CHUNK` at once."""
    return (similarities(chunk, candidates) for chunk in queries.split(CHUNK))


def ranks_of(similarity: Tensor, relevant: Tensor) -> Tensor:
    """Return (Q,): how many candidates rank before the best relevant one, ties and NaN included.

    Both arguments are (Q, C); each row has at least one relevant candidate.
    """
    best = similarity.masked_fill(~relevant, -math.inf).amax(dim=1, keepdim=True)
    behind = similarity < best - TIE_TOLERANCE
    return (~behind & ~relevant).sum(dim=1)


def ranks_by_image(
    rows: Iterable[Tensor], query_images: Tensor, candidate_images: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the rank of the first correct candidate of each query, and its best one, (Q,) each.

    `rows` are the scores (.., C) of some queries at once, in order. A candidate is correct if its
    image is that of the query.
    """
    ranks, best, start = [], [], 0
    for scores in rows:
        own = query_images[start : start + len(scores)]
        ranks.append(ranks_of(scores, own[:, None] == candidate_images))
        best.append(scores.argmax(1))
        start += len(scores)
    return torch.cat(ranks), torch.cat(best)
