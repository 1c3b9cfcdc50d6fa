"""Textured backgrounds of `EmojiScenes`: patterns in shades of one colour.

A pattern is a function on the unit square, so a texture can be drawn at any size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

DARKEST, LIGHTEST = 0.86, 0.25
"""Darkest shade as a share of the colour; lightest as a share of the way to white."""

_REPEATS = (3, 8)  # of stripes, checks, dots, or coarse noise cells over the image
_FINE = 4  # the fine grid of a noise has this many times the cells of the coarse one


@dataclass(frozen=True)
class Texture:
    """A pattern and how it is drawn."""

    pattern: str  # a key of `PATTERNS`
    repeats: int
    angle: float  # radians
    shift: tuple[float, float]  # shares of one repeat
    seed: int  # of a random pattern


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
    """Draw the texture in shades of `colour` as an RGB image of `image_size` x `image_size`."""
    level = 255 * PATTERNS[texture.pattern](texture, image_size)
    canvas = Image.fromarray(level.astype(np.uint8))
    canvas.putpalette(_shades(colour))
    return canvas.convert("RGB")


@lru_cache
def _shades(colour: tuple[int, int, int]) -> bytes:
    """Return the RGB bytes of the 256 levels, dark to light."""
    named = np.array(colour)
    ends = DARKEST * named, named + LIGHTEST * (255 - named)
    return np.linspace(*ends, 256).round().astype(np.uint8).tobytes()


def _axes(texture: Texture, image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rotated coordinates of each pixel, (S, S) each, in [-0.71, 0.71]."""
    along = (np.arange(image_size, dtype=np.float32) + 0.5) / image_size - 0.5
    cosine, sine = math.cos(texture.angle), math.sin(texture.angle)
    return cosine * along + sine * along[:, None], cosine * along[:, None] - sine * along


def _phases(texture: Texture, image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the position of each pixel in its repeat, (S, S) each, in [0, 1)."""
    pairs = zip(_axes(texture, image_size), texture.shift, strict=True)
    u, v = (axis * texture.repeats + shift for axis, shift in pairs)
    return u - np.floor(u), v - np.floor(v)


def _gradient(texture: Texture, image_size: int) -> np.ndarray:
    across = _axes(texture, image_size)[0]
    return (across - across.min()) / max(np.ptp(across), 1e-9)


def _noise(texture: Texture, image_size: int) -> np.ndarray:
    """Return the mean of a coarse and a fine grid of random levels, interpolated."""
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
"""Functions of a texture and an image size S that return levels (S, S) in [0, 1], dark to light."""
