"""EmojiScenes with clutter and textures: captions name some of the emoji, and masks locate them."""

import re
from collections import Counter
from colorsys import rgb_to_hsv
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from elip_models.pretraining.data import BACKGROUNDS, EmojiScenes, open_classes, open_source, render
from elip_models.pretraining.data.scene_captions import GRID_PLACES, PLACES
from elip_models.pretraining.data.scene_sampling import MAX_CLUTTER, Copy, Group, Scene
from elip_models.pretraining.data.scenes import draw_emoji, visible_masks
from elip_models.pretraining.data.textures import PATTERNS, Texture, draw_texture
from tests.pretraining.data.test_data_scenes import OBJECT, OBJECTS, check_caption

COUNT = 120


@pytest.fixture(scope="module")
def source() -> EmojiScenes:
    return EmojiScenes(COUNT, seed=3, clutter=4, textures=True)


@pytest.fixture(scope="module")
def scenes(source) -> list[Scene]:
    return [source.scene(index) for index in range(COUNT)]


def test_same_seed_and_index_give_the_same_sample_whatever_the_size(source):
    longer = EmojiScenes(10 * COUNT, seed=3, clutter=4, textures=True)
    for index in range(3):
        assert source[index].captions == longer[index].captions == longer.captions(index)
        assert source[index].image.tobytes() == longer[index].image.tobytes()


def test_texture_changes_no_emoji_place_or_count():
    plain, on_texture = (
        EmojiScenes(40, clutter=2, textures=textures) for textures in (False, True)
    )
    for index in range(40):
        assert plain.captions(index) == on_texture.captions(index)
        assert plain.scene(index).texture is None
        groups = plain.scene(index).groups, on_texture.scene(index).groups
        for before, after in zip(*groups, strict=True):
            assert (before.name, before.place) == (after.name, after.place)
            for one, other in zip(before.copies, after.copies, strict=True):
                assert one[:2] == other[:2] and other.size <= one.size


@pytest.mark.parametrize("clutter", [1, 4, MAX_CLUTTER])
def test_clutter_adds_emoji_at_distinct_places(clutter):
    source = EmojiScenes(COUNT, seed=1, clutter=clutter)
    numbers, places = Counter(), set()
    for index in range(COUNT):
        groups = source.scene(index).groups
        assert len({group.name for group in groups}) == len(groups)
        assert len({group.place for group in groups}) == len(groups)
        assert all(group.count == 1 for group in groups)
        numbers[len(groups)] += 1
        places |= {group.place for group in groups}
    assert set(numbers) == {2 + clutter, 3 + clutter}
    assert places == {*GRID_PLACES, "centre", *(place for place in PLACES if " " in place)}


def test_emoji_have_at_least_14_pixels_at_64_pixels(scenes):
    sides = {round(64 * group.copies[0].size) for scene in scenes for group in scene.groups}
    assert 13 < min(sides) < 16 < max(sides)
    assert {group.copies[0].angle for scene in scenes for group in scene.groups} >= {-20, 0, 20}


def test_captions_are_true_and_name_the_named_groups(source, scenes):
    for index, scene in enumerate(scenes):
        captions, named = source.captions(index), source.named(index)
        assert len(set(captions)) == 5 == len(named)
        least = len(scene.groups) - source.clutter
        claims = [check_caption(caption, scene) for caption in captions]
        assert [claim[0] for claim in claims] == [least, 2, least, 2, 2] == list(map(len, named))
        for caption, numbers in zip(captions, named, strict=True):
            mentioned = [OBJECTS[text][0] for text in re.findall(rf"\b{OBJECT}\b", caption)]
            assert mentioned == [scene.groups[i].name for i in numbers]


def test_captions_of_a_scene_name_different_groups_uniformly(source, scenes):
    shares, distinct = [], []
    for index, scene in enumerate(scenes):
        named = source.named(index)
        distinct.append(len({frozenset(numbers) for numbers in named}))
        shares.append(np.bincount(np.concatenate(named), minlength=len(scene.groups))[:6])
    assert np.mean(distinct) > 4
    expected = np.mean(shares)
    assert np.abs(np.mean(shares, axis=0) - expected).max() < 0.2 * expected


@pytest.mark.parametrize("options", [{}, {"clutter": 4, "textures": True}])
def test_masks_are_what_changes_when_a_group_is_not_drawn(options):
    source = EmojiScenes(12, seed=8, **options)
    for index in range(12):
        scene = replace(source.scene(index), background="gray")  # no part of an emoji is
        whole = np.asarray(render(scene, 64)).astype(int)
        masks = source.masks(index)
        assert masks.shape == (len(scene.groups), 64, 64) and masks.dtype == bool
        assert masks.sum(0).max() == 1
        for number, mask in enumerate(masks):
            others = scene.groups[:number] + scene.groups[number + 1 :]
            without = np.asarray(render(replace(scene, groups=others), 64)).astype(int)
            change = np.abs(whole - without).max(-1)
            assert (change[mask] > 0).sum() > 0.9 * mask.sum() > 20
            assert change[~mask].max() <= 128  # what is less than half opaque


