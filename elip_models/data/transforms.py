"""Image -> normalised tensor, for training and for evaluation."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
from PIL import Image
from torch import Tensor

from elip_models.extras import extra
from elip_models.validation import Bounds, Positive, PositiveInt, PositiveShare, check

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
MAGNITUDES = 11
Magnitude = Annotated[int, Bounds(0, MAGNITUDES - 1)]
COLOUR_OPERATIONS = ("Color", "Contrast", "Posterize", "Solarize")
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def image_transform(
    image_size: int,
    *,
    train: bool,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    scale: tuple[float, float] | None = (0.9, 1.0),
    flip: bool = False,
    randaugment: tuple[int, int] | None = None,
) -> Callable[[Image.Image], Tensor]:
    """RGB image -> (3, S, S) float32, S = `image_size`, normalised by `mean` and `std`.

    Evaluation resizes the shorter side and crops the centre. Training draws by torch's CPU
    generator: a crop of a random share of the area within `scale`, the centre where that is None;
    then, with `flip`, a mirrored image half of the time, though captions may say left and right;
    then `randaugment`, a number of operations and their magnitude from 0 to 10: those of
    RandAugment (Cubuk et al., 2020) that leave colours alone, as ALBEF and BLIP choose them.

    Raises:
        TypeError, ValueError: an argument out of range.
        ImportError: torchvision is missing.
    """
    check("image_size", image_size, PositiveInt)
    check("train", train, bool)
    check("mean", _as_tuple(mean), tuple[float, float, float])
    check("std", _as_tuple(std), tuple[Positive, Positive, Positive])
    check("scale", _as_tuple(scale), tuple[PositiveShare, PositiveShare] | None)
    if scale is not None and scale[0] > scale[1]:
        raise ValueError(f"scale: expected 0 < least <= most <= 1, got {scale!r}")
    check("randaugment", _as_tuple(randaugment), tuple[PositiveInt, Magnitude] | None)
    with extra("image_transform"):
        from torchvision.transforms import InterpolationMode, v2
    bicubic = InterpolationMode.BICUBIC
    middle = [v2.Resize(image_size, interpolation=bicubic), v2.CenterCrop(image_size)]
    steps: list[Callable[[Image.Image], Image.Image]] = middle
    if train and scale is not None:
        steps = [v2.RandomResizedCrop(image_size, scale=scale, interpolation=bicubic)]
    if train and flip:
        steps.append(v2.RandomHorizontalFlip())
    if train and randaugment is not None:
        steps.append(_RandAugment(*randaugment))
    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    return v2.Compose([*steps, *to_tensor, v2.ToPureTensor()])


class _RandAugment:
    """torchvision's RandAugment without the operations that change what colour a thing has.

    It is pickled by its arguments, as loader processes that are not forked need it: torchvision's
    table of operations holds lambdas.
    """

    def __init__(self, operations: int, magnitude: int) -> None:
        from torchvision.transforms import v2

        self.arguments = operations, magnitude
        self.augment = v2.RandAugment(operations, magnitude, num_magnitude_bins=MAGNITUDES)
        space = v2.RandAugment._AUGMENTATION_SPACE
        kept = {name: value for name, value in space.items() if name not in COLOUR_OPERATIONS}
        self.augment._AUGMENTATION_SPACE = kept

    def __call__(self, image: Image.Image) -> Image.Image:
        return self.augment(image)

    def __reduce__(self) -> tuple[type, tuple[int, int]]:
        return _RandAugment, self.arguments


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
