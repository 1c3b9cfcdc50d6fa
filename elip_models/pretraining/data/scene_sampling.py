"""Scenes of emoji as data, and their random sampling.

Every position is a fraction of the image, so a scene can be drawn at any size. OpenMoji's font has
glyphs for all emoji listed here; their names follow Unicode.
"""

import re
import unicodedata
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from elip_models.pretraining.data.textures import Texture, sample_texture

_CHARACTERS = (
    "🐶🐭🦊🐼🐯🐮🐸🐧🦉🦄🦋🐢🐙🐳🐊🐪🦘🦜🦚🐉"
    "🍎🍐🍌🍓🍍🍆🥕🥐🍔🌮🍩🎂🍭🚕🚒🚜🚀🚁🚂⚓"
    "🔑🎺🔔📺⏳🪁⚽🎩💣🧸⛺🔋🌈💚💜👻🌵🌷🌴⚙"
)
_UNNEEDED_WORDS = re.compile(
    r"^(black|white medium|electric|european|birthday|steam|spouting|dromedary) "
    r"| (face|building)$| with .*$"
)


def _short_name(character: str) -> str:
    """Return the Unicode name without words that are rare in captions: "dog" for "dog face"."""
    return _UNNEEDED_WORDS.sub("", unicodedata.name(character).lower())


EMOJI: dict[str, str] = {_short_name(character): character for character in _CHARACTERS}
"""Name: the single code point that the font draws."""

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "gray": (165, 165, 165),
    "red": (233, 102, 92),
    "orange": (250, 172, 88),
    "yellow": (252, 234, 130),
    "green": (128, 196, 122),
    "blue": (112, 170, 236),
    "purple": (178, 138, 218),
}
"""Name: RGB colour, light enough for the black outlines of the glyphs."""

COVER_COLOUR = (40, 40, 44)
"""RGB of the rectangle that hides a place; darker than any background."""

COUNTS = {1: 0.6, 2: 0.25, 3: 0.15}
"""Number of copies of one emoji in a group: its probability. Few copies are drawn larger."""

GROUP_NUMBERS = (2, 3)
"""Possible numbers of groups in a scene."""


class Box(NamedTuple):
    """A rectangle in fractions of the image."""

    left: float
    top: float
    width: float
    height: float


_CORNERS = {
    "top left": Box(0, 0, 1 / 2, 1 / 2),
    "top right": Box(1 / 2, 0, 1 / 2, 1 / 2),
    "bottom left": Box(0, 1 / 2, 1 / 2, 1 / 2),
    "bottom right": Box(1 / 2, 1 / 2, 1 / 2, 1 / 2),
}
_HALVES = {
    "left": Box(0, 0, 1 / 2, 1),
    "right": Box(1 / 2, 0, 1 / 2, 1),
    "top": Box(0, 0, 1, 1 / 2),
    "bottom": Box(0, 1 / 2, 1, 1 / 2),
}


def _half_and_corners(half: str, opposite: str) -> dict[str, Box]:
    corners = {place: box for place, box in _CORNERS.items() if opposite in place.split()}
    return {half: _HALVES[half], **corners}


LAYOUTS: tuple[dict[str, Box], ...] = (
    _CORNERS,
    {place: _HALVES[place] for place in ("left", "right")},
    {place: _HALVES[place] for place in ("top", "bottom")},
    _half_and_corners("left", "right"),
    _half_and_corners("right", "left"),
    _half_and_corners("top", "bottom"),
    _half_and_corners("bottom", "top"),
    {place: Box(i / 3, 0, 1 / 3, 1) for i, place in enumerate(("left", "centre", "right"))},
    {place: Box(0, i / 3, 1, 1 / 3) for i, place in enumerate(("top", "centre", "bottom"))},
)
"""Places that tile the image; a scene uses some places of one layout."""


def _grid(rows: tuple[str, ...], columns: tuple[str, ...]) -> dict[str, Box]:
    """Return equal places: "top left", ..; the middle one is called "centre"."""
    width, height = 1 / len(columns), 1 / len(rows)
    return {
        "centre" if row == "middle" and column == "centre" else f"{row} {column}": Box(
            j * width, i * height, width, height
        )
        for i, row in enumerate(rows)
        for j, column in enumerate(columns)
    }


_ROWS, _COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
GRIDS: tuple[dict[str, Box], ...] = (
    _CORNERS,
    _grid(_ROWS, _COLUMNS),
    _grid(_ROWS, ("left", "right")),
    _grid(("top", "bottom"), _COLUMNS),
)
"""Layouts of scenes with clutter, with one emoji at a place."""

MAX_CLUTTER = max(map(len, GRIDS)) - max(GROUP_NUMBERS)
"""Largest number of additional groups for which there is a place."""

