"""A Ray cluster whose actors embed shards of a collection.

    with Cluster.connected("local", actors=2) as cluster:
        for images, skipped in cluster.embed(job, missing):
            ...

Each actor has the model and runs the same `Job` as a single process. Ray restarts an actor that
dies and repeats its task, both without a limit; the task leaves out the shards that are whole.
"""

import copy
import logging
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from elip_models.embedding.decoding import default_workers
from elip_models.embedding.encoder import Encoder
from elip_models.embedding.output import MANIFEST, OutputFolder
from elip_models.embedding.shard import Job, library_versions
from elip_models.embedding.source import Stored
from elip_models.validation import ConfigError, require_packages

CONNECT_SECONDS = 10
SHARDS_IN_TASK = 8
"""Shards that an actor decodes in one pass; with less, the GPU waits at the start of each."""
TASKS_FOR_ACTOR = 4
"""Tasks of each actor, at least, so that all actors end at about the same time."""
PROBES = 64  # images that an actor looks for before it encodes


class ShardActor:
    """Encodes and writes shards, with the model in memory."""

    def __init__(self, job: Job, device: str, cores: int) -> None:
        job.encoder.model.to(device)
        if job.options.workers is None:
            workers = default_workers(job.encoder.device, cores)
            job = replace(job, options=replace(job.options, workers=workers))
        self.job = job

    def embed(self, numbers: Sequence[int]) -> tuple[int, int]:
        """Write the shards that are missing; return the numbers of images and of skipped ones."""
        job = self.job
        stored = [image for _, image in job.source.sample(PROBES) if isinstance(image, Stored)]
        sees_images = not stored or any(image.files.exists(image.path) for image in stored)
        for argument, path, is_seen in (
            ("output", job.output, (job.output / MANIFEST).is_file()),
            ("source", job.source.location, sees_images),
        ):
            if not is_seen:
                raise ConfigError(
                    f"{argument}: expected a place that all nodes of the cluster see, got {path}, "
                    f"which the node {socket.gethostname()} does not see"
                )
        expected, own = OutputFolder(job.output).manifest()["versions"], library_versions()
        if other := [f"{name} {own[name]}" for name in own if own[name] != expected.get(name)]:
            raise ConfigError(
                f"ray: expected the versions of the command on all nodes, {expected}, got "
                f"{', '.join(other)} on {socket.gethostname()}; install the same versions"
            )
        counts = list(job.embed(job.missing(numbers)))
        return job.images(numbers), sum(skipped for _, skipped in counts)


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

    @classmethod
    @contextmanager
    def connected(
        cls, address: str, *, actors: int | None = None, device: str | None = None
    ) -> "Iterator[Cluster]":
        """Connect to the cluster of an address until the end; see `EmbedOptions` for it.

        A process that has connected to Ray stays connected.
        """
        require_packages("embed with ray", "ray")
        import ray

        is_connected = ray.is_initialized()
        if not is_connected:
            options = {"include_dashboard": False} if address == "local" else {}
            try:
                if ":" in address:  # Ray itself would wait for minutes
                    host, _, port = address.rpartition(":")
                    socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
                ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **options)
            except Exception as error:  # Ray raises errors of any type
                raise ConfigError(
                    f"ray: expected 'local', 'auto' or 'HOST:PORT' of a Ray cluster, got "
                    f"{address!r}: {' '.join(str(error).split()):.300}"
                ) from error
        try:
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            yield cls.of_nodes(nodes, actors, device)
        finally:
            if not is_connected:
                ray.shutdown()

    @classmethod
    def of_nodes(
        cls, nodes: Sequence[dict[str, Any]], actors: int | None, device: str | None
    ) -> "Cluster":
        """Return the actors that fit the resources of some nodes."""
        gpus = int(sum(node.get("GPU", 0) for node in nodes))
        device = (device or ("cuda" if gpus else "cpu")).partition(":")[0]
        cores = [int(node["CPU"]) for node in nodes if node.get("CPU")]
        most, what = (gpus, "GPUs") if device == "cuda" else (sum(cores), "CPU cores")
        actors = actors or (gpus if device == "cuda" else len(cores))
        if not 0 < actors <= most:
            raise ConfigError(
                f"ray_actors: expected 1 to {most}, the {what} of the Ray cluster, got {actors}"
            )
        if device == "cuda":
            shares = [int(node.get("CPU", 0) // node["GPU"]) for node in nodes if node.get("GPU")]
            return cls(device, actors, min(shares))
        shares = range(1, max(cores) + 1)
        fits = [share for share in shares if sum(count // share for count in cores) >= actors]
        return cls(device, actors, fits[-1])

    def check_precision(self, encoder: Encoder) -> None:
        """Raise ConfigError if 'auto' was decided for another kind of device."""
        if encoder.device.type != self.device:
            raise ConfigError(
                f"precision: expected fp32, bf16 or fp16, since 'auto' is the precision of this "
                f"machine's device, {encoder.device.type}, and the actors use {self.device}"
            )

    def embed(self, job: Job, missing: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Encode shards; yield the numbers of images and of skipped images of each task."""
        import ray
        from ray.exceptions import RayTaskError
        from ray.util import ActorPool

        size = max(1, min(SHARDS_IN_TASK, len(missing) // (TASKS_FOR_ACTOR * self.actors)))
        tasks = [missing[i : i + size] for i in range(0, len(missing), size)]
        is_here = job.encoder.device.type == "cpu"
        model = job.encoder.model if is_here else copy.deepcopy(job.encoder.model).cpu()
        stored = ray.put(replace(job, encoder=replace(job.encoder, model=model)))
        actor = ray.remote(ShardActor).options(
            num_cpus=self.cores,
            num_gpus=1 if self.device == "cuda" else 0,
            max_restarts=-1,
            max_task_retries=-1,
        )
        count = min(self.actors, len(tasks))
        pool = ActorPool([actor.remote(stored, self.device, self.cores) for _ in range(count)])
        try:
            yield from pool.map_unordered(lambda actor, task: actor.embed.remote(task), tasks)
        except RayTaskError as error:
            raise error.cause from None
