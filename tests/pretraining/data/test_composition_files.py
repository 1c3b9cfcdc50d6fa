"""Winoground, ARO and SugarCrepe in their authors' formats, and the built-in benchmark."""

import pickle
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from elip_models.images import SampleError
from elip_models.pretraining.data import open_composition
from elip_models.pretraining.data.composition_files import MIN_ATTRIBUTES, SYMMETRIC_RELATIONS
from elip_models.pretraining.data.emoji_tasks import EmojiComposition
from elip_models.pretraining.data.scene_captions import NUMBERS, relation
from elip_models.pretraining.data.scene_sampling import MAX_CLUTTER
from tests.helpers.scene_words import NAME, PLACES, SIDES, count, named, the_one
from tests.helpers.task_files import draw, write
from tests.helpers.tiers import first_quick

WINOGROUND = {
    "id": 3,
    "image_0": "ex_3_img_0",
    "image_1": "ex_3_img_1",
    "caption_0": "a dog  on a cat",
    "caption_1": "a cat on a dog",
    "tag": "Noun",
    "secondary_tag": "",
    "num_main_preds": 1,
    "collapsed_tag": "Object",
}
BOX = {"bbox_x": 2, "bbox_y": 1, "bbox_w": 3, "bbox_h": 4}
GENOME = {"image_path": "1.jpg", "true_caption": "the dog is on the cat", **BOX}
GENOME |= {"image_id": "1", "false_caption": "the cat is on the dog"}
RELATION = GENOME | {"relation_name": "on"}
ATTRIBUTES = GENOME | {"attributes": ["red", "wet"]}
ORDER = {"image": "val2014/1.jpg", "caption_options": ["a b c", "b a c", "a b c", "c b a", "b a c"]}
HUGE = {"bbox_w": 2**20, "bbox_h": 2**10}
CREPE = {"filename": "1.jpg", "caption": "a dog", "negative_caption": "a cat"}


def opened(*files, images=None):
    options = {} if images is None else {"images": str(images)}
    return open_composition({"files": [*map(str, files)], **options}, image_size=16)


def test_winoground(tmp_path):
    draw(tmp_path / "images" / "ex_3_img_0.png", "red")
    draw(tmp_path / "images" / "ex_3_img_1.png", "blue")
    file = write(tmp_path / "examples.jsonl", (WINOGROUND, WINOGROUND | {"id": 4}))
    source = open_composition(f"{file},images={tmp_path / 'images'}", image_size=16)
    assert (source.benchmark, source.categories, source.averages) == (
        "winoground",
        ("Object",),
        False,
    )
    assert len(source) == 2  # both examples have the same images
    first, second = source.examples
    assert first.captions == source.captions(0) == ("a dog on a cat", "a cat on a dog")
    assert (first.id, first.category, second.id) == ("3", "Object", "4")
    assert first.images == tuple(sample.id for sample in source)
    assert [sample.image.getpixel((0, 0)) for sample in source] == [(255, 0, 0), (0, 0, 255)]
    with pytest.raises(IndexError):
        source.captions(2)


def test_examples_linked_by_images_form_a_cluster(tmp_path):
    pairs = [("a", "b"), ("c", "d"), ("b", "c"), ("e", "f"), ("g", "e")]
    lines = tuple(
        WINOGROUND | {"id": i, "image_0": one, "image_1": two} for i, (one, two) in enumerate(pairs)
    )
    source = opened(write(tmp_path / "examples.jsonl", lines))
    assert [example.cluster for example in source.examples] == [0, 0, 0, 1, 1]
    assert len(source) == 7


def test_a_part_of_an_image_is_shown_and_parts_of_one_image_form_a_cluster(tmp_path):
    picture = np.zeros((5, 6, 3), dtype=np.uint8)
    picture[1:5, 2:5] = 255
    (tmp_path / "vg").mkdir()
    Image.fromarray(picture).save(tmp_path / "vg" / "1.png")
    entry = RELATION | {"image_path": "1.png"}
    beyond = entry | {"bbox_w": 5.0}
    file = write(tmp_path / "visual_genome_relation.json", [entry, beyond, entry])
    source = opened(file, images=tmp_path / "vg")
    assert source.benchmark == "vg_relation" and source.averages
    assert len(source) == 2 and [example.cluster for example in source.examples] == [0, 0, 0]
    assert source.examples[0].captions == (RELATION["true_caption"], RELATION["false_caption"])
    assert source.examples[0].id == "visual_genome_relation/0"
    assert source.examples[0].images == source.examples[2].images != source.examples[1].images
    shown, padded = (np.asarray(sample.image) for sample in source)
    assert shown.shape == (4, 3, 3) and shown.all()
    assert padded.shape == (4, 5, 3) and not padded[:, 3:].any()  # black outside, as in ARO's code


