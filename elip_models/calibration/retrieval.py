"""Retrieval of images by texts, and of texts by images: recall at 1 and 5.

A caption is found at k if its image is among the k images that are most similar to it; an image is
found if any of its captions is among the k texts that are most similar to it. The candidates are
the images of the part that is measured, and all their captions. Ties count against the model.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elip_models.analysis.model_features import encode_texts, image_features
from elip_models.analysis.ranking import ranks_by_image, similarities, similarities_in_chunks
from elip_models.calibration.images import ImageTask
from elip_models.calibration.task import Measure, Outputs, Part, ratio
from elip_models.validation import shortened

KS = (1, 5)


class Retrieval(ImageTask):
    """Images and captions that describe them.

    Args:
        images: of `ImageTask`.
        captions: the captions of each image, at least one.
        model: a CLIP, SigLIP or BLIP, dense, whose text tower embeds the captions.
        tokenizer: of the model.
        batch_size: images in a batch.
    """

    name: ClassVar[str] = "retrieval"
    measures = tuple(f"{way} R@{k}" for way in ("text to image", "image to text") for k in KS)

    def __init__(
        self,
        images: Tensor | Sequence[Tensor],
        captions: Sequence[Sequence[str]],
        *,
        model: nn.Module,
        tokenizer: Any,
        batch_size: int = 8,
    ) -> None:
        super().__init__(images, batch_size=batch_size)
        self.captions = _checked(captions, len(images))
        self.texts = [text for of_image in self.captions for text in of_image]
        self.owners = torch.tensor([i for i, texts in enumerate(self.captions) for _ in texts])
        self.features, _ = image_features(model)
        self.of_texts = encode_texts(model, tokenizer, self.texts).cpu()

    def contents(self) -> dict[str, Any]:
        return {**super().contents(), "captions": [list(texts) for texts in self.captions]}

    def forward(self, model: nn.Module, pixels: Tensor) -> Tensor:
        return F.normalize(self.features(model, pixels).float(), dim=-1)

    def measured(self, chosen_on: Part, held_back: Part | None = None) -> dict[str, Measure]:
        part = held_back or chosen_on
        numbers = torch.tensor(part.images)
        is_here = torch.isin(self.owners, numbers)
        owners, texts = self.owners[is_here], self.of_texts[is_here]
        images = part.outputs["features"]
        of_texts, _ = ranks_by_image(similarities_in_chunks(texts, images), owners, numbers)
        of_images, _ = ranks_by_image(similarities_in_chunks(images, texts), numbers, owners)
        row_of_text = torch.searchsorted(numbers, owners).numpy()
        counts = np.bincount(row_of_text).astype(np.float64)
        found = [np.bincount(row_of_text, (of_texts < k).numpy()) for k in KS]
        rows = [np.stack([hits, counts], axis=1) for hits in found]
        rows += [
            np.stack([(of_images < k).double().numpy(), np.ones(len(numbers))], axis=1) for k in KS
        ]
        if part.outputs is part.dense:
            _check_above_chance(rows[0])
        return {name: Measure(r, ratio) for name, r in zip(self.measures, rows, strict=True)}

    def answers(self, images: Sequence[int], outputs: Outputs) -> list[str]:
        """Return the caption, of all images, that is most similar to each image."""
        best = similarities(outputs["features"], self.of_texts).argmax(1)
        return [self.texts[text] for text in best.tolist()]

    def truths(self, images: Sequence[int]) -> list[str]:
        return ["; ".join(self.captions[i]) for i in images]


def _check_above_chance(rows: np.ndarray) -> None:
    """Raise ValueError if the dense model finds no more images than chance, and can lose none."""
    recall, chance = ratio(rows.sum(0, keepdims=True)).item(), 1 / len(rows)
    if recall <= chance:
        raise ValueError(
            "captions: expected ones by which the model finds their images, got a recall at 1 of "
            f"{recall:.3f} of the dense model, where chance has {chance:.3f}; use the captions of "
            "these images, or another model"
        )


def _checked(captions: Sequence[Sequence[str]], count: int) -> list[tuple[str, ...]]:
    """Return the captions; raise TypeError or ValueError for an image without any."""
    if len(captions) != count:
        raise ValueError(f"captions: expected {count} lists, one an image, got {len(captions)}")
    for i, texts in enumerate(captions):
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise TypeError(
                f"captions: expected a list of texts for each image, got {shortened(texts)} for "
                f"images[{i}]"
            )
        if not texts or not all(text.strip() for text in texts):
            raise ValueError(
                f"captions: expected at least one for each image, and words in each, got "
                f"{shortened(list(texts))} for images[{i}]; add a caption, or leave the image out"
            )
    return [tuple(texts) for texts in captions]
