"""A Ray cluster whose actors embed a collection.

    with connected(EmbedOptions(ray="local", ray_actors=2)) as cluster:
        work = cluster.work(encoder, source, folder, shards, options)
        for images, skipped in cluster.embed(work, missing):
            print(images)

Ray restarts an actor that dies and repeats its task, both without a limit.
"""

import copy
import logging
import pickle
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from elip_models.embedding.decoding import MOST_WORKERS
from elip_models.embedding.encoder import Encoder
from elip_models.embedding.image_source import ImageSource
from elip_models.embedding.options import EmbedOptions
from elip_models.embedding.output import OutputFolder
from elip_models.embedding.processes import processes_in_environment
from elip_models.embedding.ray_actors import ShardActor, Work
from elip_models.embedding.shard import Shards, library_versions
from elip_models.embedding.stored import Payload, Stored, read
from elip_models.images import SampleError
from elip_models.validation import ConfigError, require_packages, shortened

LOCAL, AUTO = "local", "auto"
CONNECT_SECONDS = 10
FILE_SECONDS = 120
"""Time after which a network file system shows the files of other nodes."""
SHARDS_IN_TASK = 8
"""Shards that an actor decodes in one pass; with less, the GPU waits at the start of each."""
TASKS_FOR_ACTOR = 4
"""Tasks of each actor, at least, so that all actors end at about the same time."""
PROBES = 8
LOGGED = {"ray.data": logging.WARNING, "ray.data._internal.progress": logging.ERROR}
"""The levels of Ray Data's loggers. The second one warns that its progress bars are disabled."""


