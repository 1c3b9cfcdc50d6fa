"""Tasks on images of classes: the top-1 accuracy of a head, of a probe, or of texts.

head       the classifier's own logits, top-1 and top-5
zero-shot  the class whose texts are most similar to the image
probe      a linear probe of dense features that reads those of the reduced model
own-probe  a linear probe of the reduced model's own features, for users who fit theirs again

A probe is fitted on the images that choose. What these images themselves measure is cross-validated
in five folds.
"""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elip_models.analysis.model_features import Function, encode_texts, image_features
from elip_models.calibration.class_names import Template, prompt_templates
from elip_models.calibration.images import ImageTask
from elip_models.calibration.linear_probe import LinearProbe
from elip_models.calibration.task import Measure, Outputs, Part, ratio
from elip_models.validation import shortened

TOP = 5
FOLDS = 5
TOP1, OWN = "top-1", "top-1, own probe"


class ClassTask(ImageTask):
    """A task whose answer is one of several classes.

    Attributes:
        labels: (n,) int64 the class of each image.
        classes: the names of the classes, for reports.
    """

    measures: tuple[str, ...] = (TOP1,)

    def __init__(
        self,
        images: Tensor | Sequence[Tensor],
        labels: Tensor,
        *,
        classes: Sequence[str] | None = None,
        batch_size: int = 8,
    ) -> None:
        super().__init__(images, batch_size=batch_size)
        self.labels = _checked_labels(labels, len(images))
        count = int(self.labels.max()) + 1
        self.classes = list(map(str, range(count))) if classes is None else list(classes)
        if count > len(self.classes):
            raise ValueError(
                f"labels: expected numbers below {len(self.classes)}, one a class, got {count - 1}"
            )

    def groups(self) -> Sequence[int]:
        return self.labels.tolist()

    def truths(self, images: Sequence[int]) -> list[str]:
        return [self.classes[label] for label in self.labels[list(images)].tolist()]

    def check_above(self, correct: np.ndarray, chance: float, reader: str) -> None:
        """Raise ValueError if the dense model is right by chance, and has nothing to lose."""
        accuracy = correct.mean()
        if accuracy <= chance:
            raise ValueError(
                f"labels: expected classes that {reader} tells apart, got a top-1 of "
                f"{accuracy:.3f} of the dense model, where chance has {chance:.3f}; use the labels "
                "of these classes, more images or another model"
            )


class TopTask(ClassTask):
    """A task whose most likely classes are stored."""

    reader: ClassVar[str]

    def kept(self, computed: Tensor, numbers: Sequence[int]) -> Outputs:
        top = computed.topk(min(TOP, computed.shape[1]), dim=1).indices
        return {"top": top.to(torch.int32)}

    def measured(self, chosen_on: Part, held_back: Part | None = None) -> dict[str, Measure]:
        part = held_back or chosen_on
        hits = part.outputs["top"] == self.labels[list(part.images), None]
        hits = hits.numpy().astype(np.float64)
        if part.outputs is part.dense:
            self.check_above(hits[:, 0], 1 / len(self.classes), self.reader)
        right = {name: hits[:, : int(name[4:])].sum(1) for name in self.measures}
        return {name: _accuracy(values) for name, values in right.items()}

    def answers(self, images: Sequence[int], outputs: Outputs) -> list[str]:
        return [self.classes[i] for i in outputs["top"][:, 0].tolist()]


class Head(TopTask):
    """The classifier's own logits: top-1, and top-5 of more than five classes.

    Args:
        labels: (n,) int64 the number of each image's class in the head.
        classes: the name of each class of the head.
    """

    name: ClassVar[str] = "head"
    reader = "the head"

    def __init__(
        self,
        images: Tensor | Sequence[Tensor],
        labels: Tensor,
        *,
        classes: Sequence[str],
        batch_size: int = 8,
    ) -> None:
        super().__init__(images, labels, classes=classes, batch_size=batch_size)
        self.measures = (TOP1, "top-5") if len(classes) > TOP else (TOP1,)

    def forward(self, model: nn.Module, pixels: Tensor) -> Tensor:
        output = model(pixels)
        return output if isinstance(output, Tensor) else output.logits


class ZeroShot(TopTask):
    """The class whose texts are most similar to the image: top-1.

    The feature of a class is the normalised mean of those of its name in all templates.

    Args:
        model: a CLIP or SigLIP, dense, whose text tower embeds the names.
        tokenizer: of the model.
        labels: (n,) int64 the number of each image's class in `classes`.
        classes: the names, as texts use them.
        templates: functions from a name to a text.
    """

    name: ClassVar[str] = "zero-shot"
    reader = "the model"

    def __init__(
        self,
        images: Tensor | Sequence[Tensor],
        labels: Tensor,
        *,
        model: nn.Module,
        tokenizer: object,
        classes: Sequence[str],
        templates: Sequence[Template] | None = None,
        batch_size: int = 8,
    ) -> None:
        super().__init__(images, labels, classes=classes, batch_size=batch_size)
        templates = prompt_templates() if templates is None else templates
        self.texts = [[template(name) for template in templates] for name in classes]
        self.features, _ = image_features(model)
        self.of_classes = class_features(model, tokenizer, self.texts)

    def contents(self) -> dict[str, object]:
        return {**super().contents(), "texts": self.texts}

    def forward(self, model: nn.Module, pixels: Tensor) -> Tensor:
        features = F.normalize(self.features(model, pixels).float(), dim=-1)
        return features @ self.of_classes.to(features.device).T


