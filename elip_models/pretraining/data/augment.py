"""RandAugment with the operations of ALBEF and BLIP, or with those of METER.

'albef' has ten operations, none of which changes a hue. m is the magnitude, 0 to 10:

    ShearX, ShearY            x + f y, or y + f x, by f = +-0.3 m / 10
    TranslateX, TranslateY    by +-10 m / 10 pixels
    Rotate                    by +-30 m / 10 degrees
    Brightness, Sharpness     factor 0.1 + 1.8 m / 10
    Identity, AutoContrast, Equalize

Each drawn operation is applied with probability 0.5. Uncovered pixels become grey, 128.

'meter' has fourteen, with s = m / 30, and applies all that are drawn:

    ShearX, ShearY, TranslateX, TranslateY, Rotate    by +-0.3 s, +-100 s pixels, +-30 s degrees
    Color, Contrast, Brightness, Sharpness            factor 0.1 + 1.8 s
    Posterize                                         to 4 s bits, rounded down, at least 1
    Solarize, SolarizeAdd                             invert from 256 s; add 110 s, invert from 128
    AutoContrast, Equalize

Uncovered pixels become black. Both draw operations with replacement, and signs. The ranges differ
from those of RandAugment in torchvision and timm.
Source: RandAugment (Cubuk et al., 2020), with the operations and ranges of ALBEF, BLIP and METER.
"""

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from PIL import Image, ImageEnhance, ImageOps

RandAugmentPolicy = Literal["albef", "meter"]
Operation = Callable[[Image.Image, float], Image.Image]
"""A function of an image and a signed strength."""
PROBABILITY = 0.5  # of applying an operation of 'albef'
GREY = (128, 128, 128)


def _enhance(enhancer: type) -> Operation:
    return lambda image, f: enhancer(image).enhance(0.1 + 1.8 * abs(f))


def _smooth(image: Image.Image, a: float, b: float, c: float, *row: float) -> Image.Image:
    """Map pixel (x, y) of the result to (a x + b y + c, d x + e y + f) of the image."""
    d, e, f = row
    corner = (a, b, c + (1 - a - b) / 2, d, e, f + (1 - d - e) / 2)  # Pillow's origin is a corner
    bilinear = Image.Resampling.BILINEAR
    return image.transform(image.size, Image.Transform.AFFINE, corner, bilinear, fillcolor=GREY)


def _smooth_rotation(image: Image.Image, f: float) -> Image.Image:
    centre = (image.width / 2 + 0.5, image.height / 2 + 0.5)  # as in OpenCV
    return image.rotate(30 * f, Image.Resampling.BILINEAR, center=centre, fillcolor=GREY)


def _nearest(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix)


def _solarize_add(image: Image.Image, f: float) -> Image.Image:
    brighter = image.point(lambda level: min(255, int(level + 110 * abs(f))))
    return ImageOps.solarize(brighter, 128)


_STRETCH: dict[str, Operation] = {
    "AutoContrast": lambda image, f: ImageOps.autocontrast(image),
    "Equalize": lambda image, f: ImageOps.equalize(image),
}
OPERATIONS: dict[RandAugmentPolicy, dict[str, Operation]] = {
    "albef": {
        "Identity": lambda image, f: image,
        **_STRETCH,
        "Brightness": _enhance(ImageEnhance.Brightness),
        "Sharpness": _enhance(ImageEnhance.Sharpness),
        "ShearX": lambda image, f: _smooth(image, 1, -0.3 * f, 0, 0, 1, 0),
        "ShearY": lambda image, f: _smooth(image, 1, 0, 0, -0.3 * f, 1, 0),
        "TranslateX": lambda image, f: _smooth(image, 1, 0, -10 * f, 0, 1, 0),
        "TranslateY": lambda image, f: _smooth(image, 1, 0, 0, 0, 1, -10 * f),
        "Rotate": _smooth_rotation,
    },
    "meter": {
        **_STRETCH,
        "Posterize": lambda image, f: ImageOps.posterize(image, max(1, int(4 * abs(f)))),
        "Solarize": lambda image, f: ImageOps.solarize(image, 256 * abs(f)),
        "SolarizeAdd": _solarize_add,
        "Color": _enhance(ImageEnhance.Color),
        "Contrast": _enhance(ImageEnhance.Contrast),
        "Brightness": _enhance(ImageEnhance.Brightness),
        "Sharpness": _enhance(ImageEnhance.Sharpness),
        "ShearX": lambda image, f: _nearest(image, 1, 0.3 * f, 0, 0, 1, 0),
        "ShearY": lambda image, f: _nearest(image, 1, 0, 0, 0.3 * f, 1, 0),
        "TranslateX": lambda image, f: _nearest(image, 1, 0, 100 * f, 0, 1, 0),
        "TranslateY": lambda image, f: _nearest(image, 1, 0, 0, 0, 1, 100 * f),
        "Rotate": lambda image, f: image.rotate(30 * f),
    },
}


class RandAugment:
    """Random augmentation of an RGB image by `operations` with a `magnitude` of 0 to 10."""

    def __init__(
        self, operations: int, magnitude: int, policy: RandAugmentPolicy = "albef"
    ) -> None:
        self.operations, self.policy = operations, policy
        self.strength = magnitude / (10 if policy == "albef" else 30)

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the augmented image."""
        return self.apply(image, self.draw())

    def draw(self) -> list[tuple[str, int]]:
        """Draw names and signs of the operations to apply, from torch's CPU generator."""
        names, n = list(OPERATIONS[self.policy]), self.operations
        drawn = torch.randint(len(names), (n,)).tolist()
        if self.policy == "albef":
            chances, signs = torch.rand(2, n)
        else:
            chances, signs = torch.zeros(n), torch.rand(n)
        is_applied, is_positive = (chances < PROBABILITY).tolist(), (signs < 0.5).tolist()
        choices = zip(drawn, is_applied, is_positive, strict=True)
        return [(names[i], 1 if positive else -1) for i, applied, positive in choices if applied]

    def apply(self, image: Image.Image, drawn: Iterable[tuple[str, int]]) -> Image.Image:
        """Apply the operations and signs that `draw` returned, in order."""
        for name, sign in drawn:
            image = OPERATIONS[self.policy][name](image, sign * self.strength)
        return image
