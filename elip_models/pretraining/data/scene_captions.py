"""English captions of emoji scenes: one sentence per template, all true of the scene."""

from collections.abc import Sequence
from random import Random

from elip_models.calibration.class_names import with_article
from elip_models.pretraining.data.scene_sampling import SIDES, Group, Scene

NUMBERS = ("no", "one", "two", "three", "four", "five", "six")

TEMPLATES = {
    "{placed} on {background} background": 3,
    "{background} background with {placed}": 2,
    "{background} picture of {counted}": 3,
    "an image of {placed}": 2,
    "{related} on {background} background": 2,
}
"""Template of a caption: the largest number of groups that it names."""


def plural(name: str) -> str:
    """Return "dogs" for "dog", "foxes" for "fox" and "strawberries" for "strawberry"."""
    if name.endswith("y") and name[-2] not in "aeiou":
        return f"{name[:-1]}ies"
    return f"{name}es" if name.endswith(("s", "x")) else f"{name}s"


def in_words(count: int, name: str) -> str:
    """Return a count with a noun: "one dog", "three dogs"."""
    return f"{NUMBERS[count]} {name if count == 1 else plural(name)}"


def counted(group: Group) -> str:
    """Return the emoji of a group with their count: "a dog", "three dogs"."""
    return with_article(group.name) if group.count == 1 else in_words(group.count, group.name)


def at_place(place: str) -> str:
    """Return "on the left" for "left"."""
    preposition = {"left": "on", "right": "on", "centre": "in"}.get(place, "at")
    return f"{preposition} the {place}"


def relation(first: Group, second: Group) -> str:
    """Return the first of `SIDES` that is true of two groups."""
    return next(side for side in SIDES if first.is_beside(second, side))


def named_groups(rng: Random, scene: Scene, clutter: int = 0) -> list[list[int]]:
    """Draw, for each template, the numbers of the groups that its caption names, in order.

    A caption of a scene with clutter names as many groups as one without clutter.
    """
    number = len(scene.groups)
    return [rng.sample(range(number), min(number - clutter, most)) for most in TEMPLATES.values()]


def caption_scene(scene: Scene, named: Sequence[Sequence[int]]) -> tuple[str, ...]:
    """Return one caption per template, which names the groups that `named_groups` drew for it."""
    captions = []
    for template, numbers in zip(TEMPLATES, named, strict=True):
        groups = [scene.groups[i] for i in numbers]
        places = [f"{counted(group)} {at_place(group.place.name)}" for group in groups]
        caption = template.format(
            background=with_article(scene.background),
            counted=_enumerate([counted(group) for group in groups]),
            placed=_enumerate(places),
            related=f"{counted(groups[0])} {relation(*groups[:2])} {counted(groups[1])}",
        )
        captions.append(caption)
    return tuple(captions)


def _enumerate(phrases: Sequence[str]) -> str:
    """Join phrases as "a, b and c"."""
    return " and ".join(filter(None, (", ".join(phrases[:-1]), phrases[-1])))
