"""The actors of Ray Data that encode shards, each with the model in memory.

The driver lists the source and opens the model once, and sends both to the actors, which write the
shards into the same folder. Ray restarts an actor that dies and repeats its task, which leaves out
the shards that are whole. An actor returns its errors as a row, since Ray repeats what is raised in
many lines.
"""

import pickle
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from elip_models.embedding.decoding import decoded_batches
from elip_models.embedding.encoder import Encoder
from elip_models.embedding.image_source import ImageSource
from elip_models.embedding.options import EmbeddingDtype
from elip_models.embedding.output import MANIFEST, OutputFolder, Skipped
from elip_models.embedding.shard import Shards, embed_shard, library_versions
from elip_models.embedding.stored import Payload, read
from elip_models.images import SampleError
from elip_models.validation import ConfigError, shortened


@dataclass(frozen=True)
class Work:
    """What an actor needs to encode shards.

    Attributes:
        encoder: the model, on the CPU.
        source: the collection.
        folder: the absolute path of the output, which the driver has prepared.
        shards: the rows of all shards.
        embedding_dtype: type of the numbers in the files.
        device: where the model runs, 'cuda' or 'cpu'.
        workers: processes of each actor that decode images.
        compile: run the model by torch.compile.
        versions: of the libraries of the driver.
        readable: an image that the driver can read, or None.
    """

    encoder: Encoder
    source: ImageSource
    folder: Path
    shards: Shards
    embedding_dtype: EmbeddingDtype
    device: str
    workers: int
    compile: bool
    versions: Mapping[str, str | None]
    readable: Payload | None


class ShardActor:
    """Encodes and writes shards, with the model in memory."""

    def __init__(self, work: Any) -> None:
        """Move the model of `work`, a `Work` or a reference to one, to the device."""
        if not isinstance(work, Work):
            import ray

            work = ray.get(work)
        self.work: Work = work
        self.folder = OutputFolder(work.folder)
        encoder = work.encoder
        encoder = replace(encoder, model=encoder.model.to(work.device))
        self.encoder = encoder.compiled() if work.compile else encoder

    def __call__(self, batch: Mapping[str, Any]) -> Iterator[dict[str, list[Any]]]:
        """Yield the numbers of images and of skipped images of each shard, or an error."""
        try:
            self._check_node()
            for number, skipped in self._written([int(each) for each in batch["shards"][0]]):
                images = len(self.work.shards[number])
                yield {"images": [images], "skipped": [len(skipped)], "error": [""]}
        except (ConfigError, OSError) as error:
            yield {"images": [0], "skipped": [0], "error": [pickle.dumps(error).hex()]}

    def _check_node(self) -> None:
        """Raise ConfigError if this node lacks the files or the libraries of the driver."""
        node, work = socket.gethostname(), self.work
        if not (work.folder / MANIFEST).is_file():
            raise ConfigError(
                f"output: expected a folder that all nodes of the cluster share, got {work.folder},"
                f" which has no {MANIFEST} on the node {node}; choose a folder of a file system "
                "that all nodes have mounted at the same path"
            )
        versions = library_versions()
        for name, version in work.versions.items():
            if versions.get(name) != version:
                raise ConfigError(
                    f"ray: expected the libraries of the command on all nodes, got {name} "
                    f"{versions.get(name)} on {node} and {version} here; install the same versions"
                )
        if work.readable is not None:
            try:
                read(work.readable)
            except SampleError as error:
                raise ConfigError(
                    f"source: expected images that all nodes of the cluster read, got "
                    f"{shortened(work.readable.path)}, which the node {node} cannot read: "
                    f"{error.reason}"
                ) from error

    def _written(self, numbers: Sequence[int]) -> Iterator[tuple[int, list[Skipped]]]:
        """Yield the skipped images of each shard when it is whole, in the order of the numbers."""
        work = self.work
        whole = {each: self.folder.skipped_in(each, len(work.shards[each])) for each in numbers}
        batches = decoded_batches(
            work.source,
            [work.shards[number] for number, skipped in whole.items() if skipped is None],
            self.encoder.preprocessing.transform,
            work.shards.batch_size,
            workers=work.workers,
            pin_memory=work.device == "cuda",
        )
        for number, skipped in whole.items():
            if skipped is None:
                skipped = embed_shard(
                    *(self.encoder, work.source, self.folder, work.shards, number, batches),
                    embedding_dtype=work.embedding_dtype,
                )
            yield number, skipped
