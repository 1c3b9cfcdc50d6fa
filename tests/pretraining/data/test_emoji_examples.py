"""Built-in data of the tasks: answers are correct, balanced, and not predictable from the text."""

import pickle
import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from elip_models.pretraining.data import (
    BACKGROUNDS,
    EMOJI,
    EmojiEntailment,
    EmojiPairs,
    EmojiQuestions,
    Example,
    open_examples,
    question_only_accuracy,
    soft_scores,
)
from elip_models.pretraining.data.scene_captions import NUMBERS, at_place, plural, relation
from elip_models.pretraining.data.scene_sampling import (
    COVER_COLOUR,
    MAX_CLUTTER,
    Copy,
    Group,
    Scene,
)
from elip_models.pretraining.data.tasks import questions
from elip_models.pretraining.data.tasks.conditional_scenes import groups_beside, place_names
from tests.helpers.tiers import tiered

SOURCES = {"vqa": EmojiQuestions, "entailment": EmojiEntailment, "nlvr2": EmojiPairs}
OPTIONS = [{}, {"clutter": 1}, {"clutter": 4, "textures": True}, {"clutter": MAX_CLUTTER}]
CHANCE = {
    "vqa": (1 / 2 + 1 / 3 + 1 / 9 + 1 / 8 + 1 / 2 + 1 / 59) / 6,
    "entailment": 1 / 3,
    "nlvr2": 1 / 2,
}
SINGULAR = {name: name for name in EMOJI} | {plural(name): name for name in EMOJI}
PLACE_OF = {at_place(place): place for place in {*place_names(0), *place_names(1)}}
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


def answer(text: str, scene: Scene) -> set[str]:
    """Return all correct answers, from the scene and the words of the question only."""
    if found := re.fullmatch(rf"is there an? ({NAME})\?", text):
        return {"yes" if named(scene, found[1]) else "no"}
    if found := re.fullmatch(rf"how many ({NAME}) are there\?", text):
        return {str(count(scene, found[1]))}
    if found := re.fullmatch(rf"where is the ({NAME})\?", text):
        return {the_one(scene, found[1]).place}
    if found := re.fullmatch(rf"is the ({NAME}) ({SIDES}) the ({NAME})\?", text):
        shown = relation(the_one(scene, found[1]), the_one(scene, found[3]))
        return {"yes" if shown == found[2] else "no"}
    if found := re.fullmatch(rf"what is ({SIDES}) the ({NAME})\?", text):
        number = scene.groups.index(the_one(scene, found[2]))
        return {scene.groups[i].name for i in groups_beside(scene, number, found[1])}
    assert text == "what colour is the background?"
    return {scene.background}


def label(text: str, scene: Scene) -> str:
    """Return the label of a hypothesis for an image with a hidden place."""
    if found := re.fullmatch(rf"the ({NAME}) is ({SIDES}) the ({NAME})", text):
        groups = named(scene, found[1]) + named(scene, found[3])
        if len(groups) < 2:
            return "neutral"
        return "entailment" if relation(*groups) == found[2] else "contradiction"
    found = re.fullmatch(
        rf"(?:there (?:is|are) (exactly )?|an? (\w+) picture with )(an?|\w+) ({NAME}) (.*)", text
    )
    exactly, colour, number, name, place = found.groups()
    at = [group for group in scene.groups if group.place == PLACE_OF[place]]
    if colour not in (None, scene.background):
        return "contradiction"
    if not at:
        assert not named(scene, name)
        return "neutral"
    fits = at[0].name == SINGULAR[name]
    fits = fits and (not exactly or NUMBERS[at[0].count] == number)
    return "entailment" if fits else "contradiction"


def is_true(text: str, left: Scene, right: Scene) -> bool:
    """Return whether a statement is true of two images."""
    both = (left, right)
    if found := re.fullmatch(rf"there is an? ({NAME}) in both images", text):
        return all(count(scene, found[1]) for scene in both)
    if found := re.fullmatch(rf"exactly one of the images has an? ({NAME})", text):
        return sum(count(scene, found[1]) > 0 for scene in both) == 1
    if found := re.fullmatch(rf"there are more ({NAME}) in the left image than in .*", text):
        return count(left, found[1]) > count(right, found[1])
    if found := re.fullmatch(r"both images have an? (\w+) background", text):
        return {scene.background for scene in both} == {found[1]}
    if found := re.fullmatch(rf"the two images show (\w+) ({NAME}) in all", text):
        return NUMBERS[sum(count(scene, found[2]) for scene in both)] == found[1]
    found = re.fullmatch(rf"the left image has an? ({NAME}) and the right one an? ({NAME})", text)
    return all(count(scene, name) for scene, name in zip(both, found.groups(), strict=True))


