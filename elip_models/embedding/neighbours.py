"""Exact nearest neighbours by cosine in a collection that need not fit in memory.

Each chunk of embeddings is compared to all queries, and only the best rows so far are kept.
"""

from collections.abc import Sequence

import numpy as np

from elip_models.embedding.collection import Collection

QUERIES = 1024
"""Queries that are compared to a chunk at a time."""


def nearest(
    collection: Collection,
    queries: np.ndarray,
    top: int,
    *,
    among: np.ndarray | None = None,
    without: Sequence[int] | np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of the most similar images, and their cosines, the most similar first.

    Of equal cosines the lower row comes first.

    Args:
        collection: the embeddings.
        queries: normalised vectors (Q, D).
        top: rows for each query, K; at most the rows to choose from.
        among: whether each row of the collection may be chosen, (N,) bool. None: all.
        without: for each query a row that is not chosen, such as its own.

    Returns:
        rows: (Q, K) int64.
        cosines: (Q, K) fp32.
    """
    best = [(np.empty(0, np.int64), np.empty(0, np.float32)) for _ in queries]
    for first, vectors in collection.chunks():
        excluded = None if among is None else ~among[first : first + len(vectors)]
        for start in range(0, len(queries), QUERIES):
            cosines = queries[start : start + QUERIES] @ vectors.T
            if excluded is not None:
                cosines[:, excluded] = -np.inf
            for i, found in enumerate(cosines, start):
                if without is not None and 0 <= without[i] - first < len(found):
                    found[without[i] - first] = -np.inf
                best[i] = _merged(*best[i], first, found, top)
    rows, cosines = zip(*best, strict=True)
    return np.stack(rows), np.stack(cosines)


def _merged(
    rows: np.ndarray, cosines: np.ndarray, first: int, found: np.ndarray, top: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the best of the rows so far and of a chunk that begins at row `first`."""
    least = cosines[-1] if len(rows) == top else -np.inf
    better = np.flatnonzero(found > least)
    if not len(better):
        return rows, cosines
    rows = np.concatenate([rows, first + better])
    cosines = np.concatenate([cosines, found[better]])
    order = np.argsort(-cosines, kind="stable")[:top]
    return rows[order], cosines[order]
