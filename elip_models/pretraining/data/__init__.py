"""Data: sources of images with captions, transforms, tokenizers and resumable loaders."""

from elip_models.validation import DataError, require_extra

with require_extra("elip_models.pretraining.data"):
    from elip_models.analysis.answer_scores import soft_scores
    from elip_models.pretraining.data.caption_rules import apply_caption_rule
    from elip_models.pretraining.data.class_sources import ClassSource, open_classes
    from elip_models.pretraining.data.derived_sources import MixedSource
    from elip_models.pretraining.data.json_source import JsonSource
    from elip_models.pretraining.data.loader import EvaluationBatch, evaluation_batches
    from elip_models.pretraining.data.read_errors import SkipReport, check_source
    from elip_models.pretraining.data.readers import open_examples, open_source
    from elip_models.pretraining.data.samples import (
        Example,
        ExampleSource,
        NamedMasks,
        Sample,
        Source,
    )
    from elip_models.pretraining.data.scenes import EmojiScenes, render
    from elip_models.pretraining.data.shard_source import ShardSource
    from elip_models.pretraining.data.stream_batches import StreamBatches, stream_loader
    from elip_models.pretraining.data.streams import StreamSource, is_stream, open_stream
    from elip_models.pretraining.data.tokenizer import load_tokenizer, tokenize, train_tokenizer
    from elip_models.pretraining.data.training_samples import (
        EpochSampler,
        TrainingSamples,
        apply_seeded,
        train_loader,
    )
    from elip_models.pretraining.data.transforms import image_transform

__all__ = [
    "ClassSource",
    "DataError",
    "EmojiScenes",
    "EpochSampler",
    "EvaluationBatch",
    "Example",
    "ExampleSource",
    "JsonSource",
    "MixedSource",
    "NamedMasks",
    "Sample",
    "ShardSource",
    "SkipReport",
    "Source",
    "StreamBatches",
    "StreamSource",
    "TrainingSamples",
    "apply_caption_rule",
    "apply_seeded",
    "check_source",
    "evaluation_batches",
    "image_transform",
    "is_stream",
    "load_tokenizer",
    "open_classes",
    "open_examples",
    "open_source",
    "open_stream",
    "render",
    "soft_scores",
    "stream_loader",
    "tokenize",
    "train_loader",
    "train_tokenizer",
]