def holds(task: str, text: str, scenes: tuple[Scene, ...]) -> set[str]:
    if task == "vqa":
        return answer(text, *scenes)
    return {label(text, *scenes) if task == "entailment" else str(is_true(text, *scenes)).lower()}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("task", SOURCES)
def test_answers_are_true_of_the_scene(task, options):
    source = SOURCES[task](120, seed=4, **options)
    for index in range(len(source)):
        example, scenes = source.text_alone(index), source.scenes(index)
        assert holds(task, example.text, scenes) == example.answers.keys()
        assert example.answers.keys() <= set(source.answers)
        assert sum(example.answers.values()) == pytest.approx(1)
        for scene in scenes:
            assert (scene.texture is not None) is options.get("textures", False)


@pytest.mark.parametrize("task", SOURCES)
def test_an_example_depends_on_seed_and_index_alone(task):
    spec = f"{SOURCES[task].name}:seed=3,size=12,clutter=2,textures=true"
    source = open_examples(task, spec, image_size=20)
    longer = open_examples(task, spec.replace("size=12", "size=90"), image_size=20)
    copy = pickle.loads(pickle.dumps(source))
    for index in (0, 5, 11):
        assert source[index] == longer[index] == copy[index]
        assert source[index]._replace(images=()) == source.text_alone(index)
        assert {image.size for image in source[index].images} == {(20, 20)}
        assert len(source[index].images) == (2 if task == "nlvr2" else 1)
    other = SOURCES[task](12, seed=4, clutter=2)
    assert [other.text_alone(i).text for i in range(12)] != [
        source.text_alone(i).text for i in range(12)
    ]
    assert len({source.text_alone(i).id for i in range(12)}) == 12
    with pytest.raises(IndexError, match="index: expected 0 <= index < 12, got 12"):
        source.text_alone(12)


@pytest.mark.parametrize(
    "options", tiered([{}, {"clutter": 4}], [{"clutter": 4}], slow=[{}]), ids=str
)
@pytest.mark.parametrize("task", SOURCES)
def test_the_text_alone_predicts_no_better_than_chance(task, options):
    train, test = (SOURCES[task](2400, seed=seed, **options) for seed in (0, 1))
    found = question_only_accuracy(train, test)
    if task == "vqa":
        assert abs(found - CHANCE[task]) < 3 * np.sqrt(0.25 / len(test))
    else:
        assert found == pytest.approx(CHANCE[task])


