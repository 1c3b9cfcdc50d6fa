"""Scenes of emoji as data, and their random sampling.

A scene divides the image into a grid of equal places, and shows one to three copies of an emoji at
some of them. Positions are fractions of the image, so a scene can be drawn at any size.
"""

import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import ceil
from random import Random
from typing import NamedTuple

_CHARACTERS = (
    "🐶🐰🦊🐼🐯🐮🐸🐧🦉🦀🦋🐢🐙🐋🐊🐘🦘🦜🦚🐉"
    "🍎🍐🍌🍓🍍🍆🥕🥐🍔🌮🍩🎂🍭🚕🚒🚜🚀🚁🚂⚓"
    "🔑🎺🔔📺🎈🪁⚽🎩💣🧸⛺🔋🌈💚💜👻🌵🌷🌴⚙"
)
EMOJI = {
    unicodedata.name(character).lower().removesuffix(" face"): character
    for character in _CHARACTERS
}
"""Name, "dog" for Unicode's "dog face": the single code point that OpenMoji's font draws."""

BACKGROUNDS = {
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

COUNTS = {1: 0.6, 2: 0.25, 3: 0.15}
"""Number of copies of one emoji in a group: its probability. Few copies are drawn larger."""

GROUP_NUMBERS = (2, 3)
"""Possible numbers of groups in a scene, without clutter."""

NAMES, COLOURS = tuple(EMOJI), tuple(BACKGROUNDS)
SIDES = ("to the left of", "to the right of", "above", "below")

_ROWS = {1: ("",), 2: ("top", "bottom"), 3: ("top", "middle", "bottom")}
_COLUMNS = {1: ("",), 2: ("left", "right"), 3: ("left", "centre", "right")}
# Few shares of a cell and few scale factors keep the cache of glyphs small.
_FILLS, _SHRINKS, _ANGLES = (0.80, 0.88, 0.96), (0.82, 1.0), (-20, -10, 0, 10, 20)
_TEXTURE_CELLS = (2, 16)


class Box(NamedTuple):
    """A rectangle in fractions of the image."""

    left: float
    top: float
    width: float
    height: float


class Place(NamedTuple):
    """A cell of a grid."""

    name: str
    row: int
    column: int
    box: Box


class Copy(NamedTuple):
    """One drawn emoji: centre and longer side in fractions of the image, angle in degrees."""

    x: float
    y: float
    size: float
    angle: int = 0


@dataclass(frozen=True)
class Group:
    """Copies of one emoji at one place. Groups of a scene differ in place."""

    name: str
    place: Place
    copies: tuple[Copy, ...]

    @property
    def count(self) -> int:
        """Number of copies."""
        return len(self.copies)

    def is_beside(self, other: "Group", side: str) -> bool:
        """Return whether all copies are on a side of all copies of `other`; see `SIDES`."""
        here, there = self.place, other.place
        return {
            "to the left of": here.column < there.column,
            "to the right of": here.column > there.column,
            "above": here.row < there.row,
            "below": here.row > there.row,
        }[side]


class Texture(NamedTuple):
    """A square of `side` x `side` shades of the background, stretched over the image.

    `levels` has a byte for each cell, 0 for the darkest shade.
    """

    side: int
    levels: bytes
    is_smooth: bool


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


def _grid(rows: int, columns: int) -> tuple[Place, ...]:
    """Return equal places: "top left", ..; the middle one is called "centre"."""
    places = []
    for row, vertical in enumerate(_ROWS[rows]):
        for column, horizontal in enumerate(_COLUMNS[columns]):
            name = f"{vertical} {horizontal}".strip()
            name = "centre" if name in ("middle", "middle centre") else name
            box = Box(column / columns, row / rows, 1 / columns, 1 / rows)
            places.append(Place(name, row, column, box))
    return tuple(places)


GRIDS = (_grid(1, 2), _grid(2, 1), *3 * (_grid(2, 2),), _grid(1, 3), _grid(3, 1))
"""Corners are more probable than thirds of the image, where the emoji are smaller."""

CLUTTER_GRIDS = (_grid(3, 3),)
"""With clutter, each place has one emoji, since copies would be too small."""

MAX_CLUTTER = 9 - max(GROUP_NUMBERS)
"""Largest number of additional groups for which there is a place."""


def place_names(clutter: int) -> tuple[str, ...]:
    """Return the nine places of scenes with or without clutter."""
    grids = CLUTTER_GRIDS if clutter else GRIDS
    return tuple(dict.fromkeys(place.name for grid in grids for place in grid))


def sample_scene(
    rng: Random,
    clutter: int = 0,
    *,
    names: Sequence[str] = (),
    absent: Collection[str] = (),
    counts: Sequence[int] = (),
    place: str | None = None,
    numbers: Sequence[int] = GROUP_NUMBERS,
) -> Scene:
    """Draw a scene: its background, grid, places, emoji and counts.

    Args:
        rng: Random generator.
        clutter: Number of additional groups; if above 0, each group has one copy.
        names: Emoji of the first groups; all other groups show other emoji.
        absent: Emoji that no other group shows.
        counts: Numbers of copies in the first groups.
        place: Place of the first group.
        numbers: Possible numbers of groups, without clutter.
    """
    number = rng.choice(numbers) + clutter
    grids = [grid for grid in (CLUTTER_GRIDS if clutter else GRIDS) if len(grid) >= number]
    if place is None:
        places = rng.sample(rng.choice(grids), number)
    else:
        first, grid = rng.choice(
            [(cell, grid) for grid in grids for cell in grid if cell.name == place]
        )
        places = [first, *rng.sample([cell for cell in grid if cell != first], number - 1)]
    others = [name for name in NAMES if name not in names and name not in absent]
    names = [*names, *rng.sample(others, number - len(names))]
    counts = [*counts, *rng.choices([*COUNTS], [*COUNTS.values()], k=number - len(counts))]
    groups = (
        Group(name, cell, _place_copies(rng, cell.box, 1 if clutter else count))
        for name, cell, count in zip(names, places, counts, strict=True)
    )
    return Scene(rng.choice(COLOURS), tuple(groups))


def add_texture(rng: Random, scene: Scene) -> Scene:
    """Return the scene on a random texture, with random sizes and angles of the emoji."""

    def varied(copy: Copy) -> Copy:
        return Copy(copy.x, copy.y, rng.choice(_SHRINKS) * copy.size, rng.choice(_ANGLES))

    groups = tuple(
        replace(group, copies=tuple(map(varied, group.copies))) for group in scene.groups
    )
    side = rng.randint(*_TEXTURE_CELLS)
    texture = Texture(side, rng.randbytes(side * side), rng.random() < 0.5)
    return replace(scene, groups=groups, texture=texture)


def hide_group(scene: Scene, number: int) -> Scene:
    """Return the scene with a dark rectangle instead of a group."""
    groups = scene.groups[:number] + scene.groups[number + 1 :]
    return replace(scene, groups=groups, cover=scene.groups[number].place.box)


@cache
def _cells(box: Box, count: int) -> tuple[float, list[tuple[float, float]]]:
    """Return the side of `count` equal squares in the box, as large as possible, and centres."""
    sides = {
        columns: min(box.width / columns, box.height / ceil(count / columns))
        for columns in range(1, count + 1)
    }
    columns = max(sides, key=sides.get)
    width, height = box.width / columns, box.height / ceil(count / columns)
    cells = (divmod(i, columns) for i in range(count))
    centres = [
        (box.left + (column + 0.5) * width, box.top + (row + 0.5) * height) for row, column in cells
    ]
    return sides[columns], centres


def _place_copies(rng: Random, box: Box, count: int) -> tuple[Copy, ...]:
    """Return copies of the same size, each shifted at random within its cell."""
    side, centres = _cells(box, count)
    size = rng.choice(_FILLS) * side
    slack = (side - size) / 2
    return tuple(
        Copy(x + rng.uniform(-slack, slack), y + rng.uniform(-slack, slack), size)
        for x, y in centres
    )
