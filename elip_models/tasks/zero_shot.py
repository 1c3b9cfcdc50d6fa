"""Zero-shot classification: an image is of the class whose texts are most like it.

A class is the normalised mean of its name's features in all templates; an image is right at k when
its class is among the k most similar, a tie decided against the model unless the names are one.
Images are encoded without any text.
Source: CLIP (Radford et al., 2021), section 3.1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from elip_kernels.autocast import no_autocast
from elip_models.data import ClassSource, evaluation_batches
from elip_models.models.base import eval_mode
from elip_models.tasks.features import encode_images, encode_texts, ranks_of
from elip_models.tasks.task import Loading, read_all

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from elip_models.data.classes import Template
    from elip_models.models.base import PretrainedModel

KS = (1, 5)
CHUNK = 1024  # images whose similarities exist at once


@dataclass(frozen=True)
class ZeroShotScores:
    """How often a model finds the class of an image by its name.

    Args:
        accuracies: in [0, 1] by name: "zero_shot_top1", "zero_shot_top5".
        chance: same names, of a random ranking.
        num_images: images classified.
        num_classes: classes.
        num_skipped: images that could not be read.
    """

    accuracies: dict[str, float]
    chance: dict[str, float]
    num_images: int
    num_classes: int
    num_skipped: int = 0

    @property
    def metrics(self) -> dict[str, float]:
        """What a log shows."""
        return self.accuracies

    def summary(self) -> str:
        """Both accuracies, in words."""
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
) -> ZeroShotScores:
    """Classifies all images of a source by the names of its classes.

    The model is put in eval mode and back; the state of the random generators is untouched.

    Args:
        model: one that `ranks`; its config says how images and texts are prepared.
        tokenizer: of the model.
        source: images and their classes, as `open_classes` gives them.
        batch_size: images, and texts, a forward pass.
        num_workers: loader processes; 0 loads here.
        max_bad_share: a larger share of unreadable images is an error.

    Raises:
        DataError: too many images cannot be read, or all.
    """
    loading = Loading(batch_size, num_workers, max_bad_share)
    batches, report = read_all(evaluation_batches, model, source, loading)
    with eval_mode(model):
        images, found = encode_images(model, batches)
        classes = class_features(
            model, tokenizer, source.names, source.templates, batch_size=batch_size
        )
    number = {name: i for i, name in enumerate(source.classes)}
    labels = torch.tensor([number[name] for (name,) in found], device=images.device)
    ranks = _ranks(images, classes, labels, source.names)
    return ZeroShotScores(
        accuracies={f"zero_shot_top{k}": (ranks < k).double().mean().item() for k in KS},
        chance={f"zero_shot_top{k}": min(1.0, k / len(classes)) for k in KS},
        num_images=len(labels),
        num_classes=len(classes),
        num_skipped=len(report.reasons),
    )


def _ranks(images: Tensor, classes: Tensor, labels: Tensor, names: Sequence[str]) -> Tensor:
    """Classes that rank before an image's own (I,) -> (I,); one of the same name does if it comes
    earlier, as the first of equal scores is taken: two of ImageNet's names are of two classes.
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
) -> Tensor:
    """The mean features of each name in all templates -> (classes, E) fp32, normalised."""
    texts = [template(name) for name in names for template in templates]
    features = encode_texts(model, tokenizer, texts, batch_size)
    return F.normalize(features.unflatten(0, (len(names), -1)).mean(1), dim=-1)