# Slots (left, top, side) in a square box, as fractions of the box, by count.
_SQUARE_SLOTS = {
    1: ((0, 0, 1),),
    2: ((0, 0, 0.54), (0.46, 0.46, 0.54)),
    3: ((0.25, 0, 0.5), (0, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
# Glyph side as a share of its slot. Few values keep the glyph cache small.
_FILLS = (0.80, 0.88, 0.96)
# Scale factors and angles in degrees of the emoji in textured scenes.
_SHRINKS = (0.82, 1.0)
_ANGLES = (-20, -10, 0, 10, 20)


class Copy(NamedTuple):
    """One drawn emoji: centre and longer side in fractions of the image, angle in degrees."""

    x: float
    y: float
    size: float
    angle: int = 0


@dataclass(frozen=True)
class Group:
    """Copies of one emoji at one place. Groups of a scene differ in emoji and place.

    Args:
        name: Name of the emoji.
        place: Name of the place.
        copies: The drawn copies.
        box: Rectangle of the place, or None if it is not needed.
    """

    name: str
    place: str
    copies: tuple[Copy, ...]
    box: Box | None = None

    @property
    def count(self) -> int:
        """Number of copies."""
        return len(self.copies)


@dataclass(frozen=True)
class Scene:
    """A background with groups of emoji.

    Args:
        background: Name of the colour.
        groups: One group for a picture of a class; otherwise two or three, and the clutter.
        texture: Texture of the background. None: a uniform colour.
        cover: Dark rectangle that hides one place, which has no group.
    """

    background: str
    groups: tuple[Group, ...]
    texture: Texture | None = None
    cover: Box | None = None


def sample_scene(rng: np.random.Generator, clutter: int = 0) -> Scene:
    """Draw a scene: its background, layout, places, emoji and counts.

    With `clutter`, the scene has that many more groups, and each group has one copy.
    """
    background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    number = GROUP_NUMBERS[rng.integers(len(GROUP_NUMBERS))] + clutter
    layouts = [layout for layout in (GRIDS if clutter else LAYOUTS) if len(layout) >= number]
    layout = layouts[rng.integers(len(layouts))]
    places = [list(layout)[i] for i in rng.permutation(len(layout))[:number]]
    names = [list(EMOJI)[i] for i in rng.choice(len(EMOJI), size=number, replace=False)]
    counts = rng.choice(list(COUNTS), p=list(COUNTS.values()), size=number)
    if clutter:
        counts = [1] * number  # more copies would be too small at a place of a grid
    groups = (
        Group(name, place, _place_copies(layout[place], int(count), rng), layout[place])
        for name, place, count in zip(names, places, counts, strict=True)
    )
    return Scene(background, tuple(groups))


def sample_single_scene(name: str, rng: np.random.Generator) -> Scene:
    """Draw a picture of one emoji: its background and place."""
    background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    layout = LAYOUTS[rng.integers(len(LAYOUTS))]
    place = list(layout)[rng.integers(len(layout))]
    copies = _place_copies(layout[place], 1, rng)
    return Scene(background, (Group(name, place, copies, layout[place]),))


def add_texture(scene: Scene, rng: np.random.Generator) -> Scene:
    """Return the scene on a random texture, with random sizes and angles of the emoji."""
    number = sum(group.count for group in scene.groups)
    shrinks, angles = (iter(rng.choice(v, size=number).tolist()) for v in (_SHRINKS, _ANGLES))
    groups = []
    for group in scene.groups:
        copies = (Copy(c.x, c.y, next(shrinks) * c.size, next(angles)) for c in group.copies)
        groups.append(replace(group, copies=tuple(copies)))
    return replace(scene, groups=tuple(groups), texture=sample_texture(rng))


def _slots(box: Box, count: int) -> list[Box]:
    """Return `count` equal squares in the box: a fixed pattern, or a row along its longer side."""
    if box.width == box.height:
        unit, slots = box.width, _SQUARE_SLOTS[count]
        return [
            Box(box.left + left * unit, box.top + top * unit, side * unit, side * unit)
            for left, top, side in slots
        ]
    side = min(box.width, box.height, max(box.width, box.height) / count)
    centres = [(i + 0.5) / count for i in range(count)]
    along, across = ((x, 0.5) for x in centres), ((0.5, y) for y in centres)
    return [
        Box(box.left + x * box.width - side / 2, box.top + y * box.height - side / 2, side, side)
        for x, y in (along if box.width > box.height else across)
    ]


def _place_copies(box: Box, count: int, rng: np.random.Generator) -> tuple[Copy, ...]:
    """Return one copy per slot, all of the same size, each shifted at random within its slot."""
    fill = _FILLS[rng.integers(len(_FILLS))]
    moves = rng.uniform(-0.5, 0.5, size=(count, 2)).tolist()
    copies = []
    for slot, (dx, dy) in zip(_slots(box, count), moves, strict=True):
        slack = (1 - fill) * slot.width
        x = slot.left + slot.width / 2 + dx * slack
        y = slot.top + slot.height / 2 + dy * slack
        copies.append(Copy(x, y, fill * slot.width))
    return tuple(copies)
