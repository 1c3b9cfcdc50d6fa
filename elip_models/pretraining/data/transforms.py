"""Image transforms for training and evaluation, which return normalised tensors."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from elip_models.images import CLIP_MEAN, CLIP_STD
from elip_models.pretraining.data.augment import RandAugment, RandAugmentPolicy
from elip_models.validation import check, require_extra

ResizeMode = Literal["crop", "squash"]


def image_transform(
    image_size: int,
    *,
    train: bool,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    scale: tuple[float, float] | None = (0.9, 1.0),
    flip: bool = False,
    randaugment: tuple[int, int] | None = None,
    randaugment_policy: RandAugmentPolicy = "albef",
    resize: ResizeMode = "crop",
) -> Callable[[Image.Image], Tensor]:
    """Return a function from an RGB image to a normalised (3, S, S) float32 tensor.

    In training, the transform draws from torch's CPU generator.

    Args:
        image_size: S, in pixels.
        train: Whether to augment the image with `scale`, `flip` and `randaugment`.
        mean: Mean of each channel.
        std: Standard deviation of each channel.
        scale: Range of the random crop's share of the area. None: no random crop.
        flip: Mirror half of the images. Captions with "left" and "right" become wrong.
        randaugment: Number of operations and their magnitude, 0 to 10.
        randaugment_policy: RandAugment of "albef" follows the crop, that of "meter" precedes it.
        resize: "crop" resizes the shorter side and crops the centre. "squash" resizes both sides
            and changes the aspect ratio.

    Raises:
        ValueError: `resize` or `randaugment_policy` is unknown.
        ImportError: torchvision is missing.
    """
    check("resize", resize, ResizeMode)
    check("randaugment_policy", randaugment_policy, RandAugmentPolicy)
    with require_extra("image_transform"):
        from torchvision.transforms import InterpolationMode, v2
    bicubic = InterpolationMode.BICUBIC
    size = [image_size, image_size] if resize == "squash" else image_size
    steps: list[Callable[[Image.Image], Image.Image]] = [
        v2.Resize(size, interpolation=bicubic),
        v2.CenterCrop(image_size),
    ]
    if train and scale is not None:
        steps = [v2.RandomResizedCrop(image_size, scale=scale, interpolation=bicubic)]
    if train and flip:
        steps.append(v2.RandomHorizontalFlip())
    if train and randaugment is not None:
        place = 0 if randaugment_policy == "meter" else len(steps)
        steps.insert(place, RandAugment(*randaugment, randaugment_policy))
    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    return v2.Compose([*steps, *to_tensor, v2.ToPureTensor()])
