"""Neighbours kept: which share of the neighbours of dense embeddings the reduced ones have.

compare_neighbours("dense", "reduced").recall.mean
"""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from pyarrow import compute

from elip_models.embedding.collection import Collection, open_collection
from elip_models.embedding.index import sampled_rows
from elip_models.embedding.neighbours import nearest
from elip_models.intervals import Interval, bootstrap_interval
from elip_models.validation import ConfigError, PositiveInt, Seed, check


@dataclass(frozen=True)
class NeighbourRecall:
    """How many of the dense neighbours of an image are also its reduced neighbours.

    Attributes:
        dense: folder of the dense embeddings.
        reduced: folder of the reduced ones.
        recall: mean share of the nearest neighbours that both have, with its 95% bootstrap
            confidence interval over the queries.
        top: number of neighbours of a query.
        queries: number of images whose neighbours are compared.
        images: number of images in both, among which the neighbours are.
        only_dense: images of the dense folder that the reduced one has not.
        only_reduced: images of the reduced folder that the dense one has not.
        changed: images with the same key and other bytes, which are left out.
        same_weights: whether the models of both have the same weights.
    """

    dense: Path
    reduced: Path
    recall: Interval
    top: int
    queries: int
    images: int
    only_dense: int
    only_reduced: int
    changed: int
    same_weights: bool

    def as_json(self) -> dict[str, Any]:
        """Return all as plain data."""
        plain = asdict(self) | {"recall": self.recall._asdict()}
        return plain | {"dense": str(self.dense), "reduced": str(self.reduced)}


def compare_neighbours(
    dense: str | os.PathLike,
    reduced: str | os.PathLike,
    *,
    top: int = 10,
    queries: int = 1000,
    seed: int = 0,
) -> NeighbourRecall:
    """Compare the nearest neighbours of images in two collections of the same images.

    An image is not its own neighbour. Neighbours are found exactly, among the images of both.

    Args:
        dense: folder of the dense embeddings.
        reduced: folder of the reduced embeddings.
        top: number of neighbours of a query.
        queries: number of images whose neighbours are compared; all, if there are fewer.
        seed: of the random choice of the queries.

    Raises:
        ConfigError: a folder is not what is expected, or both have too few images in common.
    """
    try:
        for name, value, hint in (
            ("top", top, PositiveInt),
            ("queries", queries, PositiveInt),
            ("seed", seed, Seed),
        ):
            check(name, value, hint)
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from error
    first, second = open_collection(dense), open_collection(reduced)
    rows, changed = _common_rows(first, second)
    if len(rows) <= top:
        raise ConfigError(
            f"top: expected fewer than the {len(rows)} images that {first.folder} and "
            f"{second.folder} have in common, got {top}"
        )
    chosen = rows[sampled_rows(len(rows), queries, seed)]
    positions = [
        _neighbours(each, rows[:, i], chosen[:, i], top) for i, each in enumerate((first, second))
    ]
    shares = [len({*a} & {*b}) / top for a, b in zip(*positions, strict=True)]
    return NeighbourRecall(
        dense=first.folder,
        reduced=second.folder,
        recall=bootstrap_interval(shares, seed=seed),
        top=top,
        queries=len(chosen),
        images=len(rows),
        only_dense=len(first) - len(rows) - changed,
        only_reduced=len(second) - len(rows) - changed,
        changed=changed,
        same_weights=_weights(first) == _weights(second),
    )


def _weights(collection: Collection) -> str:
    return collection.manifest["model"]["weights_sha256"]


def _common_rows(first: Collection, second: Collection) -> tuple[np.ndarray, int]:
    """Return the rows (n, 2) of the same images in both, and how many have other bytes."""
    tables = [each.columns("key", "sha256") for each in (first, second)]
    other = compute.index_in(tables[0]["key"], value_set=tables[1]["key"].combine_chunks())
    rows = np.flatnonzero(compute.is_valid(other).to_numpy())
    both = np.stack([rows, other.drop_null().to_numpy()], axis=1)
    bytes_of = [
        table["sha256"].take(pyarrow.array(column))
        for table, column in zip(tables, both.T, strict=True)
    ]
    same = compute.equal(*bytes_of).to_numpy().astype(bool)
    return both[same], int((~same).sum())


def _neighbours(
    collection: Collection, rows: np.ndarray, chosen: np.ndarray, top: int
) -> list[list[int]]:
    """Return the neighbours of chosen rows among some rows, as positions in these."""
    order = np.argsort(chosen)
    among = np.zeros(len(collection), bool)
    among[rows] = True
    queries = np.empty((len(chosen), collection.dimension), np.float32)
    queries[order] = collection.take(chosen[order])
    found, _ = nearest(collection, queries, top, among=among, without=chosen)
    position = np.full(len(collection), -1)
    position[rows] = np.arange(len(rows))
    return position[found].tolist()
