"""Data: sources of images with captions, transforms, tokenizers and resumable loaders."""

from .checks import extra

with extra("train", "elip_models.data"):
    from .loader import (
        EpochSampler,
        EvaluationBatch,
        ImageTextDataset,
        evaluation_batches,
        train_loader,
    )
    from .readers import JsonSource, ShardSource, open_source
    from .sample import Sample, SampleError, Source
    from .scenes import EmojiScenes, render
    from .skips import DataError, SkipReport, check_source
    from .tokenizer import load_tokenizer, train_tokenizer
    from .transforms import CLIP_MEAN, CLIP_STD, image_transform
    from .world import BACKGROUNDS, EMOJI, Group, Scene

__all__ = [
    "BACKGROUNDS",
    "CLIP_MEAN",
    "CLIP_STD",
    "EMOJI",
    "DataError",
    "EmojiScenes",
    "EpochSampler",
    "EvaluationBatch",
    "Group",
    "ImageTextDataset",
    "JsonSource",
    "Sample",
    "SampleError",
    "Scene",
    "ShardSource",
    "SkipReport",
    "Source",
    "check_source",
    "evaluation_batches",
    "image_transform",
    "load_tokenizer",
    "open_source",
    "render",
    "train_loader",
    "train_tokenizer",
]