@dataclass(frozen=True)
class Cluster:
    """The part of a Ray cluster that encodes.

    Attributes:
        device: 'cuda' or 'cpu'.
        actors: the number of actors.
        cores: CPU cores for each actor.
    """

    device: str
    actors: int
    cores: int

    def check_precision(self, encoder: Encoder) -> None:
        """Raise ConfigError if 'auto' was decided for another kind of device."""
        if encoder.device.type != self.device:
            raise ConfigError(
                f"precision: expected fp32, bf16 or fp16, since 'auto' is the precision of this "
                f"machine's device, {encoder.device.type}, and the actors use {self.device}"
            )

    def work(
        self,
        encoder: Encoder,
        source: ImageSource,
        folder: OutputFolder,
        shards: Shards,
        options: EmbedOptions,
    ) -> Work:
        """Return what the actors need."""
        default = self.cores // 2 if self.device == "cpu" else min(MOST_WORKERS, self.cores)
        is_here = encoder.device.type == "cpu"
        model = encoder.model if is_here else copy.deepcopy(encoder.model).cpu()
        return Work(
            encoder=replace(encoder, model=model, run=None),
            source=source,
            folder=folder.path.resolve(),
            shards=shards,
            embedding_dtype=options.embedding_dtype,
            device=self.device,
            workers=default if options.workers is None else options.workers,
            compile=encoder.run is not None,
            versions=library_versions(),
            readable=_readable(source),
        )

    def embed(self, work: Work, missing: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Encode shards; yield the numbers of images and of skipped images of each when it is done.

        Raises:
            ConfigError: a node lacks files or libraries, or does not share the folder.
            OSError: an actor could not write a shard.
        """
        if not missing:
            return
        import ray
        from ray.data import ActorPoolStrategy, from_items

        size = max(1, min(SHARDS_IN_TASK, len(missing) // (TASKS_FOR_ACTOR * self.actors)))
        tasks = [{"shards": missing[i : i + size]} for i in range(0, len(missing), size)]
        stored = ray.put(work)  # one copy for all actors
        with _data_context():
            done = from_items(tasks, override_num_blocks=len(tasks)).map_batches(
                ShardActor,
                batch_size=1,
                compute=ActorPoolStrategy(
                    size=min(self.actors, len(tasks)), max_tasks_in_flight_per_actor=1
                ),
                fn_constructor_kwargs={"work": stored},
                **({"num_gpus": 1} if self.device == "cuda" else {"num_cpus": self.cores}),
            )
            for row in done.iter_rows():
                if row["error"]:
                    raise pickle.loads(bytes.fromhex(row["error"]))
                yield row["images"], row["skipped"]
        _wait_for(OutputFolder(work.folder), work.shards, missing)


@contextmanager
def connected(options: EmbedOptions) -> Iterator[Cluster | None]:
    """Yield the cluster of the options, connected until the end; None without `ray`.

    Raises:
        ConfigError: there is no such cluster, or it has too few GPUs or cores.
        ImportError: Ray is missing; the message names the extra.
    """
    if options.ray is None:
        if options.ray_actors is not None:
            raise ConfigError(f"ray_actors: expected none without ray, got {options.ray_actors}")
        yield None
        return
    if (count := processes_in_environment()) > 1:
        raise ConfigError(
            f"ray: expected one process, whose actors use all GPUs, got {count} of torchrun; start "
            "the command without torchrun"
        )
    require_packages("embed with ray", "ray")
    import ray

    if ray.is_initialized():
        if options.ray != AUTO:
            raise ConfigError(
                f"ray: expected {AUTO!r} in a process that has connected to Ray, got "
                f"{shortened(options.ray)}"
            )
        yield _cluster(options, ray.nodes())
        return
    _check_address(options.ray)
    started_here = {"include_dashboard": False} if options.ray == LOCAL else {}
    try:
        ray.init(options.ray, log_to_driver=False, logging_level=logging.ERROR, **started_here)
    except Exception as error:  # Ray raises errors of any type
        raise ConfigError(
            f"ray: expected a Ray cluster, got {shortened(options.ray)}, which does not start or "
            f"answer: {' '.join(str(error).split()):.300}"
        ) from error
    try:
        yield _cluster(options, ray.nodes())
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Raise ConfigError if there is no server at an address, for which Ray would wait minutes."""
    if address in (LOCAL, AUTO):
        return
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise ConfigError(
            f"ray: expected {LOCAL!r}, {AUTO!r} on a node of a cluster, or 'HOST:PORT' of its head "
            f"node, got {shortened(address)}"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise ConfigError(
            f"ray: expected the address of a Ray cluster, got {shortened(address)}: {error}; `ray "
            "start --head` prints the address"
        ) from error


def _cluster(options: EmbedOptions, nodes: Sequence[Mapping[str, Any]]) -> Cluster:
    """Return the actors that fit the nodes of a Ray cluster."""
    found = [each["Resources"] for each in nodes if each["Alive"]]
    cores = [count for each in found if (count := int(each.get("CPU", 0)))]
    with_gpu = [each for each in found if each.get("GPU", 0) >= 1]
    gpus = sum(int(each["GPU"]) for each in with_gpu)
    device = (options.device or ("cuda" if gpus else "cpu")).partition(":")[0]
    if device not in ("cuda", "cpu"):
        raise ConfigError(f"device: expected cuda or cpu with ray, got {options.device!r}")
    what, most = ("GPUs", gpus) if device == "cuda" else ("CPU cores", sum(cores))
    if not most:
        raise ConfigError(f"device: expected {what} in the Ray cluster, got none")
    actors = options.ray_actors or (gpus if device == "cuda" else len(cores))
    if actors > most:
        raise ConfigError(
            f"ray_actors: expected at most {most}, the {what} of the Ray cluster, got {actors}"
        )
    if device == "cuda":
        return Cluster(device, actors, min(int(n.get("CPU", 0) // n["GPU"]) for n in with_gpu))
    each = max(n for n in range(1, max(cores) + 1) if sum(c // n for c in cores) >= actors)
    return Cluster(device, actors, each)


def _readable(source: ImageSource) -> Payload | None:
    """Return an image in a file that this process can read, if one of the first ones is."""
    for _, payload in source.sample(PROBES):
        if isinstance(payload, Stored):
            try:
                read(payload)
            except SampleError:
                continue
            return payload
    return None


@contextmanager
def _data_context() -> Iterator[None]:
    """Set what Ray Data prints, and that each finished shard is reported at once."""
    from ray.data import DataContext

    context = DataContext.get_current()
    wanted = {
        "enable_progress_bars": False,
        "print_on_execution_start": False,
        "target_max_block_size": 1,
        "max_errored_blocks": 0,
    }
    before = {name: getattr(context, name) for name in wanted}
    loggers = {logging.getLogger(name): level for name, level in LOGGED.items()}
    levels = {logger: logger.level for logger in loggers}
    for name, value in wanted.items():
        setattr(context, name, value)
    for logger, level in loggers.items():
        logger.setLevel(level)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
        for logger, level in levels.items():
            logger.setLevel(level)


def _wait_for(folder: OutputFolder, shards: Shards, numbers: Sequence[int]) -> None:
    """Return when this process sees the shards that the actors have written."""
    end = time.monotonic() + FILE_SECONDS
    while numbers := [n for n in numbers if folder.skipped_in(n, len(shards[n])) is None]:
        if time.monotonic() > end:
            raise ConfigError(
                f"output: expected a folder that all nodes of the cluster share, got {folder.path},"
                f" in which {len(numbers)} shards are missing that actors have written"
            )
        time.sleep(1)