def test_symmetric_relations_and_rare_attributes_are_not_averaged(tmp_path):
    names = ["on", "near", "under"]
    file = write(tmp_path / "r.json", [RELATION | {"relation_name": name} for name in names])
    assert opened(file).categories == ("on", "under") and "near" in SYMMETRIC_RELATIONS
    rare = [ATTRIBUTES | {"attributes": ["old", "new"]}] * (MIN_ATTRIBUTES - 1)
    source = opened(write(tmp_path / "a.json", [ATTRIBUTES] * MIN_ATTRIBUTES + rare))
    assert (source.benchmark, source.categories) == ("vg_attribution", ("red_wet",))
    assert len(source.examples) == 2 * MIN_ATTRIBUTES - 1
    assert source.examples[-1].category == "old_new"


def test_permutations_equal_to_the_caption_are_left_out(tmp_path):
    draw(tmp_path / "coco" / "val2014" / "1.jpg")
    source = opened(write(tmp_path / "coco_order.json", [ORDER]), images=tmp_path / "coco")
    assert (source.benchmark, source.categories, source.averages) == ("order", (), False)
    (example,) = source.examples
    assert example.captions == ("a b c", "b a c", "c b a")
    assert (example.category, source[0].image.size) == ("", (6, 5))


def test_sugarcrepe_is_one_file_or_a_folder_with_a_category_per_file(tmp_path):
    draw(tmp_path / "val2017" / "1.jpg")
    folder = tmp_path / "sugarcrepe"
    write(folder / "swap_obj.json", {"0": CREPE, "7": CREPE | {"negative_caption": "a fox"}})
    write(folder / "add_att.json", {"0": CREPE})
    source = open_composition(f"{folder},images={tmp_path / 'val2017'}", image_size=16)
    assert (source.benchmark, source.categories) == ("sugarcrepe", ("add_att", "swap_obj"))
    assert source.averages and len(source) == 1
    assert [example.id for example in source.examples] == ["add_att/0", "swap_obj/0", "swap_obj/7"]
    assert source[0].captions == ("a dog", "a cat", "a fox")  # each once
    assert not opened(folder / "swap_obj.json").averages
    assert len(pickle.loads(pickle.dumps(source)).examples) == 3  # for worker processes


def test_files_of_two_benchmarks_are_refused(tmp_path):
    crepe = write(tmp_path / "swap_obj.json", {"0": CREPE})
    with pytest.raises(ValueError, match="files of one benchmark, got sugarcrepe in swap_obj"):
        opened(crepe, write(tmp_path / "order.json", [ORDER]))


def test_an_image_that_cannot_be_read_is_an_error_of_that_image(tmp_path):
    draw(tmp_path / "2.jpg")
    (tmp_path / "3.jpg").write_bytes(b"no image")
    entries = {str(i): CREPE | {"filename": f"{i}.jpg"} for i in (1, 2, 3)}
    source = opened(write(tmp_path / "swap_obj.json", entries))
    with pytest.raises(SampleError, match=r"1\.jpg: no such file"):
        source[0]
    assert source[1].captions == ("a dog", "a cat")
    with pytest.raises(SampleError, match=r"3\.jpg: not a readable image"):
        source[2]


@pytest.mark.parametrize(
    "box", [{"bbox_x": 6}, {"bbox_y": -4}, {"bbox_w": 0}, {"bbox_h": 0.5}, HUGE]
)
def test_a_box_outside_of_its_image_is_an_error_of_that_image(box, tmp_path):
    draw(tmp_path / "1.jpg")
    source = opened(write(tmp_path / "r.json", [RELATION | box]))
    with pytest.raises(SampleError, match="expected a box in the image of 6 x 5 pixels"):
        source[0]


