"""The embeddings of a finished run, read in pieces.

    collection = open_collection("embeddings")
    for first, vectors in collection.chunks():      # at most ROWS at a time
        ...

The rows of all shards count from 0. docs/embed.md describes the files.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from pyarrow import parquet

from elip_models.embedding.output import FORMAT, IMAGES, MANIFEST
from elip_models.saving.files import read_object
from elip_models.validation import ConfigError, Count, PositiveInt, check, shortened

ROWS = 4096
"""Embeddings in memory at a time."""
NAME = re.compile(rf"{IMAGES}/shard-\d+\.parquet")


@dataclass(frozen=True)
class Shard:
    """One file of a collection: its path, the row of its first image, and its number of rows."""

    path: Path
    first: int
    rows: int


@dataclass(frozen=True)
class Collection:
    """The embeddings of a collection of images.

    Attributes:
        folder: where they are.
        manifest: what was embedded, and how.
        manifest_sha256: of the file of the manifest, which has the checksums of all shards.
        shards: the files, in the order of the rows.
    """

    folder: Path
    manifest: dict[str, Any]
    manifest_sha256: str
    shards: tuple[Shard, ...]

    def __len__(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def dimension(self) -> int:
        """The width of an embedding."""
        return self.manifest["model"]["dimension"]

    def chunks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the first row and the embeddings (n, D) of each chunk, normalised, in fp32.

        Raises:
            ConfigError: a shard is damaged, has embeddings of another width, or NaN or infinity.
        """
        for shard in self.shards:
            first = shard.first
            for batch in _batches(shard, ["embedding"]):
                yield first, self._unit_vectors(batch.column(0), shard, first - shard.first)
                first += len(batch)

    def _unit_vectors(self, column: pyarrow.Array, shard: Shard, row: int) -> np.ndarray:
        kind, wanted = column.type, f"lists of {self.dimension} numbers"
        is_list = pyarrow.types.is_fixed_size_list(kind)
        if not is_list or not pyarrow.types.is_floating(kind.value_type):
            raise _damaged(shard, f"expected {wanted} in the column embedding, got {kind}")
        if kind.list_size != self.dimension:
            raise _damaged(shard, f"expected {wanted}, as in {MANIFEST}, got {kind.list_size}")
        if column.null_count or column.flatten().null_count:
            raise _damaged(shard, f"expected {wanted} in each row, got none in some of them")
        vectors = column.flatten().to_numpy().reshape(-1, self.dimension)
        found = unit(vectors.astype(np.float32, copy=False))
        finite = np.isfinite(found).all(axis=1)
        if not finite.all():
            at = row + int(finite.argmin())
            raise _damaged(shard, f"expected finite embeddings, got NaN or infinity in row {at}")
        return found

    def take(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the embeddings (n, D) of n ascending rows, normalised, in fp32."""
        rows = np.asarray(rows)
        found = np.empty((len(rows), self.dimension), np.float32)
        for first, vectors in self.chunks():
            start, stop = np.searchsorted(rows, [first, first + len(vectors)])
            found[start:stop] = vectors[rows[start:stop] - first]
        return found

    def keys(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """Return the keys of some rows, in any order; only their shards are read."""
        found: dict[int, str] = {}
        for shard in self.shards:
            wanted = {int(row) for row in rows if 0 <= row - shard.first < shard.rows}
            first = shard.first
            for batch in _batches(shard, ["key"]) if wanted else ():
                here = [row for row in wanted if 0 <= row - first < len(batch)]
                found |= {row: str(batch.column(0)[row - first]) for row in here}
                first += len(batch)
        return [found[int(row)] for row in rows]

    def columns(self, *names: str) -> pyarrow.Table:
        """Return columns of texts of all rows, such as the keys."""
        return pyarrow.concat_tables(
            pyarrow.Table.from_batches(_batches(shard, names))
            for shard in self.shards
            if shard.rows
        )


def unit(vectors: np.ndarray) -> np.ndarray:
    """Return vectors (n, D) in fp32 divided by their norms; zeros stay zeros."""
    norms = np.sqrt(np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64))
    norms[norms == 0] = 1
    with np.errstate(invalid="ignore"):  # of infinity
        found = np.empty_like(vectors)
        return np.divide(vectors, norms[:, None], out=found, casting="unsafe")  # no copy in fp64


def open_collection(folder: str | os.PathLike) -> Collection:
    """Open the folder of a finished run of `embed`; no embedding is read.

    Raises:
        ConfigError: it is another folder, the run has not finished, it embedded no image, or a
            shard is missing or has another size.
    """
    path = Path(folder)
    if "\0" in str(path) or not (path / MANIFEST).is_file():
        raise ConfigError(
            f"folder: expected a folder of embeddings, which `elip embed` writes, got "
            f"{shortened(str(folder))} without a {MANIFEST}"
        )
    try:
        manifest = read_object(path / MANIFEST)
        check("format", manifest.get("format"), PositiveInt)
        if manifest["format"] != FORMAT:
            raise ValueError(f"format: expected {FORMAT}, got {manifest['format']}")
        if not manifest.get("complete"):
            raise ConfigError(
                f"folder: expected a finished run, got one that has not finished in {path}; the "
                "same `elip embed` command continues it"
            )
        _check_model(manifest.get("model"))
        shards = tuple(_shards(path, manifest.get("files")))
    except ConfigError:
        raise
    except (OSError, TypeError, ValueError) as error:
        raise ConfigError(f"folder: {path / MANIFEST}: {error}") from error
    if not sum(shard.rows for shard in shards):
        raise ConfigError(f"folder: expected at least one embedding, got none in {path}")
    digest = hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest()
    return Collection(path, manifest, digest, shards)


def _check_model(model: Any) -> None:
    check("model", model, dict)
    check("model.name", model.get("name"), str)
    check("model.weights_sha256", model.get("weights_sha256"), str)
    check("model.has_text", model.get("has_text"), bool)
    check("model.dimension", model.get("dimension"), PositiveInt)


def _shards(folder: Path, files: Any) -> Iterator[Shard]:
    check("files", files, list)
    first = 0
    for each in files:
        check("files", each, dict)
        check("files.file", each.get("file"), str)
        if not NAME.fullmatch(each["file"]):
            continue
        check("files.rows", each.get("rows"), Count)
        check("files.bytes", each.get("bytes"), Count)
        shard = Shard(folder / each["file"], first, each["rows"])
        if not shard.path.is_file():
            raise _damaged(shard, "no such file")
        if (size := shard.path.stat().st_size) != each["bytes"]:
            raise _damaged(shard, f"expected {each['bytes']} bytes, as in {MANIFEST}, got {size}")
        yield shard
        first += shard.rows


def _batches(shard: Shard, names: Sequence[str]) -> Iterator[pyarrow.RecordBatch]:
    """Yield columns of a shard, ROWS rows at a time; the file is mapped, not read as a whole."""
    with _reading(shard), parquet.ParquetFile(shard.path, memory_map=True) as file:
        missing = [name for name in names if name not in file.schema_arrow.names]
        if missing or file.metadata.num_rows != shard.rows:
            found = f"{file.metadata.num_rows} rows of {', '.join(file.schema_arrow.names)}"
            raise _damaged(shard, f"expected {shard.rows} rows of {', '.join(names)}, got {found}")
        yield from file.iter_batches(ROWS, columns=list(names), use_threads=False)


@contextmanager
def _reading(shard: Shard) -> Iterator[None]:
    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(shard, f"expected a whole Parquet file: {error!s:.300}") from error


def _damaged(shard: Shard, what: str) -> ConfigError:
    return ConfigError(
        f"folder: {shard.path}: {what}; remove the file, and the same `elip embed` command writes "
        "it again"
    )
