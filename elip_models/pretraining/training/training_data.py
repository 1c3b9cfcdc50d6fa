"""The training data of a recipe, prepared for its model, and captions for a tokenizer."""

import json
import math
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from elip_models.pretraining.data import (
    ExampleSource,
    Source,
    StreamSource,
    apply_caption_rule,
    image_transform,
    is_stream,
    load_tokenizer,
    open_source,
    open_stream,
    train_tokenizer,
)
from elip_models.pretraining.models.base import PretrainedModel
from elip_models.pretraining.models.config import VisionConfig
from elip_models.pretraining.models.registry import create_model
from elip_models.pretraining.tasks.registry import get_task
from elip_models.pretraining.tasks.task import Preprocessor, Task, image_with_caption
from elip_models.pretraining.training.run_config import DataConfig, RunConfig
from elip_models.pretraining.training.run_folder import RunFolder
from elip_models.rank_barrier import RankBarrier
from elip_models.validation import ConfigError, as_config_error, require_extra

with require_extra("elip_models.pretraining.training"):
    from rich.console import Console

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_TOKENIZER_SAMPLES = 50_000


def input_fields(data: DataConfig) -> dict[str, str]:
    """Return the fields of `VisionConfig` that a recipe sets."""
    fields = {"captions": data.captions, "max_words": data.max_words, "resize": data.resize}
    return {name: value for name, value in fields.items() if value is not None}


def meta_model(config: RunConfig) -> PretrainedModel:
    """Return a recipe's model on the meta device; equal recipes share it, so do not change it."""
    with as_config_error("model"):
        fields = input_fields(config.data) | config.model.overrides
        return _meta_model(config.model.name, config.task, json.dumps(fields))


@lru_cache(256)
def _meta_model(name: str, task: str | None, fields: str) -> PretrainedModel:
    with torch.device("meta"):
        return create_model(name, task=task, **json.loads(fields))


def task_of(config: RunConfig) -> Task | None:
    """Return the downstream task of a recipe; None in pre-training."""
    if config.task is None:
        return None
    with as_config_error("task"):
        return get_task(config.task, **config.task_options)


def open_training_data(config: RunConfig, image_size: int) -> Source | ExampleSource | StreamSource:
    """Open the training data of a recipe; in pre-training it may be one stream."""
    specs = config.data.train
    specs = specs if isinstance(specs, tuple) else (specs,)
    if not any(map(is_stream, specs)):
        task = task_of(config)
        if task is None:
            return open_source(config.data.train, image_size=image_size)
        source = task.open(config.data.train, image_size=image_size)
        return task.training_source(source, meta_model(config).config)
    if config.task is not None:
        raise ValueError(f"expected data on disk for {config.task}, got a stream")
    if len(specs) > 1:
        raise ValueError(
            f"expected one stream alone, since streams cannot be mixed, got {len(specs)} sources; "
            "one stream may have several URLs"
        )
    if config.data.weights is not None:
        raise ValueError("expected data.weights: null with a stream, which is not mixed")
    return open_stream(specs[0])


def make_preparation(
    config: RunConfig,
    model: VisionConfig,
    source: Source | ExampleSource | StreamSource,
    tokenizer: "PreTrainedTokenizerBase",
) -> Callable[[Any, int, np.random.Generator], dict[str, Tensor]]:
    """Return the function that prepares a training sample, with the recipe's augmentation."""
    data, task = config.data, task_of(config)
    transform = image_transform(
        model.image_size,
        train=True,
        scale=data.crop_scale,
        flip=data.flip,
        randaugment=data.randaugment,
        randaugment_policy=data.randaugment_policy,
        resize=model.resize,
    )
    preprocessor = Preprocessor(source, transform, tokenizer, model, data.context_length)
    return partial(image_with_caption if task is None else task.sample, preprocessor)


def make_tokenizer(
    config: RunConfig,
    source: Source | ExampleSource | StreamSource,
    model: VisionConfig,
    folder: RunFolder,
    barrier: RankBarrier,
    console: Console,
) -> "PreTrainedTokenizerBase":
    """Return the tokenizer that a recipe names, or train one on the captions.

    The main process trains it and writes it to the run's folder.
    """
    data = config.data
    if data.tokenizer != "train":
        with as_config_error("data.tokenizer"):
            return load_tokenizer(data.tokenizer)
    if config.task is not None:
        raise ConfigError(
            "data.tokenizer: expected the folder of the pre-trained model's tokenizer, got "
            "'train', which trains a new one"
        )
    path = folder.trained_tokenizer()
    if barrier.is_main_process and not path.exists():
        with as_config_error("data.vocab_size"):
            captions = tokenizer_captions(source, model, console)
            train_tokenizer(captions, data.vocab_size).save_pretrained(path)
    barrier.wait()
    return load_tokenizer(str(path))


def tokenizer_captions(
    source: Source | StreamSource, model: VisionConfig, console: Console | None = None
) -> Iterator[str]:
    """Yield the cleaned captions of at most 50,000 samples, and print their number."""
    count = min(len(source), MAX_TOKENIZER_SAMPLES)
    if console is not None:
        console.print(f"training the tokenizer on the captions of up to {count} samples")
    for captions in sample_captions(source, count):
        for caption in captions:
            yield apply_caption_rule(caption, model.captions, model.max_words)


def sample_captions(source: Source | StreamSource, count: int) -> Iterator[tuple[str, ...]]:
    """Return the captions of at most `count` samples, evenly spaced, or the first of a stream."""
    if isinstance(source, StreamSource):
        return source.first_captions(count)
    stride = math.ceil(len(source) / count)
    return (source.captions(index) for index in range(0, len(source), stride))
