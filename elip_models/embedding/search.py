"""Search in a collection of embeddings, by a text or an image.

    found = search("embeddings", "a dog on a beach", top=10)
    found.hits[0].key, found.hits[0].similarity

Similarity is the cosine of the embeddings. The search compares all embeddings, unless `build_index`
has written an index beside them.
"""

import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from elip_models.embedding.collection import Collection, open_collection
from elip_models.embedding.encoder import Encoder
from elip_models.embedding.index import Index, Report, open_index
from elip_models.embedding.neighbours import nearest
from elip_models.embedding.query import (
    Query,
    check_weights,
    embed_query,
    query_encoder,
    query_of,
)
from elip_models.reduction.user_warnings import UnguidedWarning
from elip_models.validation import ConfigError, PositiveInt, check


@dataclass(frozen=True)
class Hit:
    """An image of the collection that is similar to a query.

    Attributes:
        rank: from 1.
        similarity: cosine of the embeddings of the image and the query.
        key: name of the image.
        path: its file, if it is a file of this machine.
    """

    rank: int
    similarity: float
    key: str
    path: str | None = None


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        folder: of the embeddings.
        query: the text, or the path of the image.
        images: the number of images that were searched.
        index: the kind of the index; None: all embeddings were compared.
        hits: the images, the most similar first.
    """

    folder: Path
    query: Query
    images: int
    index: str | None
    hits: tuple[Hit, ...]

    def as_json(self) -> dict[str, Any]:
        """Return all as plain data."""
        plain = asdict(self) | {"folder": str(self.folder), "query": self.query._asdict()}
        return plain | {"hits": [asdict(hit) for hit in self.hits]}


def search(
    folder: str | os.PathLike,
    query: str | Path,
    *,
    top: int = 10,
    model: str | Encoder | None = None,
    exact: bool = False,
    device: str | None = None,
    report: Report = lambda text: None,
) -> Found:
    """Find the images of a collection that are the most similar to a text or an image.

    Args:
        folder: of the embeddings, which `embed` wrote.
        query: a text, for an image-text model; or the path of an image.
        top: the number of images to find.
        model: where the model of the embeddings is now, or an `Encoder` of it. None: where the
            manifest says.
        exact: compare all embeddings, even if there is an index.
        device: where the model runs. None: the GPU if there is one.
        report: called with lines of text, such as why an index is not used.

    Raises:
        ConfigError: the folder, the query or the model is not what is expected. The message begins
            with the argument.
    """
    _check_top(top)
    collection = open_collection(folder)
    asked = query_of(query, collection)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnguidedWarning)  # `embed` gave it
        if isinstance(model, Encoder):
            check_weights(model, collection)
            encoder = model
        else:
            encoder = query_encoder(collection, model, device)
        vector = embed_query(asked, encoder)
    if top > len(collection):
        report(f"{collection.folder} has {len(collection)} images, fewer than {top}; all are shown")
    index = None if exact else open_index(collection, report)
    rows, cosines = _find(collection, vector, min(top, len(collection)), index)
    hits = [
        Hit(i + 1, float(cosine), key, image_file(collection.manifest, key))
        for i, (key, cosine) in enumerate(zip(collection.keys(rows), cosines, strict=True))
    ]
    kind = None if index is None else index.kind
    return Found(collection.folder, asked, len(collection), kind, tuple(hits))


def _find(
    collection: Collection, vector: np.ndarray, top: int, index: Index | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return rows and cosines (K,) of the images that are the most similar to a vector (1, D)."""
    if index is None:
        rows, cosines = nearest(collection, vector, top)
        return rows[0], cosines[0]
    rows, cosines = index.nearest(vector, top)
    found = rows[0] >= 0  # faiss fills up with -1
    return rows[0][found], cosines[0][found]


def _check_top(top: int) -> None:
    """Raise ConfigError unless `top` is an integer of at least 1."""
    try:
        check("top", top, PositiveInt)
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from error


def image_file(manifest: Mapping[str, Any], key: str) -> str | None:
    """Return the path of an image if it is a file of this machine, from its key; or else None."""
    source = manifest.get("source") or {}
    kind, location = source.get("kind"), str(source.get("location"))
    folders = {"folder": location, "list": os.path.dirname(location)}
    if kind not in folders:
        return None
    path = os.path.join(folders[kind], key)
    return path if os.path.isfile(path) else None
