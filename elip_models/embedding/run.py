"""embed: one vector for each image of a collection, as Parquet files.

    result = elip_models.embed("timm:vit_small_patch14_dinov2", "photographs", "embeddings")

The rows of the source are cut into shards, and `embed_shard` encodes one of them.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import pyarrow
import torch

from elip_models.embedding.check import EmbeddingCheck, check_cosine, check_reduction
from elip_models.embedding.decoding import Batch, decoded_batches, default_workers
from elip_models.embedding.encoder import Encoder, open_encoder
from elip_models.embedding.image_source import ImageSource
from elip_models.embedding.open_images import open_images
from elip_models.embedding.options import EmbedKeywords, EmbedOptions
from elip_models.embedding.output import CHECK, TEXTS, OutputFolder, Skipped, writing
from elip_models.embedding.processes import Processes, joined_processes
from elip_models.embedding.ray_cluster import Cluster, connected
from elip_models.embedding.shard import Shards, as_arrow, embed_shard, library_versions
from elip_models.reduction.strategy import Strategy
from elip_models.saving.files import write_json
from elip_models.validation import ConfigError, as_config_error, shortened

TEXT_BATCH = 64
Progress = Callable[[int, int, int], object]
Report = Callable[[str], object]


@dataclass(frozen=True)
class Embedded:
    """What `embed` did.

    Attributes:
        folder: the folder of the embeddings.
        found: images of the source.
        embedded: images with an embedding.
        skipped: images without one, which skipped.parquet lists.
        non_finite: skipped images whose embedding has NaN or infinity.
        images_per_second: of this call, without the check; None if nothing was left to do.
        check: figures of the check before the run, or None.
    """

    folder: Path
    found: int
    embedded: int
    skipped: int
    non_finite: int
    images_per_second: float | None = None
    check: EmbeddingCheck | None = None


def embed(
    model: str | Encoder,
    source: str | os.PathLike | ImageSource,
    output: str | os.PathLike,
    *,
    reduce: str | Strategy | None = None,
    keep: float | None = None,
    texts: str | os.PathLike | None = None,
    progress: Progress = lambda images, skipped, total: None,
    report: Report = lambda text: None,
    **options: Unpack[EmbedKeywords],
) -> Embedded:
    """Embed the images of a collection, and write the vectors as Parquet files.

    A call that was stopped continues with the same arguments, and gives the same bytes.

    Args:
        model: 'timm:NAME', 'timm:NAME:FILE', 'open_clip:NAME', 'open_clip:NAME:TAG', a folder of
            `save_reduced`, of a run, of `save_pretrained` or of transformers, or 'hf:NAME' on the
            hub; or an `Encoder`, which has its reduction, precision and device.
        source: a folder of images, tar files, a list of paths, Parquet files or a folder of
            `datasets`, as a path or a URL of fsspec.
        output: the folder of the embeddings, which is created if necessary.
        reduce: a strategy, a file of `calibrate`, or 'none' for dense. None: as it was saved.
        keep: mean share of tokens over the layers, as in `reduce_`.
        texts: a file with one text a line, which an image-text model embeds too.
        progress: called after each batch with the images so far, the skipped ones among them, and
            all images, of this process.
        report: called with lines of text, such as the figures of the check.
        options: fields of `EmbedOptions`, such as batch_size, keep_columns or min_cosine.

    Returns:
        The counts and the speed.

    Raises:
        ConfigError: an argument is wrong, the folder has other embeddings, or the mean cosine is
            below `min_cosine`. The message begins with the argument.
        OSError: a file cannot be written. The files that were written are whole.
    """
    chosen = EmbedOptions(**options)
    for name, value in (("output", output), ("texts", texts)):
        if not isinstance(value, str | os.PathLike) and (name, value) != ("texts", None):
            raise ConfigError(f"{name}: expected a path, got {shortened(value)}")
    if not isinstance(source, ImageSource):
        source = open_images(source, chosen.source)
    lines = None if texts is None else _read_texts(Path(texts))
    folder = OutputFolder(output)
    _check_outside(folder.path, source)
    with (
        connected(chosen) as cluster,
        joined_processes() as processes,
        folder.locked() if processes.is_first else nullcontext(),
    ):
        encoder = _encoder(model, chosen, processes, cluster, reduce, keep)
        run = _Run(encoder, source, folder, chosen, processes, cluster, progress, report)
        found = run.run(lines)
    if found.images_per_second is not None:
        _report_changes(source, report)
    return found


def _check_outside(output: Path, source: ImageSource) -> None:
    """Raise ConfigError if the output is in the folder that is embedded."""
    if os.path.isdir(source.location):
        folder = Path(source.location).resolve()
        if output.resolve().is_relative_to(folder):
            raise ConfigError(
                f"output: expected a folder outside the source {folder}, since the next run would "
                f"list the output as a part of it, got {output}"
            )


def _encoder(
    model: str | Encoder,
    options: EmbedOptions,
    processes: Processes,
    cluster: Cluster | None,
    reduce: str | Strategy | None,
    keep: float | None,
) -> Encoder:
    """Return the encoder that the arguments of `embed` describe."""
    names = "preprocess", "precision", "device", "pretrained", "compile"
    given = {name: getattr(options, name) for name in names}
    if not isinstance(model, Encoder):
        given["device"] = processes.device(options.device)
        encoder = open_encoder(model, reduce=reduce, keep=keep, **given)
        if cluster is not None and options.precision == "auto":
            cluster.check_precision(encoder)
        return encoder
    given |= {"reduce": reduce, "keep": keep}
    defaults = {"precision": "auto", "pretrained": True, "compile": False}
    for name, value in given.items():
        if value != defaults.get(name):
            raise ConfigError(
                f"{name}: expected none with an Encoder, which has its own, got {value!r:.100}"
            )
    return model


class _Run:
    """One run in a locked folder."""

    def __init__(
        self,
        encoder: Encoder,
        source: ImageSource,
        folder: OutputFolder,
        options: EmbedOptions,
        processes: Processes,
        cluster: Cluster | None,
        progress: Progress,
        report: Report,
    ) -> None:
        self.encoder, self.source, self.folder, self.options = encoder, source, folder, options
        self.processes, self.cluster = processes, cluster
        self.progress, self.report = progress, report
        self.shards = Shards(len(source), options.shard_size, options.batch_size)
        workers = options.workers
        self.workers = default_workers(encoder.device) if workers is None else workers
        self.every = range(len(self.shards))

    def settings(self, texts: Sequence[str] | None) -> dict[str, Any]:
        """Return all that the bytes of the output depend on."""
        digest = hashlib.sha256("\n".join(texts or ()).encode()).hexdigest()
        return self.encoder.described() | {
            "embedding_dtype": self.options.embedding_dtype,
            "batch_size": self.options.batch_size,
            "shard_size": self.options.shard_size,
            "source": self.source.described(),
            "columns": list(self.options.keep_columns),
            "texts": None if texts is None else {"count": len(texts), "sha256": digest},
            "versions": library_versions(),
        }

    def run(self, texts: Sequence[str] | None) -> Embedded:
        """Check, encode the shards that are missing, and complete the folder."""
        checked, left = None, 0
        if self.processes.is_first:
            checked, left = self._begin(texts)
        self.processes.wait()
        start = time.perf_counter()
        self._embed(self.processes.own(len(self.shards)))
        self.processes.wait()
        seconds = time.perf_counter() - start
        if self.processes.is_first and not self.folder.manifest()["complete"]:
            self.folder.complete(self.source.keys, self._finished(self.every)[0])
        self.processes.wait()
        counts = self.folder.manifest()["counts"]
        speed = left / seconds if left else None
        return Embedded(self.folder.path, **counts, images_per_second=speed, check=checked)

    def _begin(self, texts: Sequence[str] | None) -> tuple[EmbeddingCheck | None, int]:
        """Prepare the folder; return the figures of the check, and how many images are left."""
        self.folder.begin(self.settings(texts))
        _, missing = self._finished(self.every)
        left = sum(len(self.shards[number]) for number in missing)
        if left:
            self.folder.reopen()
        if not left and self.folder.manifest()["complete"]:
            self.report(f"{self.folder.path} is complete; nothing is left to do")
            return None, 0
        checked = self._check() if left == len(self.source) else None
        if left < len(self.source):
            done = len(self.source) - left
            self.report(f"{done} of {len(self.source)} images were embedded before; continuing")
        if texts is not None:
            self._embed_texts(texts)
        return checked, left

    def _embed(self, numbers: Sequence[int]) -> None:
        """Encode the shards among `numbers` that are missing."""
        skipped, missing = self._finished(numbers)
        bad, total = len(skipped), sum(len(self.shards[number]) for number in numbers)
        done = total - sum(len(self.shards[number]) for number in missing)
        self.progress(done, bad, total)
        if self.cluster is not None:
            given = self.encoder, self.source, self.folder, self.shards, self.options
            for images, skipped_images in self.cluster.embed(self.cluster.work(*given), missing):
                done, bad = done + images, bad + skipped_images
                self.progress(done, bad, total)
            return
        batches = self._batches(missing)
        for number in missing:

            def update(images: int, skipped: int, done: int = done, bad: int = bad) -> None:
                self.progress(done + images, bad + skipped, total)

            skipped = embed_shard(
                *(self.encoder, self.source, self.folder, self.shards, number, batches),
                embedding_dtype=self.options.embedding_dtype,
                progress=update,
            )
            done, bad = done + len(self.shards[number]), bad + len(skipped)

    def _finished(self, numbers: Iterable[int]) -> tuple[list[Skipped], list[int]]:
        """Return the skipped images of the shards that are whole, and the numbers of the others."""
        skipped, missing = [], []
        for number in numbers:
            found = self.folder.skipped_in(number, len(self.shards[number]))
            if found is None:
                missing.append(number)
            else:
                skipped += found
        return skipped, missing

    def _check(self) -> EmbeddingCheck | None:
        """Compare dense and reduced embeddings of some images, if the model is reduced."""
        options = self.options
        if not options.check or self.encoder.strategy is None:
            return None
        plain = replace(self.encoder, run=None)
        found = check_reduction(plain, self.source, options.check, options.batch_size, self.workers)
        self.report(str(found))
        check_cosine(found, options.min_cosine)
        with writing(self.folder.path):
            write_json(self.folder.path / CHECK, found.as_json())
        return found

    def _batches(self, missing: Sequence[int]) -> Iterator[Batch]:
        """Return the batches of all missing shards, which worker processes decode in one pass."""
        return decoded_batches(
            self.source,
            [self.shards[number] for number in missing],
            self.encoder.preprocessing.transform,
            self.options.batch_size,
            workers=self.workers,
            pin_memory=self.encoder.device.type == "cuda",
        )

    def _embed_texts(self, texts: Sequence[str]) -> None:
        if self.folder.shard(0, TEXTS).is_file():
            return
        chunks = range(0, len(texts), TEXT_BATCH)
        found = [self.encoder.encode_texts(texts[i : i + TEXT_BATCH]).cpu() for i in chunks]
        features = torch.cat(found).numpy().astype(self.options.embedding_dtype)
        if not np.isfinite(features).all():
            bad = int((~np.isfinite(features).all(1)).argmax())
            raise ConfigError(f"texts: expected finite embeddings, got others in line {bad + 1}")
        columns = {
            "key": pyarrow.array(map(str, range(len(texts))), pyarrow.string()),
            "embedding": as_arrow(features),
            "text": pyarrow.array(texts, pyarrow.string()),
        }
        self.folder.write_shard(0, columns, part=TEXTS)


def _report_changes(source: ImageSource, report: Report) -> None:
    """Report that files were added to a folder or removed since they were listed."""
    try:
        now = source.list_again() if source.list_again is not None else source.keys
    except OSError as error:
        report(f"{source.location} cannot be listed again: {error}")
        return
    added, removed = len(set(now) - set(source.keys)), len(set(source.keys) - set(now))
    if added or removed:
        report(
            f"{source.location} changed during the run: {added} images were added, which have no "
            f"embedding, and {removed} removed; embed it again into another folder"
        )


def _read_texts(path: Path) -> list[str]:
    """Return the lines of a file, at least one and none of them empty."""
    if not path.is_file():
        raise ConfigError(f"texts: expected a file with one text a line, got {path}")
    with as_config_error("texts"):
        lines = path.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
    blank = next((i for i, line in enumerate(lines) if not line.strip()), None)
    if blank is not None:
        raise ConfigError(
            f"texts: expected one text a line in {path}, got none in line {blank + 1}"
        )
    return lines
