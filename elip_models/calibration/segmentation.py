"""Segmentation by masks: the mean intersection over union of classes (mIoU).

segmentation        the model's own head, or a function of the user
segmentation-probe  a linear head on the features of patches, fitted on dense ones

Logits are interpolated to the size of the mask, whose pixels of 255 are ignored. Intersections and
unions are summed over images before they are divided; classes that are neither in a mask nor
predicted are left out. A patch is of the class of most of its pixels. The linear head is fitted on
the images that choose; these themselves are measured by heads of other folds.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elip_models.analysis.model_features import Function, patch_features
from elip_models.analysis.visualize import grid_shape
from elip_models.calibration.candidates import Candidate, Candidates, TowerCandidates
from elip_models.calibration.images import ImageTask
from elip_models.calibration.linear_probe import LinearProbe
from elip_models.calibration.task import Measure, Outputs, Part, ratio
from elip_models.saving.files import tensors_sha256
from elip_models.strategies.spec import get_strategy
from elip_models.towers import as_reducible, as_tower, library_of
from elip_models.validation import shortened

if TYPE_CHECKING:
    from PIL import Image

    Transform = Callable[[Image.Image], Tensor]

IGNORED = 255
PATCHES = 10_000
"""Patches that fit the linear head."""
FOLDS = 5


def whole_image_transform(model: nn.Module, own: "Transform | None" = None) -> "Transform":
    """Return a preprocessing without a crop, so that the logits are those of the whole mask.

    Args:
        model: an image model, or an image-text model.
        own: the preprocessing of the model, whose size is taken; None: the size of the model.
    """
    from PIL import Image
    from torchvision.transforms.v2.functional import pil_to_tensor

    reducible = as_reducible(model)
    height, width = as_tower(reducible.image_model).image_size
    if own is not None:
        height, width = own(Image.new("RGB", (width, height))).shape[1:]
    mean, std = (torch.tensor(stat)[:, None, None] for stat in reducible.image_stats())

    def transform(image: Image.Image) -> Tensor:
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        return (pil_to_tensor(resized).float() / 255 - mean) / std

    return transform


def head_logits(model: nn.Module, pixels: Tensor) -> Tensor:
    """Return the logits (B, C, h, w) of a segmentation model of transformers.

    Raises:
        TypeError: the model returns none.
    """
    is_known = library_of(model) == "transformers"
    logits = getattr(model(pixel_values=pixels), "logits", None) if is_known else None
    if not isinstance(logits, Tensor) or logits.dim() != 4:
        raise TypeError(
            "model: expected one of transformers that returns logits (B, C, h, w), such as DPT, "
            f"BEiT or UperNet for semantic segmentation, got a {type(model).__name__}; take the "
            f"task {SegmentationProbe.name!r}, or a function that returns them"
        )
    return logits


class Segmentation(ImageTask):
    """Images and the class of each of their pixels.

    Args:
        images: of `ImageTask`, not cropped.
        masks: the mask of each image, (h, w) int64 classes from 0, or 255 for no class, in any
            size.
        logits: the function of a model and images that returns logits (B, C, h, w).
        batch_size: images in a batch.
    """

    name: ClassVar[str] = "segmentation"
    measures = ("mIoU", "pixel accuracy")

    def __init__(
        self,
        images: Tensor | Sequence[Tensor],
        masks: Tensor | Sequence[Tensor],
        *,
        logits: Function = head_logits,
        batch_size: int = 8,
    ) -> None:
        super().__init__(images, batch_size=batch_size)
        if len(masks) != len(images):
            raise ValueError(f"masks: expected {len(images)}, one an image, got {len(masks)}")
        self.masks, self.logits = masks, logits
        self.num_classes = 1 + max(_largest(masks[i], i) for i in range(len(masks)))

    def contents(self) -> dict[str, Any]:
        masks = [tensors_sha256({"": self.masks[i]}) for i in range(self.count)]
        return {**super().contents(), "masks": masks}

    def forward(self, model: nn.Module, pixels: Tensor) -> Tensor:
        logits = self.logits(model, pixels)
        if not isinstance(logits, Tensor) or logits.dim() != 4 or len(logits) != len(pixels):
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise TypeError(
                f"task: expected a function that returns logits ({len(pixels)}, C, h, w), got "
                f"{shortened(got)}"
            )
        return logits

    def kept(self, computed: Tensor, numbers: Sequence[int]) -> Outputs:
        rows = [self._counts(*pair) for pair in zip(computed, numbers, strict=True)]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _counts(self, logits: Tensor, number: int) -> Outputs:
        """Return the pixels of an image in each class: right ones, labelled and predicted ones."""
        mask, classes = self.masks[number].to(logits.device), len(logits)
        if self.num_classes > classes:
            raise ValueError(
                f"masks: expected classes below {classes}, those of the model's head, or "
                f"{IGNORED} for none, got {self.num_classes - 1}; take masks of the head's "
                f"classes, or the task {SegmentationProbe.name!r}"
            )
        wide = F.interpolate(logits[None].float(), size=mask.shape, mode="bilinear")[0]
        is_labelled = mask != IGNORED
        labels, predicted = mask[is_labelled], wide.argmax(0)[is_labelled]
        counted = {"right": labels[labels == predicted], "labels": labels, "predicted": predicted}
        return {name: values.bincount(minlength=classes) for name, values in counted.items()}

    def measured(self, chosen_on: Part, held_back: Part | None = None) -> dict[str, Measure]:
        part = held_back or chosen_on
        counts = {name: value.double().numpy() for name, value in part.outputs.items()}
        right, labels = counts["right"], counts["labels"]
        rows = np.concatenate([right, labels + counts["predicted"] - right], axis=1)
        if part.outputs is part.dense:
            _check_above_chance(rows, labels)
        pixels = np.stack([right.sum(1), labels.sum(1)], axis=1)
        return {"mIoU": Measure(rows, mean_iou), "pixel accuracy": Measure(pixels, ratio)}

    def answers(self, images: Sequence[int], outputs: Outputs) -> list[str]:
        """Return the mIoU of each image."""
        measure = self.measured(Part(images, outputs, {}))["mIoU"]
        return [f"mIoU {value:.2f}" for value in measure.statistic(measure.rows)]


class SegmentationProbe(Segmentation):
    """A linear head on the features of patches, each restored at all its positions.

    Args:
        images, masks, batch_size: of `Segmentation`.
        model: an image model, or an image-text model.
    """

    name: ClassVar[str] = "segmentation-probe"

    def __init__(
        self,
        images: Tensor | Sequence[Tensor],
        masks: Tensor | Sequence[Tensor],
        *,
        model: nn.Module,
        batch_size: int = 8,
    ) -> None:
        super().__init__(images, masks, logits=patch_features(model), batch_size=batch_size)
        if self.num_classes < 2:
            raise ValueError("masks: expected at least two classes, got only 0; add masks")
        self._fitted_on: tuple[int, ...] = ()
        self._fold: dict[int, int] = {}
        self._heads: list[LinearProbe] = []

    def contents(self) -> dict[str, Any]:
        return {**super().contents(), "fitted_on": list(self._fitted_on)}

    def forward(self, model: nn.Module, pixels: Tensor) -> Tensor:
        return self.logits(model, pixels)

    @torch.no_grad()
    def fit(self, model: nn.Module, chosen_on: Sequence[int]) -> None:
        """Fit the head on all images that choose, and one without each fold of them."""
        self._fitted_on = tuple(chosen_on)
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(len(chosen_on), generator=generator).tolist()
        self._fold = {chosen_on[i]: k % FOLDS for k, i in enumerate(order)}
        size = -(-PATCHES // len(chosen_on))
        features, labels, folds = [], [], []
        for first in range(0, len(chosen_on), self.batch_size):
            numbers = chosen_on[first : first + self.batch_size]
            computed = self.forward(model, self.pixels(model, numbers)).float().cpu()
            for of_image, number in zip(computed, numbers, strict=True):
                grid = self._grid(len(of_image))
                of_patches = patch_classes(self.masks[number], grid, self.num_classes).flatten()
                known = (of_patches >= 0).nonzero().flatten()
                drawn = known[torch.randperm(len(known), generator=generator)[:size]]
                features.append(of_image[drawn])
                labels.append(of_patches[drawn])
                folds.append(torch.full((len(drawn),), self._fold[number]))
        features, labels, folds = map(torch.cat, (features, labels, folds))
        keeps = [folds != fold for fold in range(FOLDS)]
        self._heads = [
            *(LinearProbe.fit(features[keep], labels[keep]) for keep in keeps),
            LinearProbe.fit(features, labels),
        ]

    def kept(self, computed: Tensor, numbers: Sequence[int]) -> Outputs:
        features = computed.float().cpu()
        grid, logits = self._grid(features.shape[1]), []
        for of_image, number in zip(features, numbers, strict=True):
            of_patches = self._heads[self._fold.get(number, FOLDS)].logits(of_image).T
            missing = self.num_classes - len(of_patches)  # the last classes, not fitted
            of_patches = F.pad(of_patches, (0, 0, 0, missing), value=-torch.inf)
            logits.append(of_patches.unflatten(1, grid))
        return super().kept(torch.stack(logits), numbers)

    def candidates(self, model: nn.Module, *, class_token_only: bool = False) -> Candidates:
        if class_token_only:
            raise ValueError(
                f"class_token_only: expected False with the task {self.name!r}, which reads the "
                "features of patches, got True"
            )
        return GridCandidates(model, self.pixels(model, [0]))

    def _grid(self, num_patches: int) -> tuple[int, int]:
        return grid_shape(num_patches, tuple(self.images[0].shape[1:]))


class GridCandidates(TowerCandidates):
    """The settings that return a feature for each patch of the image's own grid."""

    def falling(self, text: str) -> list[Candidate]:
        if get_strategy(text).changes_embedding:
            raise TypeError(
                f"strategy: expected one that keeps the grid of patches, got {text!r}, whose "
                "images are smaller"
            )
        return super().falling(text)

    def control(self, share: float) -> Candidate | None:
        return None


