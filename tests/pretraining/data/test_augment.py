"""RandAugment as in ALBEF and BLIP, and as in METER: each operation, and how they are drawn."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from elip_models.pretraining.data.augment import OPERATIONS, RandAugment
from elip_models.pretraining.data.transforms import image_transform

SIZE = 32
Y, X = np.mgrid[:SIZE, :SIZE].astype(float)
SMOOTH = np.stack([100 + 90 * np.sin(X / 5 + Y / 9), 3 * X + 4 * Y, 200 - 2 * X], axis=-1)


def image_of(pixels) -> Image.Image:
    return Image.fromarray(np.asarray(pixels).round().clip(0, 255).astype(np.uint8))


WHOLE = np.asarray(image_of(SMOOTH)).astype(float)


def applied(name, sign=1, *, policy="albef", magnitude=7, pixels=SMOOTH):
    image = RandAugment(2, magnitude, policy).apply(image_of(pixels), [(name, sign)])
    return np.asarray(image).astype(float)


def sampled(x, y):
    """Return the smooth image at positions (x, y), and which are at least a pixel inside it."""
    inside = (x >= 1) & (x <= SIZE - 2) & (y >= 1) & (y <= SIZE - 2)
    return np.stack([100 + 90 * np.sin(x / 5 + y / 9), 3 * x + 4 * y, 200 - 2 * x], -1), inside


@pytest.mark.parametrize(
    ("policy", "magnitude", "shift", "fill"),
    [
        ("albef", 7, 7, 128),
        ("albef", 5, 5, 128),
        ("albef", 10, 10, 128),
        ("meter", 9, -30, 0),  # to the other side
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_translation_has_its_pixels_and_leaves_grey_or_black(
    policy, magnitude, shift, fill, sign
):
    moved, left = slice(abs(shift), None), slice(None, -abs(shift))
    to, of = (moved, left) if sign * shift > 0 else (left, moved)
    across, down = np.full_like(WHOLE, fill), np.full_like(WHOLE, fill)
    across[:, to], down[to] = WHOLE[:, of], WHOLE[of]
    options = {"policy": policy, "magnitude": magnitude}
    assert np.array_equal(applied("TranslateX", sign, **options), across)
    assert np.array_equal(applied("TranslateY", sign, **options), down)


@pytest.mark.parametrize(
    ("policy", "magnitude", "shear", "degrees", "centre", "fill", "error"),
    [
        # Bilinear interpolation of a sine of period 31, on rounded values, rounded again: below 2.
        ("albef", 7, -0.21, 21, SIZE / 2, 128, 2),
        # The nearest pixel is at most 0.5 away in each direction; the slope is below 28 and 14.
        ("meter", 9, 0.09, 9, (SIZE - 1) / 2, 0, 22),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", ["ShearX", "ShearY", "Rotate"])
def test_shears_and_rotations(name, sign, policy, magnitude, shear, degrees, centre, fill, error):
    shear, angle = sign * shear, math.radians(sign * degrees)
    dx, dy = X - centre, Y - centre
    x, y = {
        "ShearX": (X + shear * Y, Y),
        "ShearY": (X, Y + shear * X),
        "Rotate": (
            centre + math.cos(angle) * dx - math.sin(angle) * dy,
            centre + math.sin(angle) * dx + math.cos(angle) * dy,
        ),
    }[name]
    expected, inside = sampled(x, y)
    pixels = applied(name, sign, policy=policy, magnitude=magnitude)
    assert np.abs(pixels - expected)[inside].max() < error
    outside = (x < -1) | (x > SIZE) | (y < -1) | (y > SIZE)
    assert outside.any() and (pixels[outside] == fill).all()


def test_operations_are_drawn_with_replacement_and_those_of_albef_applied_half_of_the_time():
    for policy, share in (("albef", 0.5), ("meter", 1.0)):
        torch.manual_seed(0)
        augment = RandAugment(2, 7, policy)
        draws = [augment.draw() for _ in range(4000)]
        numbers = Counter(map(len, draws))
        for number, chance in enumerate(((1 - share) ** 2, 2 * share * (1 - share), share**2)):
            deviation = math.sqrt(chance * (1 - chance) / 4000)
            assert numbers[number] / 4000 == pytest.approx(chance, abs=4 * deviation)
        drawn = Counter(choice for one in draws for choice in one)
        choices = {(name, sign) for name in OPERATIONS[policy] for sign in (1, -1)}
        assert drawn.keys() == choices and min(drawn.values()) > 140
        assert any(len(one) == 2 and one[0][0] == one[1][0] for one in draws)


def test_recorded_draws():
    torch.manual_seed(0)
    augment = RandAugment(2, 7)
    assert [augment.draw() for _ in range(6)] == [
        [("Sharpness", 1), ("Rotate", -1)],
        [("TranslateX", 1)],
        [("ShearY", -1)],
        [],
        [("AutoContrast", 1)],
        [("AutoContrast", 1), ("Equalize", 1)],
    ]


GREY_OF = np.rint(WHOLE @ [0.299, 0.587, 0.114])[..., None]
AT_MAGNITUDE_9 = {
    "Posterize": WHOLE // 128 * 128,  # int(4 * 0.3) = 1 bit
    "Solarize": np.where(WHOLE >= 76.8, 255 - WHOLE, WHOLE),
    "SolarizeAdd": (lambda x: np.where(x >= 128, 255 - x, x))(np.minimum(WHOLE + 33, 255)),
    "Brightness": 0.64 * WHOLE,
    "Color": GREY_OF + 0.64 * (WHOLE - GREY_OF),
    "Contrast": 0.64 * WHOLE + 0.36 * np.rint(GREY_OF.mean()),
}


@pytest.mark.parametrize("name", AT_MAGNITUDE_9)
def test_colours_of_meter_at_magnitude_9(name):
    assert np.abs(applied(name, policy="meter", magnitude=9) - AT_MAGNITUDE_9[name]).max() <= 1


def test_meter_augments_the_image_before_it_is_resized():
    options = {"scale": None, "randaugment": (1, 9), "mean": (0.0,) * 3, "std": (1.0,) * 3}
    transform = image_transform(8, train=True, randaugment_policy="meter", **options)
    plain = image_transform(8, train=False, mean=(0.0,) * 3, std=(1.0,) * 3)
    image = image_of(SMOOTH)
    for seed in range(8):
        torch.manual_seed(seed)
        drawn = RandAugment(1, 9, "meter").draw()
        torch.manual_seed(seed)
        expected = plain(RandAugment(1, 9, "meter").apply(image, drawn))
        assert torch.equal(transform(image), expected)
