"""Built-in data of the tasks: answers are correct, balanced, and not predictable from the text.

Questions, hypotheses and statements are answered from their words and the scene only.
"""

import pickle
import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from elip_models.pretraining.data import open_examples
from elip_models.pretraining.data.emoji_tasks import EmojiEntailment, EmojiPairs, EmojiQuestions
from elip_models.pretraining.data.scene_captions import NUMBERS, at_place, plural
from elip_models.pretraining.data.scene_sampling import (
    EMOJI,
    MAX_CLUTTER,
    Group,
    Scene,
    place_names,
)
from tests.helpers.tiers import tiered
from tests.helpers.tiny_run import elip

SOURCES = {"vqa": EmojiQuestions, "entailment": EmojiEntailment, "nlvr2": EmojiPairs}
SINGULAR = {name: name for name in EMOJI} | {plural(name): name for name in EMOJI}
PLACES = {at_place(place): place for place in {*place_names(0), *place_names(1)}}
SIDES = "to the left of|to the right of|above|below"
NAME = "|".join(sorted(SINGULAR, key=len, reverse=True))
"""Pattern of any emoji, in the singular or the plural."""
OPTIONS = [{}, {"clutter": 1}, {"clutter": 4, "textures": True}, {"clutter": MAX_CLUTTER}]
ANSWER_NUMBERS = (2, 3, 9, 8, 2, 59)
"""Number of possible answers of each form of question."""
CHANCE = {"vqa": np.mean([1 / n for n in ANSWER_NUMBERS]), "entailment": 1 / 3, "nlvr2": 1 / 2}


def named(scene: Scene, name: str) -> list[Group]:
    return [group for group in scene.groups if group.name == SINGULAR[name]]


def count(scene: Scene, name: str) -> int:
    return sum(group.count for group in named(scene, name))


def the_one(scene: Scene, name: str) -> Group:
    (group,) = named(scene, name)
    assert group.count == 1
    return group


def offset(one: Group, other: Group) -> tuple[float, float]:
    """Return how far the place of `one` is to the right of and below that of `other`."""
    (x, y, *_), (left, top, *_) = one.place.box, other.place.box
    return x - left, y - top


def is_beside(one: Group, side: str, other: Group) -> bool:
    x, y = offset(one, other)
    return {"to the left of": -x, "to the right of": x, "above": -y, "below": y}[side] > 1e-9


def answer(text: str, scene: Scene) -> str:
    """Return the correct answer to a question."""
    if match := re.fullmatch(rf"is there an? ({NAME})\?", text):
        return "yes" if named(scene, match[1]) else "no"
    if match := re.fullmatch(rf"how many ({NAME}) are there\?", text):
        return str(count(scene, match[1]))
    if match := re.fullmatch(rf"where is the ({NAME})\?", text):
        return the_one(scene, match[1]).place.name
    if match := re.fullmatch(rf"is the ({NAME}) ({SIDES}) the ({NAME})\?", text):
        one, other = the_one(scene, match[1]), the_one(scene, match[3])
        return "yes" if is_beside(one, match[2], other) else "no"
    if match := re.fullmatch(rf"what is immediately ({SIDES}) the ({NAME})\?", text):
        anchor = the_one(scene, match[2])
        beside = [group for group in scene.groups if is_beside(group, match[1], anchor)]
        return min(beside, key=lambda group: sum(map(abs, offset(group, anchor)))).name
    assert text == "what colour is the background?"
    return scene.background


def label(text: str, scene: Scene) -> str:
    """Return the label of a hypothesis for an image with a hidden place."""
    if match := re.fullmatch(rf"the ({NAME}) is ({SIDES}) the ({NAME})", text):
        if not (named(scene, match[1]) and named(scene, match[3])):
            return "neutral"
        one, other = the_one(scene, match[1]), the_one(scene, match[3])
        if is_beside(one, match[2], other):
            return "entailment"
        assert is_beside(other, match[2], one)
        return "contradiction"
    number, name, place = re.fullmatch(
        rf"there (?:is|are) exactly (\w+) ({NAME}) (.*)", text
    ).groups()
    shown = [group for group in scene.groups if group.place.name == PLACES[place]]
    if not shown:
        assert not named(scene, name)
        return "neutral"
    is_right = (SINGULAR[name], NUMBERS.index(number)) == (shown[0].name, shown[0].count)
    return "entailment" if is_right else "contradiction"


