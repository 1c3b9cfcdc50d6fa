"""Built-in scenes: reproducible, drawn at any size, with true captions and masks of what they name.

The captions are read with regular expressions that know only the words of emoji and places.
"""

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest

from elip_models.pretraining.data import EmojiScenes, render
from elip_models.pretraining.data.scene_captions import at_place, counted
from elip_models.pretraining.data.scene_sampling import (
    BACKGROUNDS,
    COUNTS,
    EMOJI,
    MAX_CLUTTER,
    Group,
    Scene,
    place_names,
)
from elip_models.pretraining.data.scenes import visible_masks

OPTIONS = [{}, {"clutter": 1}, {"clutter": 4, "textures": True}, {"clutter": MAX_CLUTTER}]
SIDES = {
    "to the left of": ("x", -1),
    "to the right of": ("x", 1),
    "above": ("y", -1),
    "below": ("y", 1),
}
OBJECTS = {
    counted(Group(name, None, (None,) * count)): (name, count) for name in EMOJI for count in COUNTS
}
PLACES = {at_place(place): place for place in {*place_names(0), *place_names(1)}}


def alternatives(words) -> str:
    return "(" + "|".join(sorted(map(re.escape, words), key=len, reverse=True)) + ")"


OBJECT = alternatives(OBJECTS)


def check_caption(caption: str, scene: Scene) -> tuple[list[str], int, int, bool]:
    """Assert all claims of a caption.

    Return the emoji that it names, its numbers of places and relations, and whether it names the
    background.
    """
    groups = {(group.name, group.count): group for group in scene.groups}
    objects = [OBJECTS[text] for text in re.findall(rf"\b{OBJECT}\b", caption)]
    assert set(objects) <= set(groups), caption
    placed = re.findall(rf"\b{OBJECT} {alternatives(PLACES)}\b", caption)
    for text, phrase in placed:
        assert groups[OBJECTS[text]].place.name == PLACES[phrase], caption
    related = re.findall(rf"\b{OBJECT} {alternatives(SIDES)} {OBJECT}\b", caption)
    for first, side, second in related:
        axis, sign = SIDES[side]
        copies = groups[OBJECTS[first]].copies, groups[OBJECTS[second]].copies
        for one, other in itertools.product(*copies):
            assert sign * (getattr(one, axis) - getattr(other, axis)) > 0, caption
    colours = re.findall(rf"{alternatives(BACKGROUNDS)} (?:background|picture)", caption)
    assert set(colours) <= {scene.background}, caption
    return [name for name, _ in objects], len(placed), len(related), bool(colours)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_sample_depends_on_seed_index_and_options_alone(options):
    short, long = (EmojiScenes(size, seed=7, **options) for size in (3, 1000))
    for index in range(3):
        assert short[index] == long[index]
        assert short[index].captions == short.captions(index)
    sources = [EmojiScenes(50, seed=seed, **options) for seed in range(4)]
    assert len({source.scene(index) for source in sources for index in range(50)}) == 200


def test_a_seed_means_the_same_scene_in_every_release():
    assert EmojiScenes(1, seed=0).captions(0)[0] == (
        "three dogs in the centre, a butterfly on the left and a pear on the right on an orange "
        "background"
    )


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_five_captions_are_true_and_name_the_emoji_of_their_masks(options):
    source, distinct = EmojiScenes(60, seed=3, image_size=32, **options), []
    for index in range(60):
        scene, captions = source.scene(index), source.captions(index)
        claims = [check_caption(caption, scene) for caption in captions]
        least = len(scene.groups) - source.clutter
        assert len(set(captions)) == 5
        distinct.append(len({frozenset(names) for names, *_ in claims}))
        assert [(len(names), *others) for names, *others in claims] == [
            (least, least, 0, True),
            (2, 2, 0, True),
            (least, 0, 0, True),
            (2, 2, 0, False),
            (2, 0, 1, True),
        ]
        masks = dict(
            zip((group.name for group in scene.groups), visible_masks(scene, 32), strict=True)
        )
        for caption, (names, *_) in enumerate(claims):
            mask = np.logical_or.reduce([masks[name] for name in names])
            np.testing.assert_array_equal(source.named_mask(index, caption), mask)
    assert source.clutter < 4 or np.mean(distinct) > 4  # each caption names other emoji


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_masks_are_what_changes_when_a_group_is_not_drawn(options):
    source = EmojiScenes(12, seed=8, **options)
    for index in range(12):
        scene = replace(source.scene(index), background="gray")  # no part of an emoji is
        whole, masks = np.asarray(render(scene, 64)).astype(int), visible_masks(scene, 64)
        assert masks.shape == (len(scene.groups), 64, 64) and masks.sum(0).max() == 1
        for number, mask in enumerate(masks):
            others = scene.groups[:number] + scene.groups[number + 1 :]
            without = np.asarray(render(replace(scene, groups=others), 64)).astype(int)
            change = np.abs(whole - without).max(-1)
            assert (change[mask] > 0).sum() > 0.9 * mask.sum() > 20
            assert change[~mask].max() <= 128  # what is less than half opaque


@pytest.mark.parametrize("image_size", [1, 16, 97, 224])
def test_renders_at_any_size(image_size):
    source = EmojiScenes(3, image_size=image_size, clutter=4, textures=True)
    for index, (image, *_) in enumerate(source):
        assert image.size == (image_size, image_size) and image.mode == "RGB"
        assert source.named_mask(index, 0).shape == (image_size, image_size)
