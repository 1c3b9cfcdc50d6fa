"""Scenes in which something holds: drawn until one fits, then recast.

To recast a scene is to give its groups other emoji. What is where and how often stays, so that a
scene tells of what was asked by its emoji, and of nothing else.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from elip_models.data.captions import PLACES, relation
from elip_models.data.world import COUNTS, EMOJI, GRIDS, Copy, Group, Scene, sample_scene

T = TypeVar("T")

RELATIONS = ("to the left of", "to the right of", "above", "below")
MOST = max(COUNTS)
"""Copies of one emoji in a scene."""

_BESIDE, _LEVEL = 0.2, 0.12
"""Centres further apart than the first, a share of the image, are on a side; nearer than the second
they are level."""


def pick(rng: np.random.Generator, values: Collection[T]) -> T:
    """One of the values, each as likely."""
    return list(values)[rng.integers(len(values))]


def two_names(rng: np.random.Generator) -> tuple[str, str]:
    """Two different emoji."""
    first, second = rng.choice(len(EMOJI), size=2, replace=False)
    return list(EMOJI)[first], list(EMOJI)[second]


def places(clutter: int) -> tuple[str, ...]:
    """The nine places of scenes with so much clutter."""
    return tuple(max(GRIDS, key=len)) if clutter else tuple(PLACES)


def draw(
    rng: np.random.Generator, clutter: int, choices: Callable[[Scene], Sequence[T]]
) -> tuple[Scene, T]:
    """Draw scenes until one gives a choice -> that scene, and one of its choices."""
    while True:
        scene = sample_scene(rng, clutter)
        found = choices(scene)
        if found:
            return scene, pick(rng, found)


def recast(
    scene: Scene, rng: np.random.Generator, roles: Mapping[int, str], absent: Collection[str] = ()
) -> Scene:
    """The scene whose group i shows `roles[i]`; no other shows one of these, nor of `absent`."""
    asked = {*roles.values(), *absent}
    taken = asked | {group.name for group in scene.groups}
    others = iter(rng.permutation([name for name in EMOJI if name not in taken]).tolist())

    def name_of(number: int, group: Group) -> str:
        if number in roles:
            return roles[number]
        return next(others) if group.name in asked else group.name

    groups = tuple(replace(each, name=name_of(i, each)) for i, each in enumerate(scene.groups))
    return replace(scene, groups=groups)


def with_count(rng: np.random.Generator, clutter: int, name: str, count: int) -> Scene:
    """A scene with so many of an emoji, from none to `MOST`: one group, or as many in clutter."""
    if count == 0:
        return recast(sample_scene(rng, clutter), rng, {}, absent=(name,))
    if clutter:
        scene = sample_scene(rng, clutter)
        return recast(scene, rng, dict.fromkeys(others(scene, rng)[:count], name))
    scene, number = draw(rng, clutter, lambda scene: numbers(scene, count=count))
    return recast(scene, rng, {number: name})


def numbers(scene: Scene, *, place: str | None = None, count: int | None = None) -> list[int]:
    """The groups at a place, or anywhere, of so many copies, or of any number."""
    return [
        number
        for number, group in enumerate(scene.groups)
        if place in (None, group.place) and count in (None, group.count)
    ]


def others(scene: Scene, rng: np.random.Generator, *but: int) -> list[int]:
    """All groups but some, in any order."""
    return [number for number in rng.permutation(len(scene.groups)).tolist() if number not in but]


def related(scene: Scene, wanted: str) -> list[tuple[int, int]]:
    """All pairs of single emoji of which the first is so related to the second."""
    single = numbers(scene, count=1)
    return [
        (i, j)
        for i in single
        for j in single
        if i != j and relation(scene.groups[i], scene.groups[j]) == wanted
    ]


def beside(scene: Scene, number: int, wanted: str) -> list[int]:
    """The groups that are all on that side of a single emoji; none at all where one is in part."""
    asked, found = scene.groups[number].copies[0], []
    for other, group in enumerate(scene.groups):
        distances = [_distance(copy, asked, wanted) for copy in group.copies]
        if min(distances) > _BESIDE:
            found.append(other)
        elif max(distances) > _LEVEL:
            return []
    return found


def _distance(copy: Copy, asked: Copy, wanted: str) -> float:
    """How far a copy is on that side."""
    along = {
        "to the left of": asked.x - copy.x,
        "to the right of": copy.x - asked.x,
        "above": asked.y - copy.y,
        "below": copy.y - asked.y,
    }
    return along[wanted]


def cover(scene: Scene, number: int) -> Scene:
    """The scene where a board hides the place of a group."""
    groups = scene.groups[:number] + scene.groups[number + 1 :]
    return replace(scene, groups=groups, cover=scene.groups[number].box)
