"""embed: one vector for each image of a collection, as Parquet files.

    result = elip_models.embed("timm:vit_small_patch14_dinov2", "photographs", "embeddings")

This file prepares the folder and completes it; `Job` encodes the shards in between.
"""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from elip_models.embedding.check import EmbeddingCheck, check_reduction
from elip_models.embedding.cluster import Cluster
from elip_models.embedding.encoder import Encoder, open_encoder
from elip_models.embedding.options import OF_MODEL, OF_SOURCE, EmbedOptions
from elip_models.embedding.output import CHECK, OutputFolder, shard_file
from elip_models.embedding.shard import Job, library_versions
from elip_models.embedding.source import ImageSource, open_images
from elip_models.rank_barrier import RankBarrier
from elip_models.saving.files import write_json
from elip_models.strategies.strategy import Strategy
from elip_models.validation import ConfigError

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
    progress: Progress = lambda images, skipped, total: None,
    report: Report = lambda text: None,
    **options: Any,
) -> Embedded:
    """Embed the images of a collection, and write the vectors as Parquet files.

    Example::

        embed("timm:vit_small_patch14_dinov2", "photographs", "embeddings", reduce="tome", keep=0.7)

    A call that was stopped continues with the same arguments, and gives the same bytes, unless the
    strategy draws tokens at random.

    Args:
        model: 'timm:NAME', 'timm:NAME:FILE', 'open_clip:NAME', 'open_clip:NAME:TAG', a folder of
            `save_reduced`, of a run, of `save_pretrained` or of transformers, or 'hf:NAME' on the
            hub; or an `Encoder`, which has its reduction, precision and device.
        source: a folder of images, tar files, a list of paths, Parquet files or a folder of
            `datasets`, as a path or a URL of fsspec; or an `ImageSource`, which has its columns.
        output: the folder of the embeddings, which is created if necessary.
        reduce: a strategy, a file of `calibrate`, or 'none' for dense. None: as it was saved.
        keep: mean share of tokens over the layers, as in `reduce_`.
        progress: called after each batch with the images so far, the skipped ones of this call,
            and all images, of this process.
        report: called with lines of text, such as the figures of the check.
        options: fields of `EmbedOptions`, such as batch_size, keep_columns or min_cosine.

    Returns:
        The counts and the speed.

    Raises:
        ConfigError: an argument is wrong, the folder has other embeddings, or the mean cosine is
            below `min_cosine`. The message begins with the argument.
        OSError: a file cannot be written. The files that were written are whole.

    If one of several processes raises an error, the others raise it too, after their shards.
    """
    chosen = EmbedOptions(**options)
    if isinstance(model, Encoder):
        chosen.refuse(OF_MODEL, "an Encoder", "open_encoder")
    if isinstance(source, ImageSource):
        chosen.refuse(OF_SOURCE, "an ImageSource", "open_images")
    else:
        source = open_images(
            source,
            image_column=chosen.image_column,
            key_column=chosen.key_column,
            keep_columns=chosen.keep_columns,
        )
    folder = OutputFolder(output)
    if os.path.isdir(source.location):
        images = Path(source.location).resolve()
        if folder.path.resolve().is_relative_to(images):
            raise ConfigError(
                f"output: expected a folder outside the source {images}, since the next run would "
                f"list the output as a part of it, got {output}"
            )
    # of torchrun, each with its GPU if there are GPUs
    processes = PartialState(cpu=not torch.cuda.is_available())
    barrier = RankBarrier()
    with ExitStack() as stack:
        stack.enter_context(barrier.reporting())
        cluster = None
        if chosen.ray is not None:
            resources = {"actors": chosen.ray_actors, "device": chosen.device}
            cluster = stack.enter_context(Cluster.connected(chosen.ray, **resources))
        if processes.is_main_process:
            stack.enter_context(folder.locked())
        encoder = model
        if isinstance(model, Encoder):
            if (reduce, keep) != (None, None):
                raise ConfigError(
                    f"reduce: expected none with an Encoder, which has its own, got {reduce!r} and "
                    f"keep={keep}; pass encoder.reduced(reduce, keep)"
                )
        else:
            of_torchrun = processes.device if processes.num_processes > 1 else None
            encoder = open_encoder(
                model,
                reduce=reduce,
                keep=keep,
                preprocess=chosen.preprocess,
                precision=chosen.precision,
                device=chosen.device or of_torchrun,
                pretrained=chosen.pretrained,
                compile=chosen.compile,
            )
        if cluster is not None and chosen.precision == "auto":
            cluster.check_precision(encoder)
        job = Job(encoder, source, folder.path.resolve(), chosen)
        own = range(processes.process_index, len(job), processes.num_processes)
        if processes.is_main_process:
            checked, missing = _begin(job, folder, report)
        else:
            checked, missing = None, job.missing(own)
        barrier.wait()
        start = time.perf_counter()
        _embed(job, own, [number for number in missing if number in own], cluster, progress)
        barrier.wait()
        seconds = time.perf_counter() - start
        if processes.is_main_process:
            folder.complete([shard_file(number) for number in range(len(job))], source.keys)
        barrier.wait()
    speed = job.images(missing) / seconds if missing else None
    counts = folder.manifest()["counts"]
    return Embedded(folder.path, **counts, images_per_second=speed, check=checked)


def _begin(
    job: Job, folder: OutputFolder, report: Report
) -> tuple[EmbeddingCheck | None, list[int]]:
    """Prepare the folder; return the figures of the check, and the shards that are missing."""
    options, total = job.options, len(job.source)
    settings = job.encoder.described() | {
        "embedding_dtype": options.embedding_dtype,
        "batch_size": options.batch_size,
        "shard_size": options.shard_size,
        "source": job.source.described(),
        "columns": job.source.columns.column_names,
        "versions": library_versions(),
    }
    folder.begin(settings)
    missing = job.missing(range(len(job)))
    left = job.images(missing)
    files = map(shard_file, missing)
    if changed := [file for file in files if (folder.path / file).exists()]:
        more = " .." if len(changed) > 3 else ""
        report(f"written again, since they are not whole: {', '.join(changed[:3])}{more}")
    if not left:
        report(f"{folder.path} is complete; nothing is left to do")
        return None, missing
    folder.reopen()
    if left < total:
        report(f"{total - left} of {total} images were embedded before; continuing")
        return None, missing
    if not options.check or job.encoder.strategy is None:
        return None, missing
    checked = check_reduction(job)
    report(str(checked))
    if options.min_cosine is not None and not checked.cosine.mean >= options.min_cosine:
        raise ConfigError(
            f"min_cosine: expected a mean cosine of at least {options.min_cosine:g} between dense "
            f"and reduced embeddings, got {checked.cosine.mean:.4f} on {checked.images} images; "
            "raise keep, or let `elip calibrate` choose a reduction"
        )
    write_json(folder.path / CHECK, asdict(checked) | {"cosine": checked.cosine._asdict()})
    return checked, missing


def _embed(
    job: Job,
    numbers: Sequence[int],
    missing: Sequence[int],
    cluster: Cluster | None,
    progress: Progress,
) -> None:
    """Encode the shards among `numbers` that are missing."""
    total = job.images(numbers)
    done, skipped = total - job.images(missing), 0
    progress(done, skipped, total)
    counts = job.embed(missing) if cluster is None else cluster.embed(job, missing)
    for images, skipped_images in counts:
        done, skipped = done + images, skipped + skipped_images
        progress(done, skipped, total)
