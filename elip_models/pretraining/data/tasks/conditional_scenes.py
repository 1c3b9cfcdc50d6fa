"""Sampling of scenes that satisfy a condition, and replacement of their emoji.

A scene is drawn until it satisfies the condition. Its groups then get other emoji, while places and
counts stay. The emoji of the question are thus the only sign of the answer in a scene.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import numpy as np

from elip_models.pretraining.data.scene_captions import PLACES, relation
from elip_models.pretraining.data.scene_sampling import (
    COUNTS,
    EMOJI,
    GRIDS,
    Copy,
    Group,
    Scene,
    sample_scene,
)

T = TypeVar("T")

RELATIONS = ("to the left of", "to the right of", "above", "below")
MOST = max(COUNTS)
"""Largest number of copies of one emoji in a scene."""

_BESIDE, _LEVEL = 0.2, 0.12
"""Distance of centres, as a share of the image, above which one emoji is beside another, and below
which it is not."""


def pick(rng: np.random.Generator, values: Collection[T]) -> T:
    """Return one of the values, drawn uniformly."""
    return list(values)[rng.integers(len(values))]


def sample_two_emoji(rng: np.random.Generator) -> tuple[str, str]:
    """Return the names of two different emoji."""
    first, second = rng.choice(len(EMOJI), size=2, replace=False)
    return list(EMOJI)[first], list(EMOJI)[second]


def place_names(clutter: int) -> tuple[str, ...]:
    """Return the nine places of scenes with or without clutter."""
    return tuple(max(GRIDS, key=len)) if clutter else tuple(PLACES)


def sample_scene_where(
    rng: np.random.Generator, clutter: int, choices: Callable[[Scene], Sequence[T]]
) -> tuple[Scene, T]:
    """Draw scenes until `choices(scene)` is not empty; return the scene and a random choice."""
    while True:
        scene = sample_scene(rng, clutter)
        found = choices(scene)
        if found:
            return scene, pick(rng, found)


def assign_emoji(
    scene: Scene, rng: np.random.Generator, names: Mapping[int, str], absent: Collection[str] = ()
) -> Scene:
    """Return the scene with emoji `names[i]` in group i.

    No other group shows one of these emoji or one of `absent`.
    """
    reserved = {*names.values(), *absent}
    used = reserved | {group.name for group in scene.groups}
    others = iter(rng.permutation([name for name in EMOJI if name not in used]).tolist())

    def name_of(number: int, group: Group) -> str:
        if number in names:
            return names[number]
        return next(others) if group.name in reserved else group.name

    groups = tuple(replace(each, name=name_of(i, each)) for i, each in enumerate(scene.groups))
    return replace(scene, groups=groups)


def scene_with_count(rng: np.random.Generator, clutter: int, name: str, count: int) -> Scene:
    """Return a scene with `count` copies of an emoji, 0 to `MOST`.

    They form one group, or one group each in a scene with clutter.
    """
    if count == 0:
        return assign_emoji(sample_scene(rng, clutter), rng, {}, absent=(name,))
    if clutter:
        scene = sample_scene(rng, clutter)
        return assign_emoji(scene, rng, dict.fromkeys(other_groups(scene, rng)[:count], name))
    scene, number = sample_scene_where(rng, clutter, partial(find_groups, count=count))
    return assign_emoji(scene, rng, {number: name})


def find_groups(scene: Scene, *, place: str | None = None, count: int | None = None) -> list[int]:
    """Return the groups at a place (None: any) with a number of copies (None: any)."""
    return [
        number
        for number, group in enumerate(scene.groups)
        if place in (None, group.place) and count in (None, group.count)
    ]


def other_groups(scene: Scene, rng: np.random.Generator, *excluded: int) -> list[int]:
    """Return all groups except `excluded`, in random order."""
    return [i for i in rng.permutation(len(scene.groups)).tolist() if i not in excluded]


def related_pairs(scene: Scene, wanted: str) -> list[tuple[int, int]]:
    """Return the pairs of single emoji with the relation `wanted` of the first to the second."""
    single = find_groups(scene, count=1)
    return [
        (i, j)
        for i in single
        for j in single
        if i != j and relation(scene.groups[i], scene.groups[j]) == wanted
    ]


def groups_beside(scene: Scene, number: int, wanted: str) -> list[int]:
    """Return the groups that are entirely on one side of a single emoji.

    The result is empty if a group is only partly on that side.
    """
    anchor, found = scene.groups[number].copies[0], []
    for other, group in enumerate(scene.groups):
        distances = [_distance(copy, anchor, wanted) for copy in group.copies]
        if min(distances) > _BESIDE:
            found.append(other)
        elif max(distances) > _LEVEL:
            return []
    return found


def _distance(copy: Copy, anchor: Copy, wanted: str) -> float:
    along = {
        "to the left of": anchor.x - copy.x,
        "to the right of": copy.x - anchor.x,
        "above": anchor.y - copy.y,
        "below": copy.y - anchor.y,
    }
    return along[wanted]


def hide_group(scene: Scene, number: int) -> Scene:
    """Return the scene with a dark rectangle instead of a group."""
    groups = scene.groups[:number] + scene.groups[number + 1 :]
    return replace(scene, groups=groups, cover=scene.groups[number].box)