@pytest.mark.parametrize(
    "options", tiered([{}, {"clutter": 4}], [{"clutter": 4}], slow=[{}]), ids=str
)
def test_answers_of_each_form_of_question_are_as_likely(options):
    number, forms = 6000, len(questions.FORMS)
    source = EmojiQuestions(number, seed=7, **options)
    found = defaultdict(Counter)
    for index in range(number):
        found[index // 2 % forms].update(source.text_alone(index).answers.keys())
    sizes = (2, 3, 9, 8, 2, 60)
    for form, size in enumerate(sizes):
        counts = np.array(list(found[form].values()))
        assert len(counts) == size
        expected = counts.sum() / size
        spread = np.sqrt(expected * (1 - 1 / size))
        assert np.abs(counts - expected).max() < 4.5 * spread


@pytest.mark.parametrize(("task", "turns"), [("entailment", 3), ("nlvr2", 2)])
def test_each_text_comes_with_every_label(task, turns):
    source = SOURCES[task](60 * turns, seed=5)
    for first in range(0, len(source), turns):
        block = [source.text_alone(first + turn) for turn in range(turns)]
        assert len({example.text for example in block}) == 1
        assert {label for example in block for label in example.answers} == set(source.answers)


def test_a_question_comes_twice_in_a_row_with_other_answers():
    source = EmojiQuestions(120, seed=5)
    for index in range(0, 120, 2):
        first, second = source.text_alone(index), source.text_alone(index + 1)
        assert first.text == second.text
        assert not first.answers.keys() & second.answers.keys()


def test_each_of_two_answers_has_half_the_share_and_the_full_score():
    source = EmojiQuestions(600, seed=1)
    shares = [source.text_alone(index).answers for index in range(600)]
    assert Counter(tuple(each.values()) for each in shares).keys() == {(1.0,), (0.5, 0.5)}
    assert all(set(soft_scores(each).values()) == {1.0} for each in shares)


@pytest.mark.parametrize(
    ("given", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (7, 1.0), (10, 1.0)]
)
def test_soft_scores_are_the_mean_of_the_metric_over_nine_of_ten(given, score):
    """Leaving each of the ten out, min(1, n / 3) of the others."""
    left = [given - 1] * given + [given] * (10 - given)
    assert score == pytest.approx(np.mean([min(1, n / 3) for n in left]))
    assert soft_scores({"a": given / 10}) == {"a": score}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_entailment_image_hides_exactly_one_place(options):
    size = 64
    source = EmojiEntailment(48, seed=6, image_size=size, **options)
    for index in range(48):
        (scene,), (image,) = source.scenes(index), source[index].images
        left, top, width, height = (round(size * edge) for edge in scene.cover)
        pixels = np.asarray(image)[top + 1 : top + height - 1, left + 1 : left + width - 1]
        assert (pixels == COVER_COLOUR).all()
        for group in scene.groups:
            assert group.box != scene.cover
            for x, y, *_ in group.copies:
                inside = left / size < x < (left + width) / size
                assert not (inside and top / size < y < (top + height) / size)


def test_groups_partly_on_a_side_are_excluded():
    dog = Group("dog", "left", (Copy(0.25, 0.5, 0.3),))
    foxes = Group("fox", "right", (Copy(0.75, 0.2, 0.2), Copy(0.75, 0.5, 0.2)))
    scene = Scene("white", (dog, foxes))
    assert groups_beside(scene, 0, "to the right of") == [1]
    assert groups_beside(scene, 0, "above") == groups_beside(scene, 0, "below") == []


def test_question_only_accuracy_uses_texts_prefixes_and_the_majority():
    class Texts:
        answers = ("yes", "no", "2")

        def __init__(self, *examples):
            self.examples = examples

        def __len__(self):
            return len(self.examples)

        def text_alone(self, index):
            text, answers = self.examples[index]
            return Example((), text, answers, str(index))

    train = Texts(
        ("is it red?", {"yes": 1.0}),
        ("is it red?", {"yes": 0.6, "no": 0.4}),
        ("is it blue?", {"no": 1.0}),
        ("is it green?", {"no": 1.0}),
        ("how many?", {"2": 1.0}),
        ("how many?", {"2": 1.0}),
    )
    known, kind, new = ("is it red?", {"yes": 1.0}), ("is it old?", {"no": 0.2}), ("why?", {})
    assert question_only_accuracy(train, Texts(known)) == 1.0
    assert question_only_accuracy(train, Texts(kind)) == pytest.approx(0.6)
    assert question_only_accuracy(train, Texts(known, kind, new)) == pytest.approx(1.6 / 3)
    with pytest.raises(ValueError, match="test: expected at least one sample, got none"):
        question_only_accuracy(train, Texts())


@pytest.mark.parametrize(
    ("task", "spec", "message"),
    [
        ("vqa", "emoji_pairs:size=4", "expected emoji_questions or .*, got emoji_pairs, .* nlvr2"),
        ("vqa", "emoji_questions", "spec: expected a size, got 'emoji_questions'"),
        ("nlvr2", "emoji_pairs:size=4,colour=red", "expected the options .*, got 'colour'"),
        ("nlvr2", "emoji_pairs:size=4,clutter=7", "clutter: expected an integer in .*, got 7"),
        ("retrieval", "emoji_scenes:size=4", "task: expected one of 'vqa', .*, got 'retrieval'"),
    ],
)
def test_bad_specs(task, spec, message):
    with pytest.raises(ValueError, match=message):
        open_examples(task, spec, image_size=16)


def test_classes_are_examples_without_a_text():
    source = open_examples("classification", "emoji_classes:seed=2,size=70", image_size=24)
    assert source.answers == tuple(EMOJI)
    assert [next(iter(source.text_alone(i).answers)) for i in range(70)] == [
        source.answers[i % 60] for i in range(70)
    ]
    assert source[61] == source[61]._replace(text="", id="emoji_classes-2-61")
    assert source[61].images[0].size == (24, 24)


def test_several_specs_are_one_source():
    parts = [f"emoji_questions:seed={seed},size=4" for seed in (0, 1)]
    joined = open_examples("vqa", parts, image_size=16)
    alone = open_examples("vqa", parts[1:], image_size=16)
    assert (len(joined), joined.answers) == (8, alone.answers)
    assert joined[6] == alone[2]._replace(id=f"1/{alone[2].id}")
    assert joined.text_alone(6).images == ()
    assert set(BACKGROUNDS) < set(joined.answers)
