"""Backgrounds of EmojiScenes that are not of one colour: patterns in shades of it.

A pattern is a function on the unit square, so that a texture has no size, as a scene has none.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

DARKEST, LIGHTEST = 0.86, 0.25
"""Shades run from this share of the colour to this share of the way to white: still its name."""

_REPEATS = (3, 8)  # of stripes, checks and dots over the image; a noise has cells as many
_FINE = 4  # the second grid of a noise is so much finer


@dataclass(frozen=True)
class Texture:
    """A pattern of `PATTERNS`, `repeats` times over the image, turned by `angle` in radians and
    moved by `shift`, shares of one repeat; `seed` draws what is random in it.
    """

    pattern: str
    repeats: int
    angle: float
    shift: tuple[float, float]
    seed: int


def sample_texture(rng: np.random.Generator) -> Texture:
    """Draw a texture."""
    return Texture(
        pattern=list(PATTERNS)[rng.integers(len(PATTERNS))],
        repeats=int(rng.integers(_REPEATS[0], _REPEATS[1] + 1)),
        angle=float(rng.uniform(0, 2 * math.pi)),
        shift=(float(rng.uniform()), float(rng.uniform())),
        seed=int(rng.integers(2**32)),
    )


def draw_texture(texture: Texture, colour: tuple[int, int, int], image_size: int) -> Image.Image:
    """Draw the texture in shades of `colour` -> RGB image of `image_size` x `image_size`."""
    level = 255 * PATTERNS[texture.pattern](texture, image_size)
    canvas = Image.fromarray(level.astype(np.uint8))
    canvas.putpalette(_shades(colour))
    return canvas.convert("RGB")


@lru_cache
def _shades(colour: tuple[int, int, int]) -> bytes:
    """RGB of the 256 levels, dark to light."""
    named = np.array(colour)
    ends = DARKEST * named, named + LIGHTEST * (255 - named)
    return np.linspace(*ends, 256).round().astype(np.uint8).tobytes()


def _axes(texture: Texture, image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The turned coordinates of each pixel, (S, S) each, in [-0.71, 0.71]."""
    along = (np.arange(image_size, dtype=np.float32) + 0.5) / image_size - 0.5
    cosine, sine = math.cos(texture.angle), math.sin(texture.angle)
    return cosine * along + sine * along[:, None], cosine * along[:, None] - sine * along


def _phases(texture: Texture, image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each pixel is in its repeat, (S, S) each, in [0, 1)."""
    pairs = zip(_axes(texture, image_size), texture.shift, strict=True)
    u, v = (axis * texture.repeats + shift for axis, shift in pairs)
    return u - np.floor(u), v - np.floor(v)


def _gradient(texture: Texture, image_size: int) -> np.ndarray:
    across = _axes(texture, image_size)[0]
    return (across - across.min()) / max(np.ptp(across), 1e-9)


def _noise(texture: Texture, image_size: int) -> np.ndarray:
    """Two grids of random levels, a coarse and a fine one, interpolated."""
    rng, cells = np.random.default_rng(texture.seed), texture.repeats
    grids = (rng.random((side, side), dtype=np.float32) for side in (cells, _FINE * cells))
    size, bicubic = (image_size, image_size), Image.Resampling.BICUBIC
    coarse, fine = (np.asarray(Image.fromarray(grid).resize(size, bicubic)) for grid in grids)
    return np.clip((coarse + fine) / 2, 0, 1)


def _stripes(texture: Texture, image_size: int) -> np.ndarray:
    return _phases(texture, image_size)[0] < 0.5


def _checks(texture: Texture, image_size: int) -> np.ndarray:
    u, v = _phases(texture, image_size)
    return (u < 0.5) ^ (v < 0.5)


def _dots(texture: Texture, image_size: int) -> np.ndarray:
    u, v = _phases(texture, image_size)
    return (u - 0.5) ** 2 + (v - 0.5) ** 2 < 0.3**2


PATTERNS: dict[str, Callable[[Texture, int], np.ndarray]] = {
    "gradient": _gradient,
    "noise": _noise,
    "stripes": _stripes,
    "checks": _checks,
    "dots": _dots,
}
"""Each maps a texture and an image size S to levels (S, S) in [0, 1], dark to light."""
