"""What a recipe trains on, as its model reads it: samples, and captions for a tokenizer."""

import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from elip_models.data import (
    ExampleSource,
    ImageTextPreparation,
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
from elip_models.data.readers import Spec
from elip_models.models.base import PretrainedModel
from elip_models.models.config import VisionConfig
from elip_models.models.registry import create_model
from elip_models.tasks.registry import get_task
from elip_models.tasks.task import SampleReader, Task
from elip_models.training.run_config import DataConfig, RunConfig
from elip_models.training.run_folder import RunFolder
from elip_models.validation import ConfigError, as_config_error

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase

MAX_TOKENIZER_SAMPLES = 50_000
MAX_COUNTED_SAMPLES = 1_000


def input_fields(data: DataConfig) -> dict[str, str]:
    """The fields of `InputConfig` that a recipe sets."""
    fields = {"captions": data.captions, "resize": data.resize}
    return {name: value for name, value in fields.items() if value is not None}


def meta_model(config: RunConfig) -> PretrainedModel:
    """A recipe's model without its weights, to be read alone: recipes that agree share one."""
    with as_config_error("model"):
        fields = input_fields(config.data) | config.model.overrides
        return _meta_model(config.model.name, config.task, json.dumps(fields))


@lru_cache(256)
def _meta_model(name: str, task: str | None, fields: str) -> PretrainedModel:
    with torch.device("meta"):
        return create_model(name, task=task, **json.loads(fields))


def model_config(config: RunConfig) -> VisionConfig:
    """The config of a recipe's model."""
    return meta_model(config).config


def task_of(config: RunConfig) -> Task | None:
    """The downstream task of a recipe; None in pre-training."""
    if config.task is None:
        return None
    with as_config_error("task"):
        return get_task(config.task, **config.task_options)


def open_samples(
    config: RunConfig, spec: Spec | Sequence[Spec], image_size: int
) -> Source | ExampleSource:
    """The data that `spec` names, as the recipe's task, or pre-training, reads it."""
    task = task_of(config)
    if task is None:
        return open_source(spec, image_size=image_size)
    return task.open(spec, image_size=image_size)


def open_training(config: RunConfig, image_size: int) -> Source | ExampleSource | StreamSource:
    """The data that a recipe trains on: in pre-training it may be a stream, alone."""
    specs = config.data.train
    specs = specs if isinstance(specs, tuple) else (specs,)
    if not any(map(is_stream, specs)):
        return open_samples(config, config.data.train, image_size)
    if config.task is not None:
        raise ValueError(f"expected data on disk for {config.task}, got a stream")
    if len(specs) > 1:
        raise ValueError(
            f"expected a stream alone, since its samples have no numbers to be mixed by, got "
            f"{len(specs)} sources; one stream may have several URLs"
        )
    if config.data.weights is not None:
        raise ValueError("expected data.weights: null with a stream, whose samples say an epoch")
    return open_stream(specs[0])


def preparation(
    config: RunConfig,
    model: VisionConfig,
    source: Source | ExampleSource | StreamSource,
    tokenizer: "PreTrainedTokenizerBase",
) -> Callable[[Any, int, np.random.Generator], dict[str, Tensor]]:
    """What makes a training sample of one of `source`: augmented as the recipe says, prepared as
    the config `model`, and the task, say.
    """
    data, task = config.data, task_of(config)
    transform = image_transform(
        model.image_size,
        train=True,
        scale=data.crop_scale,
        flip=data.flip,
        randaugment=data.randaugment,
        resize=model.resize,
    )
    if task is not None:
        reading = SampleReader(source, transform, tokenizer, model, data.context_length)
        return partial(task.sample, reading)
    return ImageTextPreparation(
        transform,
        tokenizer,
        context_length=data.context_length,
        captions=model.captions,
        guide_captions=model.reads_guide_captions,
    )


def check_guide_captions(model: VisionConfig, source: Source | StreamSource) -> None:
    """Warn where some images of `source` have no second caption, and the model takes one. Of many,
    a thousand are read.

    Raises:
        ValueError: none of them has.
    """
    if not model.reads_guide_captions:
        return
    captions = [set(each) for each in some_captions(source, MAX_COUNTED_SAMPLES)]
    lonely = sum(len(each) < 2 for each in captions) / len(captions)
    if lonely == 1:
        raise ValueError("expected 'own', since no image has a second caption, got 'other'")
    if lonely:
        warnings.warn(
            f"guide='other': {lonely:.0%} of the images have one caption, which guides them itself",
            stacklevel=2,
        )


def make_tokenizer(
    config: RunConfig,
    source: Source | ExampleSource | StreamSource,
    model: VisionConfig,
    folder: RunFolder,
    accelerator: "Accelerator",
) -> "PreTrainedTokenizerBase":
    """The tokenizer that a recipe names, or one that the first process trains on the captions, and
    keeps in the run's folder.
    """
    data = config.data
    if data.tokenizer != "train":
        with as_config_error("data.tokenizer"):
            return load_tokenizer(data.tokenizer)
    if config.task is not None:
        raise ConfigError(
            "data.tokenizer: expected the folder of the pre-trained model's, got 'train', "
            "which makes another"
        )
    with accelerator.main_process_first(), as_config_error("data.vocab_size"):
        if not folder.tokenizer.exists():
            captions = tokenizer_captions(source, model)
            folder.save_tokenizer(train_tokenizer(captions, data.vocab_size).save_pretrained)
    return load_tokenizer(str(folder.tokenizer))


def tokenizer_captions(source: Source | StreamSource, model: VisionConfig) -> Iterator[str]:
    """The captions of at most 50,000 samples as a tokenizer reads them."""
    for captions in some_captions(source, MAX_TOKENIZER_SAMPLES):
        for caption in captions:
            yield apply_caption_rule(caption, model.captions)


def some_captions(source: Source | StreamSource, count: int) -> Iterator[tuple[str, ...]]:
    """Those of at most `count` samples, spread over the source; of a stream, of the first."""
    if isinstance(source, StreamSource):
        return source.first_captions(count)
    stride = math.ceil(len(source) / count)
    return (source.captions(index) for index in range(0, len(source), stride))
