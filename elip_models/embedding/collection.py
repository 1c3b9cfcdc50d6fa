"""The embeddings of a finished run, read shard by shard, each after its checksum is compared.

    collection = open_collection("embeddings")
    cosines, rows = collection.search(vectors, top=10)      # faiss compares all embeddings

The rows of all shards count from 0. docs/collections.md describes the files.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from pyarrow import parquet

from elip_models.embedding.output import IMAGES, MANIFEST, read_manifest
from elip_models.validation import ConfigError, require_extra

with require_extra("elip search"):
    import faiss


@dataclass(frozen=True)
class Collection:
    """The embeddings of a collection of images.

    Attributes:
        folder: where they are.
        manifest: what was embedded, and how.
        shards: the descriptions of the files of images in the manifest, in the order of the rows.
    """

    folder: Path
    manifest: dict[str, Any]
    shards: Sequence[dict[str, Any]]

    def __len__(self) -> int:
        return sum(shard["rows"] for shard in self.shards)

    @property
    def dimension(self) -> int:
        """The width of an embedding."""
        return self.manifest["model"]["dimension"]

    def tables(
        self, *columns: str, rows: Sequence[int] | None = None
    ) -> Iterator[tuple[int, pyarrow.Table]]:
        """Yield the first row and columns of each shard, or of those that have some of the rows.

        Raises:
            ConfigError: a shard is not as it was written.
        """
        ends = accumulate(shard["rows"] for shard in self.shards)
        for shard, end in zip(self.shards, ends, strict=True):
            first, path = end - shard["rows"], self.folder / shard["file"]
            if rows is not None and not any(first <= row < end for row in rows):
                continue
            content = path.read_bytes() if path.is_file() else b""
            if hashlib.sha256(content).hexdigest() != shard["sha256"]:
                raise ConfigError(
                    f"folder: {path} is not as it was written: its SHA-256 differs from that in "
                    f"{MANIFEST}; the same `elip embed` command writes it again"
                )
            yield first, parquet.read_table(pyarrow.BufferReader(content), columns=list(columns))

    def vectors(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the first row and the embeddings (n, D) of each shard, normalised, in fp32."""
        for first, table in self.tables("embedding"):
            flat = table["embedding"].combine_chunks().flatten().to_numpy()
            yield first, unit(flat.reshape(-1, self.dimension))

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Return the embeddings (n, D) of n rows, normalised, in fp32."""
        chosen = np.empty((len(rows), self.dimension), np.float32)
        for first, vectors in self.vectors():
            here = (rows >= first) & (rows < first + len(vectors))
            chosen[here] = vectors[rows[here] - first]
        return chosen

    def keys(self, rows: Sequence[int]) -> list[str]:
        """Return the keys of some rows, in any order; only their shards are read."""
        keys: dict[int, str] = {}
        for first, table in self.tables("key", rows=rows):
            here = [row for row in rows if first <= row < first + len(table)]
            keys |= {row: table["key"][row - first].as_py() for row in here}
        return [keys[row] for row in rows]

    def search(self, queries: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the cosines of the `top` most similar images, and their rows, (Q, K) each.

        The queries are normalised vectors (Q, D).
        """
        heap = faiss.ResultHeap(len(queries), top, keep_max=True)
        for first, vectors in self.vectors():
            count = min(top, len(vectors))
            if count:
                cosines, best = faiss.knn(queries, vectors, count, faiss.METRIC_INNER_PRODUCT)
                heap.add_result(cosines, best + first)
        heap.finalize()
        return heap.D, heap.I


def unit(vectors: np.ndarray) -> np.ndarray:
    """Return a copy of vectors (n, D) in fp32, divided by their norms; zeros stay zeros."""
    vectors = np.array(vectors, np.float32, order="C")
    faiss.normalize_L2(vectors)
    return vectors


def open_collection(folder: str | os.PathLike) -> Collection:
    """Open the folder of a finished run of `embed`; no embedding is read.

    Raises:
        ConfigError: it is another folder, the run has not finished, or it embedded no image.
    """
    path = Path(folder)
    if not (path / MANIFEST).is_file():
        raise ConfigError(
            f"folder: expected a folder of embeddings, which `elip embed` writes, got {path} "
            f"without a {MANIFEST}"
        )
    try:
        manifest = read_manifest(path)
        complete = manifest["complete"]
        files = manifest["files"] if complete else []
        shards = [file for file in files if file["file"].startswith(f"{IMAGES}/")]
        collection = Collection(path, manifest, shards)
        images = len(collection), collection.dimension
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"folder: expected what `elip embed` writes: {error!s:.300}") from error
    if not complete:
        raise ConfigError(
            f"folder: expected a finished run, got one that has not finished in {path}; the same "
            "`elip embed` command continues it"
        )
    if not all(images):
        raise ConfigError(f"folder: expected at least one embedding, got none in {path}")
    return collection
