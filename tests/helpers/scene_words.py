"""The words of captions and questions on emoji scenes, and what they say of a scene."""

from elip_models.pretraining.data.scene_captions import at_place, plural
from elip_models.pretraining.data.scene_sampling import EMOJI, Group, Scene, place_names

SINGULAR = {name: name for name in EMOJI} | {plural(name): name for name in EMOJI}
PLACES = {at_place(place): place for place in {*place_names(0), *place_names(1)}}
SIDES = "to the left of|to the right of|above|below"
NAME = "|".join(sorted(SINGULAR, key=len, reverse=True))
"""Pattern of any emoji, in the singular or the plural."""


def named(scene: Scene, name: str) -> list[Group]:
    return [group for group in scene.groups if group.name == SINGULAR[name]]


def count(scene: Scene, name: str) -> int:
    return sum(group.count for group in named(scene, name))


def the_one(scene: Scene, name: str) -> Group:
    (group,) = named(scene, name)
    assert group.count == 1
    return group
