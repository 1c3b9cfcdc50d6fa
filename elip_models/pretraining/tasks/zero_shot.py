"""Zero-shot classification: the class whose texts are most similar to the image.

The feature of a class is the normalised mean of the features of its name in all templates. An image
is correct at k if its class is among the k most similar. Ties count against the model, as in
`retrieval`, except between classes with the same name. Images are encoded without text.
Source: CLIP (Radford et al., 2021), section 3.1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from elip_kernels.autocast import no_autocast
from elip_models.intervals import Interval, score_interval
from elip_models.pretraining.data import ClassSource, evaluation_batches
from elip_models.pretraining.models.base import eval_mode
from elip_models.pretraining.tasks.features import encode_images, encode_texts, ranks_of
from elip_models.pretraining.tasks.task import Loading, Progress, no_progress, read_all

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from elip_models.pretraining.data.class_sources import Template
    from elip_models.pretraining.models.base import PretrainedModel

KS = (1, 5)
CHUNK = 1024  # images in one similarity matrix


@dataclass(frozen=True)
class ZeroShotScores:
    """Zero-shot accuracies in [0, 1] of a model, by name."""

    accuracies: dict[str, float]  # "zero_shot_top1", "zero_shot_top5"
    chance: dict[str, float]  # accuracies of a random ranking
    num_images: int
    num_classes: int
    intervals: dict[str, Interval]  # 95%, of the accuracies
    num_skipped: int = 0  # images that could not be read

    @property
    def metrics(self) -> dict[str, float]:
        """Accuracies by name, for logs."""
        return self.accuracies

    def summary(self) -> str:
        """Return one line with both accuracies."""
        return "zero-shot " + ", ".join(
            f"top-{k} {self.accuracies[f'zero_shot_top{k}']:.1%}" for k in KS
        )


def evaluate_zero_shot(
    model: "PretrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    source: ClassSource,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    max_bad_share: float = 0.05,
    progress: Progress = no_progress,
) -> ZeroShotScores:
    """Classify all images of a source by the names of its classes.

    The model is evaluated in eval mode, and its mode and the random state are restored.

    Args:
        model: A model with image and text features. Its config sets the preprocessing.
        tokenizer: Tokenizer of the model.
        source: Images and their classes, as `open_classes` returns them.
        batch_size: Images, and texts, in one forward pass.
        num_workers: Worker processes; 0 loads in this process.
        max_bad_share: Largest allowed share of unreadable images.
        progress: Called after each batch.

    Raises:
        DataError: More images are unreadable, or all of them.
    """
    loading = Loading(batch_size, num_workers, max_bad_share, progress)
    batches, report = read_all(evaluation_batches, model, source, loading)
    with eval_mode(model):
        images, found = encode_images(model, batches)
        options = {"batch_size": batch_size, "progress": progress}
        classes = class_features(model, tokenizer, source.names, source.templates, **options)
    number = {name: i for i, name in enumerate(source.classes)}
    labels = torch.tensor([number[name] for (name,) in found], device=images.device)
    ranks = _ranks(images, classes, labels, source.names)
    intervals = {f"zero_shot_top{k}": score_interval((ranks < k).cpu().numpy()) for k in KS}
    return ZeroShotScores(
        accuracies={name: found.mean for name, found in intervals.items()},
        chance={f"zero_shot_top{k}": min(1.0, k / len(classes)) for k in KS},
        num_images=len(labels),
        num_classes=len(classes),
        intervals=intervals,
        num_skipped=len(report.reasons),
    )


def _ranks(images: Tensor, classes: Tensor, labels: Tensor, names: Sequence[str]) -> Tensor:
    """Return (I,): the number of classes that rank before the own class of each image.

    A class with the same name ranks before it only if it is listed earlier, since the first of
    equal scores is taken. ImageNet has two pairs of such classes.
    """
    numbers = torch.tensor([names.index(name) for name in names], device=labels.device)
    places = torch.arange(len(names), device=labels.device)
    same = (numbers[:, None] == numbers) & (places[:, None] <= places)
    chunks = zip(images.split(CHUNK), labels.split(CHUNK), strict=True)
    with no_autocast(images):
        return torch.cat([ranks_of(each @ classes.T, same[own]) for each, own in chunks])


def class_features(
    model: "PretrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    names: Sequence[str],
    templates: Sequence["Template"],
    *,
    batch_size: int = 64,
    progress: Progress = no_progress,
) -> Tensor:
    """Return the normalised mean features (classes, E) fp32 of each name in all templates."""
    texts = [template(name) for name in names for template in templates]
    features = encode_texts(model, tokenizer, texts, batch_size, progress)
    return F.normalize(features.unflatten(0, (len(names), -1)).mean(1), dim=-1)
