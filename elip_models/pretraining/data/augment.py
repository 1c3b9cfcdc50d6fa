"""RandAugment with the operations of ALBEF and BLIP, or with those of METER.

`RandAugment` has ten operations, none of which changes a hue:

    ShearX, ShearY            x + f y, or y + f x, by f = +-0.3 m / 10
    TranslateX, TranslateY    by +-10 m / 10 pixels
    Rotate                    by +-30 m / 10 degrees
    Brightness, Sharpness     factor 0.1 + 1.8 m / 10
    Identity, AutoContrast, Equalize

m is the magnitude, 0 to 10. Operations are drawn with replacement. Each is applied with probability
0.5 and a random sign. Uncovered pixels become grey, 128.

`METERRandAugment` has fourteen, on the image before it is resized:

    ShearX, ShearY, TranslateX, TranslateY, Rotate    by +-0.3 s, +-100 s pixels, +-30 s degrees
    Color, Contrast, Brightness, Sharpness            factor 0.1 + 1.8 s
    Posterize                                         to 4 s bits, rounded down, at least 1
    Solarize, SolarizeAdd                             invert from 256 s; add 110 s, invert from 128
    AutoContrast, Equalize

with s = m / 30. All drawn operations are applied. Uncovered pixels become black.
Source: RandAugment (Cubuk et al., 2020), with the operations and ranges of ALBEF, BLIP and METER.
"""

from collections.abc import Iterable

import torch
from PIL import Image, ImageEnhance, ImageOps

_COLOUR = ("Identity", "AutoContrast", "Equalize", "Brightness", "Sharpness")
_GEOMETRY = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
OPERATIONS = _COLOUR + _GEOMETRY
MAX_MAGNITUDE = 10
METER_MAX_MAGNITUDE = 30
METER_OPERATIONS = (
    *("AutoContrast", "Equalize", "Posterize", "Solarize", "SolarizeAdd"),
    *("Color", "Contrast", "Brightness", "Sharpness", *_GEOMETRY),
)
_ENHANCERS = {
    "Color": ImageEnhance.Color,
    "Contrast": ImageEnhance.Contrast,
    "Brightness": ImageEnhance.Brightness,
    "Sharpness": ImageEnhance.Sharpness,
}
PROBABILITY = 0.5
GREY = (128, 128, 128)


class RandAugment:
    """ALBEF's random augmentation of an RGB image by `operations` with a `magnitude` of 0 to 10."""

    def __init__(self, operations: int, magnitude: int) -> None:
        self.operations = operations
        self.strength = magnitude / MAX_MAGNITUDE

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the augmented image."""
        return self.apply(image, self.draw())

    def draw(self) -> list[tuple[str, int]]:
        """Draw names and signs of the operations to apply, from torch's CPU generator."""
        names = torch.randint(len(OPERATIONS), (self.operations,)).tolist()
        chances, signs = torch.rand(2, self.operations).tolist()
        return [
            (OPERATIONS[name], 1 if sign < 0.5 else -1)
            for name, chance, sign in zip(names, chances, signs, strict=True)
            if chance < PROBABILITY
        ]

    def apply(self, image: Image.Image, drawn: Iterable[tuple[str, int]]) -> Image.Image:
        """Apply the operations and signs that `draw` returned, in order."""
        for name, sign in drawn:
            image = self._apply_one(image, name, sign * self.strength)
        return image

    def _apply_one(self, image: Image.Image, name: str, strength: float) -> Image.Image:
        factor = 0.1 + 1.8 * self.strength
        match name:
            case "AutoContrast":
                return ImageOps.autocontrast(image)
            case "Equalize":
                return ImageOps.equalize(image)
            case "Brightness":
                return ImageEnhance.Brightness(image).enhance(factor)
            case "Sharpness":
                return ImageEnhance.Sharpness(image).enhance(factor)
            case "ShearX":
                return _affine(image, (1, -0.3 * strength, 0, 0, 1, 0))
            case "ShearY":
                return _affine(image, (1, 0, 0, -0.3 * strength, 1, 0))
            case "TranslateX":
                return _affine(image, (1, 0, -10 * strength, 0, 1, 0))
            case "TranslateY":
                return _affine(image, (1, 0, 0, 0, 1, -10 * strength))
            case "Rotate":
                centre = (image.width / 2 + 0.5, image.height / 2 + 0.5)  # as in OpenCV
                bilinear = Image.Resampling.BILINEAR
                return image.rotate(30 * strength, bilinear, center=centre, fillcolor=GREY)
        return image


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    """Map pixel (x, y) of the result to (a x + b y + c, d x + e y + f) of the image."""
    a, b, c, d, e, f = matrix
    corner = (a, b, c + (1 - a - b) / 2, d, e, f + (1 - d - e) / 2)  # Pillow's origin is a corner
    return image.transform(
        image.size, Image.Transform.AFFINE, corner, Image.Resampling.BILINEAR, fillcolor=GREY
    )


class METERRandAugment:
    """METER's random augmentation of an RGB image by `operations` with a `magnitude` of 0 to 10."""

    def __init__(self, operations: int, magnitude: int) -> None:
        self.operations = operations
        self.strength = magnitude / METER_MAX_MAGNITUDE

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the augmented image."""
        return self.apply(image, self.draw())

    def draw(self) -> list[tuple[str, int]]:
        """Draw names and signs of the operations to apply, from torch's CPU generator."""
        names = torch.randint(len(METER_OPERATIONS), (self.operations,)).tolist()
        signs = torch.rand(self.operations).tolist()
        return [
            (METER_OPERATIONS[name], 1 if sign < 0.5 else -1)
            for name, sign in zip(names, signs, strict=True)
        ]

    def apply(self, image: Image.Image, drawn: Iterable[tuple[str, int]]) -> Image.Image:
        """Apply the operations and signs that `draw` returned, in order."""
        for name, sign in drawn:
            image = self._apply_one(image, name, sign * self.strength)
        return image

    def _apply_one(self, image: Image.Image, name: str, signed: float) -> Image.Image:
        strength = abs(signed)
        match name:
            case "AutoContrast":
                return ImageOps.autocontrast(image)
            case "Equalize":
                return ImageOps.equalize(image)
            case "Posterize":
                return ImageOps.posterize(image, max(1, int(4 * strength)))
            case "Solarize":
                return ImageOps.solarize(image, 256 * strength)
            case "SolarizeAdd":
                brighter = image.point(lambda level: min(255, int(level + 110 * strength)))
                return ImageOps.solarize(brighter, 128)
            case "Rotate":
                return image.rotate(30 * signed)
            case "ShearX":
                return _nearest(image, (1, 0.3 * signed, 0, 0, 1, 0))
            case "ShearY":
                return _nearest(image, (1, 0, 0, 0.3 * signed, 1, 0))
            case "TranslateX":
                return _nearest(image, (1, 0, 100 * signed, 0, 1, 0))
            case "TranslateY":
                return _nearest(image, (1, 0, 0, 0, 1, 100 * signed))
        return _ENHANCERS[name](image).enhance(0.1 + 1.8 * strength)


def _nearest(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix)