def without(entry, key):
    return {name: value for name, value in entry.items() if name != key}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            (without(WINOGROUND, "image_1"),),
            r"a.jsonl\[0\]: expected 2 image paths, got",
        ),
        ("a.jsonl", (WINOGROUND | {"caption_1": 3},), r"\[0\]\[texts\]\[1\]: .*, got 3"),
        ("a.jsonl", (WINOGROUND, WINOGROUND), "id: expected another one for each .*, got '3'"),
        ("a.json", [without(RELATION, "bbox_w")], r"a.json\[0\]: expected bbox_x, bbox_y, bbox_w"),
        ("a.json", [RELATION | {"bbox_w": float("nan")}], r"\[0\]\[box\]\[2\]: .*, got nan"),
        ("a.json", [ATTRIBUTES, RELATION], r"a.json\[1\]: expected the key attributes"),
        ("a.json", [ORDER | {"caption_options": ["a"]}], r"\[0\]: expected at least two captions"),
        ("a.json", "text", r"a.json: expected entries with one of the keys .*, got 'text'"),
    ],
)
def test_a_malformed_file_is_named(name, content, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        opened(write(tmp_path / name, content))


def is_true(caption, scene):
    """Return whether a caption is true of a scene, from its words only."""

    if match := re.fullmatch(rf"the ({NAME}) is ({SIDES}) the ({NAME})", caption):
        one, two = the_one(scene, match[1]), the_one(scene, match[3])
        return relation(one, two) == match[2]
    number = "|".join(NUMBERS)
    if match := re.fullmatch(rf"({number}) ({NAME}) and ({number}) ({NAME})", caption):
        counted = ((match[1], match[2]), (match[3], match[4]))
        return all(count(scene, name) == NUMBERS.index(word) for word, name in counted)
    match = re.fullmatch(rf"an? ({NAME}) (.*) and an? ({NAME}) (.*)", caption)
    placed = ((match[1], match[2]), (match[3], match[4]))
    return all(
        [group.place.name for group in named(scene, name)] == [PLACES[at]] for name, at in placed
    )


@pytest.mark.parametrize(
    "options",
    first_quick(
        [{}, {"clutter": 4, "textures": True}, {"clutter": 1}, {"clutter": MAX_CLUTTER}], 2
    ),
    ids=str,
)
def test_each_caption_is_true_of_its_own_image_only(options):
    source = EmojiComposition(90, seed=2, **options)
    for number, example in enumerate(source.examples):
        truth = [
            [is_true(text, scene) for scene in source.scenes(number)] for text in example.captions
        ]
        assert truth == [[True, False], [False, True]], example
        if example.category == "relation":
            assert len({tuple(sorted(text.split())) for text in example.captions}) == 1


def test_the_images_of_an_example_differ_in_two_emoji_only():
    source = EmojiComposition(30, clutter=2, textures=True)
    for number in range(30):
        one, two = source.scenes(number)
        assert (one.background, one.texture) == (two.background, two.texture)
        assert [group.copies for group in one.groups] == [group.copies for group in two.groups]
        pairs = [(a.name, b.name) for a, b in zip(one.groups, two.groups, strict=True)]
        changed = {pair for pair in pairs if len({*pair}) == 2}
        assert len(changed) == 2 and len({name for pair in changed for name in pair}) == 2


def test_the_built_in_benchmark_is_balanced_and_reproducible():
    source = open_composition("emoji_composition:seed=3,size=30", image_size=32)
    assert isinstance(source, EmojiComposition) and len(source) == 60
    assert Counter(example.category for example in source.examples) == dict.fromkeys(
        ("relation", "place", "count"), 10
    )
    shorter = EmojiComposition(6, seed=3, image_size=32)
    assert shorter.examples == source.examples[:6]
    assert shorter[7].image.tobytes() == source[7].image.tobytes() != source[6].image.tobytes()
    assert [sample.id for sample in shorter] == [
        name for example in shorter.examples for name in example.images
    ]
    assert shorter[7].captions == shorter.captions(7) == shorter.examples[3].captions
    with pytest.raises(IndexError):
        shorter[12]
    with pytest.raises(IndexError):
        shorter.scenes(6)