def patch_classes(mask: Tensor, grid: tuple[int, int], num_classes: int) -> Tensor:
    """Return (rows, columns) the most frequent class of the pixels of each patch; -1 for none."""
    of_pixels = torch.arange(num_classes)[:, None, None] == mask
    shares = F.adaptive_avg_pool2d(of_pixels.float(), grid)
    share, classes = shares.max(0)
    return classes.masked_fill(share == 0, -1)


def mean_iou(totals: np.ndarray) -> np.ndarray:
    """Return (R,) the mean over classes with a union of sums (R, 2C) of both."""
    right, union = np.split(totals, 2, axis=1)
    is_there = union > 0
    return (right / np.where(is_there, union, 1)).sum(1) / is_there.sum(1)


def _largest(mask: Tensor, number: int) -> int:
    """Return the last class of a mask; TypeError or ValueError for a mask of another form."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.long or mask.dim() != 2:
        got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else mask
        raise TypeError(
            f"masks: expected int64 tensors (h, w), got {shortened(got)} in masks[{number}]"
        )
    classes = mask[mask != IGNORED]
    if not len(classes) or classes.min() < 0 or classes.max() > IGNORED:
        got = f"{classes.min()} to {classes.max()}" if len(classes) else "no pixel with a class"
        raise ValueError(
            f"masks: expected classes from 0 to {IGNORED - 1}, or {IGNORED} for no class, got "
            f"{got} in masks[{number}]; correct it, or remove it and its image"
        )
    return int(classes.max())


def _check_above_chance(rows: np.ndarray, labels: np.ndarray) -> None:
    """Raise ValueError if one class everywhere is as good as the dense model."""
    score, of_class = mean_iou(rows.sum(0, keepdims=True)).item(), labels.sum(0)
    chance = of_class.max() / of_class.sum() / (of_class > 0).sum()
    if score <= chance:
        raise ValueError(
            "masks: expected classes that the dense model tells apart, got an mIoU of "
            f"{score:.3f}, where the most frequent class everywhere has {chance:.3f}; use masks of "
            "its classes, more images or another model"
        )