def test_masks_are_the_pixels_that_hide_half_of_the_background_or_more(source, scenes):
    for index in range(12):
        for group, mask in zip(scenes[index].groups, source.masks(index), strict=True):
            alone = (Scene(name, (group,)) for name in ("white", "gray"))
            white, gray = (np.asarray(render(scene, 64)).astype(int) for scene in alone)
            shown = (white - gray).mean(-1) / (255 - BACKGROUNDS["gray"][0])
            clear = np.abs(shown - 0.5) > 0.02
            np.testing.assert_array_equal(mask[clear], shown[clear] < 0.5)


def test_an_overlapped_emoji_is_masked_where_it_is_visible():
    behind = Group("dog", "left", (Copy(0.4, 0.5, 0.5),))
    before = Group("locomotive", "right", (Copy(0.6, 0.5, 0.5, angle=15),))
    both = visible_masks(Scene("white", (behind, before)), 64)
    alone = np.concatenate(
        [visible_masks(Scene("white", (each,)), 64) for each in (behind, before)]
    )
    assert (alone[0] & alone[1]).sum() > 50
    np.testing.assert_array_equal(both, [alone[0] & ~alone[1], alone[1]])


def test_the_mask_of_a_caption_covers_the_named_groups(source):
    masks, named = source.masks(5), source.named(5)
    for caption, numbers in enumerate(named):
        expected = np.logical_or.reduce([masks[i] for i in numbers])
        np.testing.assert_array_equal(source.named_mask(5, caption), expected)
        assert 0 < expected.sum() < masks.sum()


def colour_of(*rgb: int) -> str:
    """Return the named background with the nearest hue, or lightness for a colour without hue."""
    if np.ptp(rgb) < 20:
        return "white" if sum(rgb) > 3 * 210 else "gray"
    hues = {name: rgb_to_hsv(*each)[0] for name, each in BACKGROUNDS.items() if np.ptp(each)}
    distance = {name: abs(hue - rgb_to_hsv(*rgb)[0]) for name, hue in hues.items()}
    return min(distance, key=distance.get)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("background", BACKGROUNDS)
def test_a_texture_is_in_shades_of_the_colour_that_captions_name(pattern, background):
    texture = Texture(pattern, repeats=4, angle=1.0, shift=(0.2, 0.7), seed=1)
    image = draw_texture(texture, BACKGROUNDS[background], 48)
    assert image.size == (48, 48) and image.mode == "RGB"
    pixels = np.unique(np.asarray(image).reshape(-1, 3).astype(int), axis=0)
    assert np.ptp(pixels.sum(-1)) > 40
    assert {colour_of(*pixel) for pixel in pixels.tolist()} == {background}


def test_a_texture_is_the_same_at_any_size(source):
    for pattern in PATTERNS:
        texture = Texture(pattern, repeats=3, angle=0.5, shift=(0.1, 0.4), seed=2)
        small, large = (draw_texture(texture, (165, 165, 165), size) for size in (48, 192))
        reduced = large.resize((48, 48), Image.Resampling.BOX)
        difference = np.asarray(small).astype(int) - np.asarray(reduced)
        assert np.abs(difference).mean() < 3


@pytest.mark.parametrize("image_size", [1, 16, 97])
def test_renders_at_any_size(image_size):
    source = EmojiScenes(8, clutter=6, textures=True, image_size=image_size)
    for index in range(8):
        assert source[index].image.size == (image_size, image_size)
        assert source.named_mask(index, 0).shape == (image_size, image_size)


def test_a_rotated_glyph_keeps_its_longer_side():
    upright, turned = draw_emoji("rocket", 40), draw_emoji("rocket", 40, 30)
    assert max(upright.size) == max(turned.size) == 40
    assert upright.tobytes() != turned.tobytes()


def test_specs_name_the_options():
    source = open_source("emoji_scenes:size=5,clutter=4,textures=true", image_size=64)
    assert source.scene(1) == EmojiScenes(5, clutter=4, textures=True).scene(1)
    classes = open_classes("emoji_classes:size=5,textures=true", image_size=32)
    assert classes.scene(0).texture is not None
    assert classes.named(0) == ((0,),) and classes.named_mask(0, 0).any()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("emoji_scenes:size=5,textures=1", "textures: expected True or False, got 1"),
        ("emoji_scenes:size=5,clutter=7", r"clutter: expected an integer in \[0, 6\], got 7"),
        ("emoji_scenes:size=5,clutter=x", r"clutter: expected an integer in \[0, 6\], got 'x'"),
    ],
)
def test_bad_options(spec, message):
    with pytest.raises((TypeError, ValueError), match=message):
        open_source(spec, image_size=64)


def test_classes_have_no_clutter():
    with pytest.raises(ValueError, match="the options seed, size, textures, got 'clutter'"):
        open_classes("emoji_classes:size=5,clutter=1", image_size=64)


def test_places_have_phrases_that_differ():
    phrases = [phrase for _, _, phrase in (PLACES | GRID_PLACES).values()]
    assert len(set(phrases)) == len(phrases)
