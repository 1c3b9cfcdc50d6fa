"""The check before a long run: some images encoded dense and reduced, and the saved time."""

import time
from dataclasses import dataclass, replace
from datetime import timedelta
from statistics import median

import torch

from elip_models.analysis.feature_measures import NEIGHBOURS, cosine, neighbours
from elip_models.embedding.decoding import decoded_sample
from elip_models.embedding.encoder import DENSE
from elip_models.embedding.shard import Job
from elip_models.intervals import Interval, bootstrap_interval
from elip_models.profiling.measure import no_gain, ratios_to
from elip_models.validation import ConfigError


@dataclass(frozen=True)
class EmbeddingCheck:
    """What reduction changes on some images of a collection.

    Attributes:
        images: the number of images that were encoded dense and reduced.
        cosine: mean cosine of dense and reduced embeddings, with its 95% confidence interval.
        neighbours: mean share of the ten nearest neighbours among these images that stay; None for
            ten images or fewer.
        time_ratio: time of a batch in the reduced model, divided by that in the dense model, the
            median over the batches.
        dense_seconds: expected time of one process for the whole collection in the dense model.
        reduced_seconds: the same in the reduced model.
        collection: the number of images of the collection.
    """

    images: int
    cosine: Interval
    neighbours: float | None
    time_ratio: float
    dense_seconds: float
    reduced_seconds: float
    collection: int

    def __str__(self) -> str:
        mean, low, high = self.cosine.mean, self.cosine.low, self.cosine.high
        kept = "" if self.neighbours is None else f", neighbours kept {self.neighbours:.2f}"
        saved = self.dense_seconds - self.reduced_seconds
        gain = "no gain" if no_gain(self.time_ratio) else f"{_duration(saved)} saved"
        return (
            f"{self.images} images dense and reduced: cosine {mean:.4f} (95% CI {low:.4f} to "
            f"{high:.4f}){kept}; {self.time_ratio:.2f} of the dense time of a batch\n"
            f"{self.collection} images take about {_duration(self.reduced_seconds)} reduced, "
            f"{_duration(self.dense_seconds)} dense, in one process: {gain}"
        )


def check_reduction(job: Job) -> EmbeddingCheck:
    """Encode `check` images of a collection dense and reduced, and time both.

    Both encode a batch before the next one, so that a slow phase of the machine affects both. The
    expected times assume that decoding and the model overlap, so that the slower one counts.

    Raises:
        ConfigError: no image can be read.
    """
    start = time.perf_counter()
    transform = job.encoder.preprocessing.transform
    batch = decoded_sample(job.source, job.options.check, transform, job.workers)
    decoding = (time.perf_counter() - start) / (len(batch.rows) + len(batch.skipped))
    if batch.pixels is None:
        row, reason = batch.skipped[0]
        raise ConfigError(
            f"source: expected readable images, got none among {len(batch.skipped)}: "
            f"{job.source.keys[row]}: {reason}"
        )
    encoders = {
        "dense": job.encoder.reduced(DENSE),
        "reduced": replace(job.encoder, compiled=False),
    }
    features = {name: [] for name in encoders}
    times = {name: [] for name in encoders}
    batches = batch.pixels.split(job.options.batch_size)
    for pixels in (batches[0], *batches):  # the first time of the first batch does not count
        for name, encoder in encoders.items():
            start = time.perf_counter()
            features[name].append(encoder(pixels).cpu())
            times[name].append((time.perf_counter() - start) / len(pixels))
    dense, reduced = (torch.cat(parts[1:]) for parts in features.values())
    times = {name: seconds[1:] for name, seconds in times.items()}
    seconds = {name: len(job.source) * max(median(times[name]), decoding) for name in times}
    return EmbeddingCheck(
        images=len(dense),
        cosine=bootstrap_interval(cosine(dense, reduced).double().numpy()),
        neighbours=neighbours(dense, reduced).mean().item() if len(dense) > NEIGHBOURS else None,
        time_ratio=ratios_to("dense", times)["reduced"],
        dense_seconds=seconds["dense"],
        reduced_seconds=seconds["reduced"],
        collection=len(job.source),
    )


def _duration(seconds: float) -> timedelta:
    """Return whole seconds, which print as 0:05:12."""
    return timedelta(seconds=round(seconds))