def is_true(text: str, left: Scene, right: Scene) -> bool:
    """Return whether a statement is true of two images."""
    if match := re.fullmatch(rf"there is an? ({NAME}) in both images", text):
        return all(count(scene, match[1]) for scene in (left, right))
    if match := re.fullmatch(rf"there are more ({NAME}) in the left image than in .*", text):
        return count(left, match[1]) > count(right, match[1])
    if match := re.fullmatch(r"both images have an? (\w+) background", text):
        return {left.background, right.background} == {match[1]}
    match = re.fullmatch(rf"the two images show (\w+) ({NAME}) in all", text)
    return NUMBERS[count(left, match[2]) + count(right, match[2])] == match[1]


def correct_answer(task: str, text: str, scenes: tuple[Scene, ...]) -> str:
    """Return the correct answer of an example of a task."""
    if task == "nlvr2":
        return str(is_true(text, *scenes)).lower()
    return (answer if task == "vqa" else label)(text, *scenes)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("task", SOURCES)
def test_answers_are_true_of_the_scene(task, options):
    source = SOURCES[task](300, seed=4, **options)
    for index in range(len(source)):
        example, scenes = source.text_alone(index), source.scenes(index)
        assert example.answers == {correct_answer(task, example.text, scenes): 1.0}
        assert example.answers.keys() <= set(source.answers)


@pytest.mark.parametrize("task", SOURCES)
def test_an_example_depends_on_seed_and_index_alone(task):
    spec = f"{SOURCES[task].name}:seed=3,size=12,clutter=2,textures=true"
    source = open_examples(task, spec, image_size=20)
    longer = open_examples(task, spec.replace("size=12", "size=90"), image_size=20)
    copy = pickle.loads(pickle.dumps(source))
    for index in (0, 5, 11):
        assert source[index] == longer[index] == copy[index]
        assert source[index]._replace(images=()) == source.text_alone(index)
        assert [image.size for image in source[index].images] == [(20, 20)] * (
            2 if task == "nlvr2" else 1
        )
    texts = [source.text_alone(index).text for index in range(12)]
    other = SOURCES[task](12, seed=4, clutter=2)
    assert [other.text_alone(index).text for index in range(12)] != texts
    assert len({source.text_alone(index).id for index in range(12)}) == 12
    with pytest.raises(IndexError, match="index: expected 0 <= index < 12, got 12"):
        source.text_alone(12)


def prefixes(text):
    """Return all words of a text, all but the last, and so on to none."""
    words = tuple(text.split())
    return [words[:count] for count in range(len(words), -1, -1)]


def text_only_accuracy(train, test):
    """Predict the most frequent answer of the texts in `train` with the longest common prefix."""
    frequencies = defaultdict(Counter)
    for example in map(train.text_alone, range(len(train))):
        for prefix in prefixes(example.text):
            frequencies[prefix].update(example.answers)
    scores = []
    for example in map(test.text_alone, range(len(test))):
        known = next(prefix for prefix in prefixes(example.text) if prefix in frequencies)
        ((guess, _),) = frequencies[known].most_common(1)
        scores.append(example.answers.get(guess, 0.0))
    return np.mean(scores)


@pytest.mark.parametrize("options", tiered([{}, {"clutter": 4}], [{"clutter": 4}]), ids=str)
@pytest.mark.parametrize("task", SOURCES)
def test_the_text_alone_predicts_no_better_than_chance(task, options):
    train, test = (SOURCES[task](2400, seed=seed, **options) for seed in (0, 1))
    accuracy = text_only_accuracy(train, test)
    if task == "vqa":
        assert abs(accuracy - CHANCE[task]) < 3 * np.sqrt(0.25 / len(test))
    else:
        assert accuracy == pytest.approx(CHANCE[task])


def test_data_check_counts_the_answers(capsys):
    assert elip("data", "check", "emoji_entailment:size=6", "--task", "entailment") == 0
    printed = capsys.readouterr().out
    for text in ("6 of 6 read", "neutral 33.3%", "6, 3 different ones"):
        assert text in printed
    assert elip("data", "check", "a.json", "--task", "vqs") == 2
    assert "'vqs' is not one of 'vqa'" in capsys.readouterr().err
