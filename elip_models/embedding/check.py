"""The check before a long run: some images encoded dense and reduced, and the saved time."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from statistics import median
from typing import Any

import torch
from torch import Tensor

from elip_models.analysis.feature_measures import NEIGHBOURS, cosine, neighbours
from elip_models.embedding.decoding import decoded_sample
from elip_models.embedding.encoder import Encoder, dense_of
from elip_models.embedding.image_source import ImageSource
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
        dense_seconds: expected time of the whole collection in the dense model.
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
        text = f"cosine {mean:.4f} (95% CI {low:.4f} to {high:.4f})"
        if self.neighbours is not None:
            text += f", neighbours kept {self.neighbours:.2f}"
        saved = self.dense_seconds - self.reduced_seconds
        gain = "no gain" if no_gain(self.time_ratio) else f"{_duration(saved)} saved"
        return (
            f"{self.images} images dense and reduced: {text}; {self.time_ratio:.2f} of the dense "
            f"time of a batch\n{self.collection} images take about "
            f"{_duration(self.reduced_seconds)} reduced, {_duration(self.dense_seconds)} dense: "
            f"{gain}"
        )

    def as_json(self) -> dict[str, Any]:
        """Return all figures as plain data."""
        return asdict(self) | {"cosine": self.cosine._asdict()}


def check_reduction(
    encoder: Encoder, source: ImageSource, count: int, batch_size: int, workers: int
) -> EmbeddingCheck:
    """Encode up to `count` images of the source dense and reduced, and time both.

    The expected times assume that decoding and the model overlap, so that the slower one counts.

    Raises:
        ConfigError: none of the images can be read.
    """
    start = time.perf_counter()
    batch = decoded_sample(source, count, encoder.preprocessing.transform, workers)
    decoding = (time.perf_counter() - start) / batch.size
    if batch.pixels is None:
        row, reason = batch.skipped[0]
        raise ConfigError(
            f"source: expected readable images, got none among {batch.size}: {source.keys[row]}: "
            f"{reason}"
        )
    encoders = {"dense": dense_of(encoder), "reduced": encoder}
    features, times = _side_by_side(encoders, batch.pixels, batch_size)
    whole = {name: len(source) * max(median(each), decoding) for name, each in times.items()}
    found = len(batch.rows)
    return EmbeddingCheck(
        images=found,
        cosine=bootstrap_interval(cosine(*features).double().numpy()),
        neighbours=neighbours(*features).mean().item() if found > NEIGHBOURS else None,
        time_ratio=ratios_to("dense", times)["reduced"],
        dense_seconds=whole["dense"],
        reduced_seconds=whole["reduced"],
        collection=len(source),
    )


def check_cosine(found: EmbeddingCheck, min_cosine: float | None) -> None:
    """Raise ConfigError if the mean cosine is below `min_cosine`."""
    if min_cosine is not None and not found.cosine.mean >= min_cosine:
        raise ConfigError(
            f"min_cosine: expected a mean cosine of at least {min_cosine:g} between dense and "
            f"reduced embeddings, got {found.cosine.mean:.4f} on {found.images} images; "
            "raise keep, or let `elip calibrate` choose a reduction"
        )


def _side_by_side(
    encoders: Mapping[str, Encoder], pixels: Tensor, batch_size: int
) -> tuple[list[Tensor], dict[str, list[float]]]:
    """Return the features (n, D) of each encoder, and its seconds for an image of each batch.

    Both encode a batch before the next one, so that a slow phase of the machine affects both. The
    first batch is encoded twice, and the first time does not count.
    """
    features: dict[str, list[Tensor]] = {name: [] for name in encoders}
    times: dict[str, list[float]] = {name: [] for name in encoders}
    batches = pixels.split(batch_size)
    for encoder in encoders.values():
        encoder(batches[0]).cpu()
    for batch in batches:
        for name, encoder in encoders.items():
            start = time.perf_counter()
            features[name].append(encoder(batch).cpu())
            times[name].append((time.perf_counter() - start) / len(batch))
    return [torch.cat(each) for each in features.values()], times


def _duration(seconds: float) -> timedelta:
    """Return whole seconds, which print as 0:05:12."""
    return timedelta(seconds=round(seconds))