def class_features(model: nn.Module, tokenizer: object, texts: Sequence[Sequence[str]]) -> Tensor:
    """Return (C, E) the normalised mean features of the texts of each class."""
    features = encode_texts(model, tokenizer, [text for of_class in texts for text in of_class])
    return F.normalize(features.unflatten(0, (len(texts), -1)).mean(1), dim=-1)


class Probe(ClassTask):
    """A linear probe of features: top-1.

    Args:
        labels: (n,) int64 the class of each image, from 0, at least ten images of each.
        features: the function of a model and images that returns their features.
        own: fit the probe on the features of the model that is measured, not on dense ones.
    """

    name: ClassVar[str] = "probe"
    least_of_group: ClassVar[int] = 2 * FOLDS

    def __init__(
        self,
        images: Tensor | Sequence[Tensor],
        labels: Tensor,
        *,
        features: Function,
        own: bool = False,
        classes: Sequence[str] | None = None,
        batch_size: int = 8,
    ) -> None:
        super().__init__(images, labels, classes=classes, batch_size=batch_size)
        numbers, counts = self.labels.unique(return_counts=True)
        if len(numbers) < 2:
            only = self.classes[int(self.labels[0])]
            raise ValueError(
                f"labels: expected at least two classes, got only {only!r}; add images of another "
                "class"
            )
        if counts.min() < self.least_of_group:
            rarest = self.classes[numbers[counts.argmin()]]
            raise ValueError(
                f"labels: expected at least {self.least_of_group} images of each class, half of "
                f"them in each part, got {counts.min()} of class {shortened(rarest)}; add images, "
                "or leave it out"
            )
        self.features, self.own = features, own
        self.measures = (OWN, TOP1) if own else (TOP1,)
        self._dense_probes: dict[tuple[tuple[int, ...], bool], list[LinearProbe]] = {}

    def forward(self, model: nn.Module, pixels: Tensor) -> Tensor:
        return self.features(model, pixels)

    def measured(self, chosen_on: Part, held_back: Part | None = None) -> dict[str, Measure]:
        part = held_back or chosen_on
        is_dense = part.outputs is part.dense
        measured = {TOP1: self._correct(chosen_on, held_back, own=False)}
        if self.own:
            measured[OWN] = (
                measured[TOP1] if is_dense else self._correct(chosen_on, held_back, own=True)
            )
        if is_dense:
            counts = self.labels[list(part.images)].bincount()
            most_frequent = counts.max().item() / len(part.images)
            self.check_above(measured[TOP1], most_frequent, "a linear probe of dense features")
        return {name: _accuracy(measured[name]) for name in self.measures}

    def _correct(self, chosen_on: Part, held_back: Part | None, *, own: bool) -> np.ndarray:
        """Return (n,) whether each image of the measured part is classified rightly."""
        fitted_on = self.labels[list(chosen_on.images)]
        folds = [] if held_back else _folds(fitted_on)
        key = tuple(chosen_on.images), held_back is not None
        if own:
            probes = _fit(chosen_on.outputs["features"], fitted_on, folds)
        else:
            if key not in self._dense_probes:
                self._dense_probes[key] = _fit(chosen_on.dense["features"], fitted_on, folds)
            probes = self._dense_probes[key]
        if held_back:
            labels = self.labels[list(held_back.images)]
            return probes[0].correct(held_back.outputs["features"], labels).numpy()
        correct = torch.empty(len(fitted_on), dtype=torch.double)
        for probe, fold in zip(probes, folds, strict=True):
            features = chosen_on.outputs["features"][fold]
            correct[fold] = probe.correct(features, fitted_on[fold])
        return correct.numpy()


def _folds(labels: Tensor) -> list[Tensor]:
    """Return the images of each fold, which has its share of every class."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    order = order[labels[order].argsort(stable=True)]
    return [order[i::FOLDS] for i in range(FOLDS)]


def _fit(features: Tensor, labels: Tensor, folds: Sequence[Tensor]) -> list[LinearProbe]:
    """Return the probe of all images without each fold, or of all images if there are no folds."""
    if not folds:
        return [LinearProbe.fit(features, labels)]
    probes = []
    for fold in folds:
        others = torch.ones(len(labels), dtype=torch.bool).index_fill(0, fold, False)
        probes.append(LinearProbe.fit(features[others], labels[others]))
    return probes


def _accuracy(correct: np.ndarray) -> Measure:
    return Measure(np.stack([correct, np.ones(len(correct))], axis=1), ratio)


def _checked_labels(labels: object, count: int) -> Tensor:
    """Return the labels on the CPU; raise TypeError or ValueError for others than (n,) from 0."""
    if not isinstance(labels, Tensor) or labels.dtype != torch.long or labels.dim() != 1:
        got = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else labels
        raise TypeError(f"labels: expected an int64 tensor (n,), got {shortened(got)}")
    if len(labels) != count:
        raise ValueError(f"labels: expected {count}, one an image, got {len(labels)}")
    if labels.min() < 0:
        raise ValueError(f"labels: expected numbers from 0, got {labels.min()}")
    return labels.cpu()
