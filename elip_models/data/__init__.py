"""Data: sources of images with captions, transforms, tokenizers and resumable loaders."""

from elip_models.validation import extra

with extra("elip_models.data"):
    from elip_models.data.caption_rules import apply_caption_rule
    from elip_models.data.classes import ClassFolder, ClassSource, EmojiClasses, open_classes
    from elip_models.data.examples import Example, ExampleSource
    from elip_models.data.loader import (
        EpochSampler,
        EvaluationBatch,
        ExampleBatch,
        ImageTextDataset,
        evaluation_batches,
        example_batches,
        train_loader,
    )
    from elip_models.data.readers import JsonSource, MixedSource, ShardSource, open_source
    from elip_models.data.sample import NamedMasks, Sample, SampleError, Source
    from elip_models.data.scenes import EmojiScenes, render
    from elip_models.data.skips import DataError, SkipReport, check_source
    from elip_models.data.tokenizer import load_tokenizer, tokenize, train_tokenizer
    from elip_models.data.training_samples import TrainingSamples, drawn
    from elip_models.data.transforms import CLIP_MEAN, CLIP_STD, image_transform
    from elip_models.data.world import BACKGROUNDS, EMOJI, Group, Scene

__all__ = [
    "BACKGROUNDS",
    "CLIP_MEAN",
    "CLIP_STD",
    "EMOJI",
    "ClassFolder",
    "ClassSource",
    "DataError",
    "EmojiClasses",
    "EmojiScenes",
    "EpochSampler",
    "EvaluationBatch",
    "Example",
    "ExampleBatch",
    "ExampleSource",
    "Group",
    "ImageTextDataset",
    "JsonSource",
    "MixedSource",
    "NamedMasks",
    "Sample",
    "SampleError",
    "Scene",
    "ShardSource",
    "SkipReport",
    "Source",
    "TrainingSamples",
    "apply_caption_rule",
    "check_source",
    "drawn",
    "evaluation_batches",
    "example_batches",
    "image_transform",
    "load_tokenizer",
    "open_classes",
    "open_source",
    "render",
    "tokenize",
    "train_loader",
    "train_tokenizer",
]
