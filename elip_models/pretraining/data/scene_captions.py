"""English captions of emoji scenes: one sentence per template, all true of the scene."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from elip_models.pretraining.data.scene_sampling import GROUP_NUMBERS, Group, Scene

PLACES: dict[str, tuple[int, int, str]] = {
    "top left": (-1, -1, "at the top left"),
    "top": (0, -1, "at the top"),
    "top right": (1, -1, "at the top right"),
    "left": (-1, 0, "on the left"),
    "centre": (0, 0, "in the centre"),
    "right": (1, 0, "on the right"),
    "bottom left": (-1, 1, "at the bottom left"),
    "bottom": (0, 1, "at the bottom"),
    "bottom right": (1, 1, "at the bottom right"),
}
"""Place: column (left to right), row (top to bottom), phrase."""

GRID_PLACES: dict[str, tuple[int, int, str]] = {
    "top centre": (0, -1, "at the top centre"),
    "middle left": (-1, 0, "at the middle left"),
    "middle right": (1, 0, "at the middle right"),
    "bottom centre": (0, 1, "at the bottom centre"),
}
"""Places that only grids have, in the same form; "at the top" would be ambiguous there."""

_ALL_PLACES = PLACES | GRID_PLACES

NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
_IRREGULAR_PLURALS = {
    "fish": "fish",
    "maple leaf": "maple leaves",
    "mouse": "mice",
    "sheep": "sheep",
    "tomato": "tomatoes",
}
_A_BEFORE_VOWEL = ("uni",)
_AN_BEFORE_CONSONANT = ("hour",)


def with_article(name: str) -> str:
    """Return "a dog" for "dog" and "an owl" for "owl"."""
    vowel = name[0] in "aeiou" and not name.startswith(_A_BEFORE_VOWEL)
    return f"an {name}" if vowel or name.startswith(_AN_BEFORE_CONSONANT) else f"a {name}"


def plural(name: str) -> str:
    """Return "dogs" for "dog", "strawberries" for "strawberry" and "mice" for "mouse"."""
    if name in _IRREGULAR_PLURALS:
        return _IRREGULAR_PLURALS[name]
    if name.endswith("y") and name[-2] not in "aeiou":
        return f"{name[:-1]}ies"
    return f"{name}es" if name.endswith(("s", "x", "ch", "sh")) else f"{name}s"


def in_words(count: int, name: str) -> str:
    """Return a count with a noun: "one dog", "three dogs"."""
    return f"{NUMBERS[count]} {name if count == 1 else plural(name)}"


def counted(group: Group) -> str:
    """Return the emoji of a group with their count: "a dog", "three dogs"."""
    return with_article(group.name) if group.count == 1 else in_words(group.count, group.name)


def relation(first: Group, second: Group) -> str:
    """Return where `first` is from `second`: "to the left of", "to the right of", "above", "below".

    The axis with the larger distance between the places decides; ties are horizontal. All copies of
    `first` are then on that side of all copies of `second`.
    """
    column, row, _ = _ALL_PLACES[first.place]
    other_column, other_row, _ = _ALL_PLACES[second.place]
    if abs(column - other_column) >= abs(row - other_row):
        return "to the left of" if column < other_column else "to the right of"
    return "above" if row < other_row else "below"


def at_place(place: str) -> str:
    """Return "on the left" for "left"."""
    return _ALL_PLACES[place][2]


def _placed(group: Group) -> str:
    return f"{counted(group)} {at_place(group.place)}"


def _enumerate(phrases: Sequence[str]) -> str:
    """Join phrases as "a, b and c"."""
    return " and ".join(filter(None, (", ".join(phrases[:-1]), phrases[-1])))


def _everything(scene: Scene, groups: Sequence[Group]) -> str:
    placed = _enumerate([_placed(group) for group in groups])
    return f"{placed} on {with_article(scene.background)} background"


def _background_first(scene: Scene, groups: Sequence[Group]) -> str:
    placed = _enumerate([_placed(group) for group in groups])
    return f"{with_article(scene.background)} background with {placed}"


def _inventory(scene: Scene, groups: Sequence[Group]) -> str:
    objects = _enumerate([counted(group) for group in groups])
    return f"{with_article(scene.background)} picture of {objects}"


def _places_first(scene: Scene, groups: Sequence[Group]) -> str:
    clauses = (
        f"{at_place(group.place)} there {'is' if group.count == 1 else 'are'} {counted(group)}"
        for group in groups
    )
    return " and ".join(clauses)


def _relative(scene: Scene, groups: Sequence[Group]) -> str:
    first, second = groups
    related = f"{counted(first)} {relation(first, second)} {counted(second)}"
    return f"{related}, all on {scene.background}"


class Template(NamedTuple):
    """A caption template, which names up to `most` groups of a scene in the given order."""

    write: Callable[[Scene, Sequence[Group]], str]
    most: int


_ANY = max(GROUP_NUMBERS)
TEMPLATES = (
    Template(_everything, _ANY),
    Template(_background_first, 2),
    Template(_inventory, _ANY),
    Template(_places_first, 2),
    Template(_relative, 2),
)


def named_groups(
    scene: Scene, rng: np.random.Generator, clutter: int = 0
) -> tuple[tuple[int, ...], ...]:
    """Draw, for each template, the numbers of the groups that its caption names, in order.

    A caption of a scene with clutter names as many groups as one without clutter.
    """
    named = len(scene.groups) - clutter
    orders = (rng.permutation(len(scene.groups)) for _ in TEMPLATES)
    return tuple(
        tuple(order[: min(named, template.most)].tolist())
        for template, order in zip(TEMPLATES, orders, strict=True)
    )


def caption_scene(scene: Scene, named: Sequence[Sequence[int]]) -> tuple[str, ...]:
    """Return one caption per template, which names the groups that `named_groups` drew for it."""
    return tuple(
        template.write(scene, [scene.groups[i] for i in numbers])
        for template, numbers in zip(TEMPLATES, named, strict=True)
    )
