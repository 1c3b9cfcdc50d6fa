"""Features of images and texts, each encoded alone, for evaluation.

An image is never encoded with its own text: if a text guided the reduction of its image, the kept
tokens would reveal which image belongs to the text.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from elip_models.user_warnings import UnguidedWarning, ignoring

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from elip_models.pretraining.data import EvaluationBatch
    from elip_models.pretraining.models.base import PretrainedModel

Progress = Callable[[str, int, int], object]
"""Called with what is counted, such as "sample", how many of them are done, and their number."""


def no_progress(unit: str, done: int, total: int) -> None:
    """Show nothing."""


def check_features(model: "PretrainedModel") -> None:
    """Raise ValueError unless the model has features of images and texts alone to rank."""
    if not model.ranks:
        raise ValueError(
            f"model: expected one with features to rank, got {type(model).__name__}, which has "
            "none of images and texts alone; for retrieval, METER needs --rerank"
        )


def isolated_rng(device: torch.device) -> AbstractContextManager[None]:
    """Return a context that restores the state of the random generators at its end."""
    if device.type == "cpu":
        return torch.random.fork_rng([])
    return torch.random.fork_rng([device], device_type=device.type)


@torch.no_grad()
def encode_images(
    model: "PretrainedModel", batches: Iterable["EvaluationBatch"]
) -> tuple[Tensor, list[tuple[str, ...]]]:
    """Return features (num_images, E) fp32 and the captions of each image."""
    device = next(model.parameters()).device
    features, captions = [], []
    with ignoring(UnguidedWarning), isolated_rng(device):
        for batch in batches:
            features.append(model.image_features(batch.images.to(device)).float())
            captions += [sample.captions for sample in batch.samples]
    return torch.cat(features), captions


@torch.no_grad()
def encode_texts(
    model: "PretrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    texts: list[str],
    batch_size: int,
    progress: Progress = no_progress,
) -> Tensor:
    """Return features (num_texts, E) fp32."""
    device = next(model.parameters()).device
    features = []
    with ignoring(UnguidedWarning), isolated_rng(device):
        for start in range(0, len(texts), batch_size):
            chunk = texts[start : start + batch_size]
            tokens = model.tokenise(tokenizer, chunk)
            tokens = {name: ids.to(device) for name, ids in tokens.items()}
            features.append(model.text_features(**tokens).float())
            progress("text", start + len(chunk), len(texts))
    return torch.cat(features)
