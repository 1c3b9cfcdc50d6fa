"""Image -> normalised tensor, for training and for evaluation."""

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor

from elip_models.data.checks import check_int, extra

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def image_transform(
    image_size: int,
    *,
    train: bool,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    scale: tuple[float, float] = (0.9, 1.0),
) -> Callable[[Image.Image], Tensor]:
    """RGB image -> (3, S, S) float32, S = `image_size`, normalised by `mean` and `std`.

    Training crops a random share of the area within `scale`, by torch's CPU generator; nothing is
    flipped, since captions say left and right. Evaluation resizes the shorter side and crops the
    centre. Raises TypeError or ValueError for an argument out of range, ImportError without
    torchvision.
    """
    check_int("image_size", image_size, 1)
    if not isinstance(train, bool):
        raise TypeError(f"train: expected True or False, got {train!r}")
    _check_numbers("mean", mean, 3)
    _check_numbers("std", std, 3)
    _check_numbers("scale", scale, 2)
    if min(std) <= 0:
        raise ValueError(f"std: expected values above 0, got {std!r}")
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale: expected 0 < least <= most <= 1, got {scale!r}")
    with extra("models", "image_transform"):
        from torchvision.transforms import InterpolationMode, v2
    bicubic = InterpolationMode.BICUBIC
    crop: list[Callable[[Image.Image], Image.Image]] = (
        [v2.RandomResizedCrop(image_size, scale=scale, interpolation=bicubic)]
        if train
        else [v2.Resize(image_size, interpolation=bicubic), v2.CenterCrop(image_size)]
    )
    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    return v2.Compose([*crop, *to_tensor, v2.ToPureTensor()])


def _check_numbers(argument: str, value: Sequence[float], count: int) -> None:
    """A list or tuple of `count` numbers."""
    if not isinstance(value, list | tuple) or not all(isinstance(x, int | float) for x in value):
        raise TypeError(f"{argument}: expected {count} numbers, got {value!r}")
    if len(value) != count:
        raise ValueError(f"{argument}: expected {count} numbers, got {value!r}")
