"""One shard of a collection: its rows, and the file of their embeddings."""

import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pyarrow
import torch
from torch import Tensor

from elip_models.embedding.decoding import Batch
from elip_models.embedding.encoder import Encoder
from elip_models.embedding.image_source import ImageSource
from elip_models.embedding.options import EmbeddingDtype
from elip_models.embedding.output import OutputFolder, Skipped
from elip_models.profiling.measure import installed_versions

PACKAGES = ("elip-kernels", "torch", "timm", "open_clip_torch", "transformers", "torchvision")
PACKAGES += ("pillow", "pyarrow")
NON_FINITE = "the embedding has NaN or infinity"


@dataclass(frozen=True)
class Shards:
    """The rows of a source in shards of `size` rows; the last one may be smaller.

    Attributes:
        rows: the number of rows.
        size: rows in a shard.
        batch_size: images in a batch. No batch is in two shards.
    """

    rows: int
    size: int
    batch_size: int

    def __len__(self) -> int:
        return -(-self.rows // self.size)

    def __getitem__(self, number: int) -> range:
        """Return the rows of a shard."""
        return range(number * self.size, min(self.rows, (number + 1) * self.size))

    def batches(self, number: int) -> int:
        """Return the number of batches of a shard."""
        return -(-len(self[number]) // self.batch_size)


def embed_shard(
    encoder: Encoder,
    source: ImageSource,
    folder: OutputFolder,
    shards: Shards,
    number: int,
    batches: Iterator[Batch],
    *,
    embedding_dtype: EmbeddingDtype = "float32",
    progress: Callable[[int, int], object] = lambda images, skipped: None,
) -> list[Skipped]:
    """Encode the images of one shard, write its file, and return the images that are not in it.

    Args:
        encoder: the model.
        source: the collection, for the keys and the columns to keep.
        folder: where the shard is written.
        shards: the rows of all shards.
        number: of this shard.
        batches: iterator whose next batches are those of the shard, as `decoded_batches` yields.
        embedding_dtype: type of the numbers in the file.
        progress: called with the images of the shard so far, and the skipped ones among them.
    """
    found: list[Tensor] = []
    kept: list[int] = []
    digests: list[str] = []
    skipped: list[Skipped] = []
    for batch in islice(batches, shards.batches(number)):
        if batch.pixels is not None:
            found.append(encoder(batch.pixels))  # stays on the device, so that nothing waits
        kept += batch.rows
        digests += batch.sha256
        skipped += [(row, reason, False) for row, reason in batch.skipped]
        progress(len(kept) + len(skipped), len(skipped))
    width = encoder.dimension
    features = torch.cat(found).cpu().numpy() if found else np.empty((0, width), np.float32)
    with np.errstate(over="ignore"):
        features = features.astype(embedding_dtype)
    finite = np.isfinite(features).all(axis=1)
    skipped += [(row, NON_FINITE, True) for row, good in zip(kept, finite, strict=True) if not good]
    kept = [row for row, good in zip(kept, finite, strict=True) if good]
    columns = {
        "key": pyarrow.array([source.keys[row] for row in kept], pyarrow.string()),
        "embedding": as_arrow(features[finite]),
        "sha256": pyarrow.array(
            [each for each, good in zip(digests, finite, strict=True) if good], pyarrow.string()
        ),
        **source.kept(kept),
    }
    folder.write_shard(number, columns, sorted(skipped))
    return skipped


def as_arrow(features: np.ndarray) -> pyarrow.FixedSizeListArray:
    """Return features (n, D) as an array of fixed-size lists."""
    flat = np.ascontiguousarray(features).reshape(-1)
    return pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(flat), features.shape[1])


def library_versions() -> dict[str, str | None]:
    """Return the versions of Python and of the libraries on which the embeddings depend."""
    return {"python": platform.python_version(), **installed_versions(PACKAGES)}
