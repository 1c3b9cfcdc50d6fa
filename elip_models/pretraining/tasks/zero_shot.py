"""Zero-shot classification: the class whose texts are most similar to the image.

The feature of a class is the normalised mean of the features of its name in all templates. An image
is correct at k if its class is among the k most similar. Ties count against the model, as in
`retrieval`, except between classes with the same name. Images are encoded without text.
Source: CLIP (Radford et al., 2021), section 3.1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from elip_models.analysis.ranking import ranks_of, similarities
from elip_models.intervals import score_interval
from elip_models.pretraining.data import ClassSource, open_classes
from elip_models.pretraining.tasks.features import (
    Progress,
    check_features,
    encode_images,
    encode_texts,
    no_progress,
)
from elip_models.pretraining.tasks.task import EvaluationRun, EvaluationTask, TaskScores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from elip_models.pretraining.data.class_sources import Template
    from elip_models.pretraining.models.base import PretrainedModel

KS = (1, 5)


@dataclass(frozen=True)
class ZeroShot(EvaluationTask):
    """Classification of images by the names of their classes: top-1 and top-5 accuracy."""

    name: ClassVar[str] = "zero_shot"

    def open(self, spec: str, *, image_size: int) -> ClassSource:
        """Open images with one class each."""
        return open_classes(spec, image_size=image_size)

    def check(self, model: "PretrainedModel") -> None:
        """Raise ValueError unless the model has features to rank."""
        check_features(model)

    def score(self, run: EvaluationRun) -> TaskScores:
        """Classify all images by the names of the classes."""
        images, classes_of_images = encode_images(run.model, run.batches)
        source = run.source
        classes = class_features(
            run.model,
            run.tokenizer,
            source.names,
            source.templates,
            run.loading.batch_size,
            run.loading.progress,
        )
        labels = torch.tensor([source.classes.index(name) for (name,) in classes_of_images])
        labels = labels.to(images.device)
        # of classes with the same name, of which ImageNet has two pairs, the first is predicted
        names = torch.tensor([source.names.index(name) for name in source.names])
        relevant = (names[:, None] == names).triu().to(images.device)[labels]
        ranks = ranks_of(similarities(images, classes), relevant).cpu().numpy()
        return TaskScores(
            task=self.name,
            scores={f"top{k}": score_interval(ranks < k) for k in KS},
            baselines={"chance": {f"top{k}": min(1.0, k / len(classes)) for k in KS}},
            num_examples=len(labels),
            notes={"classes": str(len(classes))},
        )


def class_features(
    model: "PretrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    names: Sequence[str],
    templates: Sequence["Template"],
    batch_size: int = 64,
    progress: Progress = no_progress,
) -> Tensor:
    """Return the normalised mean features (classes, E) fp32 of each name in all templates."""
    texts = [template(name) for name in names for template in templates]
    features = encode_texts(model, tokenizer, texts, batch_size, progress)
    return F.normalize(features.unflatten(0, (len(names), -1)).mean(1), dim=-1)
