"""The check before a long run: some images encoded dense and reduced, and the saved time."""

import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import Tensor

from elip_models.analysis.feature_measures import NEIGHBOURS, cosine, neighbours
from elip_models.embedding.decoding import decoded_sample
from elip_models.embedding.encoder import Encoder, dense_of
from elip_models.embedding.image_source import ImageSource
from elip_models.profiling.measure import no_gain, time_side_by_side
from elip_models.tasks.intervals import Interval, bootstrap_interval
from elip_models.validation import ConfigError

ROUNDS = 3


@dataclass(frozen=True)
class EmbeddingCheck:
    """What reduction changes on some images of a collection.

    Attributes:
        images: the number of images that were encoded dense and reduced.
        cosine: mean cosine of dense and reduced embeddings, with its 95% confidence interval.
        neighbours: mean share of the ten nearest neighbours among these images that stay; None for
            ten images or fewer.
        time_ratio: time of a batch in the reduced model, divided by that in the dense model.
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
            text += f", {self.neighbours:.2f} of the ten nearest neighbours"
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
    dense = dense_of(encoder)
    features = [_features(each, batch.pixels, batch_size) for each in (dense, encoder)]
    some = batch.pixels[:batch_size]
    steps = {"dense": partial(dense, some), "reduced": partial(encoder, some)}
    times = time_side_by_side(steps, device=encoder.device, rounds=ROUNDS)
    seconds = {name: min(each) / len(some) for name, each in times.items()}
    whole = {name: len(source) * max(each, decoding) for name, each in seconds.items()}
    found = len(batch.rows)
    return EmbeddingCheck(
        images=found,
        cosine=bootstrap_interval(cosine(*features).double().numpy()),
        neighbours=neighbours(*features).mean().item() if found > NEIGHBOURS else None,
        time_ratio=seconds["reduced"] / seconds["dense"],
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


def _features(encoder: Encoder, pixels: Tensor, batch_size: int) -> Tensor:
    """Return features (n, D) on the CPU."""
    return torch.cat([encoder(each).cpu() for each in pixels.split(batch_size)])


def _duration(seconds: float) -> timedelta:
    """Return whole seconds, which print as 0:05:12."""
    return timedelta(seconds=round(seconds))
