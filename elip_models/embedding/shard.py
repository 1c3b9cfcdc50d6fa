"""Shards of a collection: the rows of each, and the processes that encode and write them.

    job = Job(encoder, source, Path("embeddings"), EmbedOptions())
    for images, skipped in job.embed(job.missing(range(len(job)))):
        ...

The same job runs in one process, in those of torchrun and in the actors of Ray.
"""

import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow
import torch

from elip_models.embedding.decoding import Batch, decoded_batches, default_workers
from elip_models.embedding.encoder import Encoder
from elip_models.embedding.options import EmbedOptions
from elip_models.embedding.output import OutputFolder, Skipped, as_arrow, shard_file
from elip_models.embedding.source import ImageSource
from elip_models.profiling.measure import installed_versions

NON_FINITE = "the embedding has NaN or infinity"
PACKAGES = ("elip-kernels", "torch", "timm", "open_clip_torch", "transformers", "torchvision")
PACKAGES += ("pillow", "pyarrow")


def library_versions() -> dict[str, str | None]:
    """Return the versions of Python and of the libraries on which the embeddings depend."""
    return {"python": platform.python_version(), **installed_versions(PACKAGES)}


@dataclass(frozen=True)
class Job:
    """What a process needs to encode shards of a collection; no batch is in two shards.

    Attributes:
        encoder: the model.
        source: the collection.
        output: the folder of the embeddings.
        options: sizes of batches and shards, type of the numbers, and worker processes.
    """

    encoder: Encoder
    source: ImageSource
    output: Path
    options: EmbedOptions

    def __len__(self) -> int:
        return -(-len(self.source) // self.options.shard_size)

    def rows(self, number: int) -> range:
        """Return the rows of a shard."""
        size = self.options.shard_size
        return range(number * size, min((number + 1) * size, len(self.source)))

    def images(self, numbers: Iterable[int]) -> int:
        """Return the number of images in some shards."""
        return sum(len(self.rows(number)) for number in numbers)

    @property
    def workers(self) -> int:
        """The number of processes that decode images."""
        chosen = self.options.workers
        return default_workers(self.encoder.device) if chosen is None else chosen

    def missing(self, numbers: Iterable[int]) -> list[int]:
        """Return the shards that are not whole in the folder."""
        folder = OutputFolder(self.output)
        return [number for number in numbers if not folder.is_whole(shard_file(number))]

    def embed(self, numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Encode and write shards; yield the images of each batch, and the skipped ones of them.

        Worker processes decode the images of all shards in one pass, so the model does not wait at
        the beginning of each.
        """
        size = self.options.batch_size
        batches = decoded_batches(
            self.source,
            map(self.rows, numbers),
            self.encoder.preprocessing.transform,
            size,
            workers=self.workers,
            pin_memory=self.encoder.device.type == "cuda",
        )
        for number in numbers:
            count = -(-len(self.rows(number)) // size)
            yield from self._embed_shard(number, islice(batches, count))

    def _embed_shard(self, number: int, batches: Iterable[Batch]) -> Iterator[tuple[int, int]]:
        features = [torch.empty(0, self.encoder.dimension, device=self.encoder.device)]
        rows: list[int] = []
        digests: list[str] = []
        skipped: list[Skipped] = []
        for batch in batches:
            if batch.pixels is not None:
                features.append(self.encoder(batch.pixels))  # stays on the device: nothing waits
            rows += batch.rows
            digests += batch.sha256
            skipped += [(row, reason, False) for row, reason in batch.skipped]
            yield len(batch.rows) + len(batch.skipped), len(batch.skipped)
        with np.errstate(over="ignore"):
            vectors = torch.cat(features).cpu().numpy().astype(self.options.embedding_dtype)
        finite = np.isfinite(vectors).all(axis=1)
        kept = [row for row, is_finite in zip(rows, finite, strict=True) if is_finite]
        bad = [(row, NON_FINITE, True) for row in sorted({*rows} - {*kept})]
        further = self.source.columns.take(pyarrow.array(kept, pyarrow.int64()))
        columns = {
            "key": pyarrow.array([self.source.keys[row] for row in kept], pyarrow.string()),
            "embedding": as_arrow(vectors[finite]),
            "sha256": pyarrow.array(digests, pyarrow.string()).filter(finite),
            **dict(zip(further.column_names, further.columns, strict=True)),
        }
        OutputFolder(self.output).write(shard_file(number), columns, skipped + bad)
        yield 0, len(bad)
