"""Compositional benchmarks: the metrics by hand, what is encoded, and the command."""

import itertools
import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from elip_models.intervals import group_mean_interval, score_interval
from elip_models.pretraining.data import DataError, open_composition
from elip_models.pretraining.data.emoji_tasks import EmojiComposition
from elip_models.pretraining.tasks.composition import PAIR_CHANCE, Composition, judge
from elip_models.pretraining.tasks.task import evaluation_transform
from elip_models.pretraining.training.trainer import train
from tests.helpers.task_cases import LOADING, Stub, Tokens, grey, matcher
from tests.helpers.tiny_run import elip, own_process, tiny_config

EVERY_CASE = {
    # scores of captions 0 and 1, each with images 0 and 1: right by text, by image
    "all right": ([[0.9, 0.1], [0.2, 0.8]], (1, 1)),
    "text only": ([[0.5, 0.8], [0.4, 0.9]], (1, 0)),
    "image only": ([[0.5, 0.4], [0.8, 0.9]], (0, 1)),
    "nothing": ([[0.1, 0.9], [0.8, 0.2]], (0, 0)),
    "one caption for both": ([[0.9, 0.9], [0.1, 0.2]], (0, 0)),
    "tied captions": ([[0.5, 0.1], [0.5, 0.9]], (0, 1)),
    "tied images": ([[0.5, 0.5], [0.1, 0.9]], (1, 0)),
    "captions tied within 1e-6": ([[0.5, 0.1], [0.5 - 5e-7, 0.9]], (0, 1)),
    "no number": ([[0.9, 0.1], [float("nan"), 0.8]], (0, 0)),
}


@pytest.mark.parametrize("case", EVERY_CASE)
def test_text_image_and_group_score(case):
    similar, (text, image) = EVERY_CASE[case]
    expected = {"text_score": text, "image_score": image, "group_score": text * image}
    assert judge(similar) == expected


def test_the_chance_level_is_that_of_all_orders_of_four_scores():
    totals = Counter()
    for a, b, c, d in itertools.permutations(range(4)):
        totals.update(judge([[a, b], [c, d]]))
    assert {name: total / 24 for name, total in totals.items()} == pytest.approx(PAIR_CHANCE)


class Table(Stub):
    """Stub whose matching score of image i with text t, numbers 0 to 5, is `table[i, t]`."""

    def __init__(self, table=None, **config):
        super().__init__(**config)
        known, _ = matcher()
        self.low, self.high = float(known.low), float(known.high)
        self.table = torch.eye(6) if table is None else table
        self.reduction = SimpleNamespace(is_guided=True, name="elip")

    def _level(self, tokens):
        return 5 * (tokens.flatten(1).mean(1) - self.low) / (self.high - self.low)

    def matching_logits(self, tokens, image_mask, input_ids, attention_mask):
        return self.table[self._level(tokens).round().long(), input_ids[:, 0] - 1]

    def image_features(self, images):
        return self._angle(self._level(images))

    def text_features(self, input_ids, attention_mask):
        return self._angle(input_ids[:, 0] - 1.0)

    @staticmethod
    def _angle(level):
        return torch.stack([(level / 5).cos(), (level / 5).sin()], dim=1)


def pairs(folder, numbers=((0, 1), (2, 3), (4, 5)), **fields):
    """Write examples in Winoground's format; image and text n have the number n."""
    for number in range(6):
        grey(40 * number).save(folder / f"{number}.png")
    lines = [
        {"id": i, "image_0": f"{a}", "image_1": f"{b}", "caption_0": f"grey {a}"}
        | {"caption_1": f"grey {b}", "collapsed_tag": "Object" if i else "Relation"}
        for i, (a, b) in enumerate(numbers)
    ]
    file = folder / "examples.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    return open_composition(str(file), image_size=8)


def crepe(folder, name="swap_obj", triples=((0, 0, 1), (1, 1, 0), (1, 2, 3))):
    """Write (image, right text, wrong text), by number, in SugarCrepe's format."""
    for number in range(6):
        grey(40 * number).save(folder / f"{number}.png")
    entries = {
        str(i): {"filename": f"{image}.png", "caption": f"{a}", "negative_caption": f"{b}"}
        for i, (image, a, b) in enumerate(triples)
    }
    (folder / f"{name}.json").write_text(json.dumps(entries))
    return folder / f"{name}.json"


def scored(source, model=None, loading=LOADING, **options):
    """Return the scores, and the means by metric."""
    scores = Composition(**options).evaluate(model or Table(), Tokens(), source, loading)
    return scores, {name: score.mean for name, score in scores.scores.items()}


def test_the_scores_of_a_benchmark_are_the_means_of_its_examples(tmp_path):
    table = torch.zeros(6, 6)
    for start, case in ((0, "all right"), (2, "text only"), (4, "tied captions")):
        similar = torch.tensor(EVERY_CASE[case][0])  # (captions, images)
        table[start : start + 2, start : start + 2] = similar.T
    model = Table(table).train()
    scores, means = scored(pairs(tmp_path), model, itm=True)
    assert model.training
    expected = {"text_score": 2 / 3, "image_score": 2 / 3, "group_score": 1 / 3}
    expected |= {f"Relation_{name}": 1 for name in PAIR_CHANCE}
    expected |= {"Object_text_score": 0.5, "Object_image_score": 0.5, "Object_group_score": 0}
    assert means == pytest.approx(expected)
    chance = scores.baselines["chance"]
    assert chance.keys() == means.keys() and chance["Object_group_score"] == 1 / 6
    assert scores.scores["text_score"] == score_interval([1, 1, 0], [0, 1, 2])
    assert (scores.num_examples, scores.num_skipped) == (3, 0)
    assert scores.notes == {
        "benchmark": "winoground",
        "method": "itm",
        "guided": "no",
        "images": "6",
        "examples without image": "0",
        "examples with a wrong caption of the same tokens": "0",
        "examples by category": "Object: 2, Relation: 1",
    }
    second = scores.predictions[1]
    assert np.allclose(json.loads(second.output), EVERY_CASE["text only"][0])
    assert (second.id, second.score) == ("1", 0.0)  # of the group


def test_features_are_compared_by_their_cosine(tmp_path):
    source, blind = pairs(tmp_path), Table()
    assert set(scored(source)[1].values()) == {1}
    blind.text_features = lambda input_ids, attention_mask: torch.ones(len(input_ids), 2)
    means = scored(source, blind)[1]
    assert means["text_score"] == means["group_score"] == 0  # ties
    model = Table()
    model.ranks = False
    assert scored(source, model)[0].notes["method"] == "itm"


def test_categories_their_mean_and_images_that_are_shared(tmp_path):
    spec = f"{crepe(tmp_path)},{crepe(tmp_path, 'add_att', [(5, 4, 0)])}"
    source = open_composition(spec, image_size=8)
    # Text 2 is more similar to image 1 than text 3; text 4 to image 5 than text 0.
    assert set(scored(source)[1].values()) == {1}
    scores, means = scored(source, itm=True)
    assert means == pytest.approx(
        {"accuracy": 0.5, "macro_accuracy": 1 / 3}
        | {"swap_obj_accuracy": 2 / 3, "add_att_accuracy": 0}
    )
    assert set(scores.baselines["chance"].values()) == {0.5}
    rows = [(1, 0, 0), (1, 0, 1), (0, 0, 1), (0, 1, 2)]  # score, category, image
    assert scores.scores["macro_accuracy"] == group_mean_interval(*zip(*rows, strict=True))
    assert scores.notes["images"] == "3"


def test_chance_of_permutations_depends_on_their_number(tmp_path):
    grey(0).save(tmp_path / "0.png")
    options = [["0", "1", "2", "3", "4"], ["0", "0", "1", "1", "0"], ["0", "0"]]
    entries = [{"image": "0.png", "caption_options": texts} for texts in options]
    (tmp_path / "coco_order.json").write_text(json.dumps(entries))
    scores, means = scored(open_composition(str(tmp_path / "coco_order.json"), image_size=8))
    assert means == {"accuracy": 1}
    assert scores.baselines["chance"]["accuracy"] == pytest.approx((1 / 5 + 1 / 2 + 1) / 3)


def test_an_example_without_all_of_its_images_is_left_out(tmp_path):
    source = pairs(tmp_path, [(0, 1), (1, 2), (3, 4)])
    (tmp_path / "0.png").write_bytes(b"no image")
    scores, _ = scored(source, loading=LOADING._replace(max_bad_share=0.5))
    assert (scores.num_examples, scores.num_skipped) == (2, 1)
    assert (scores.notes["examples without image"], scores.notes["images"]) == ("1", "4")
    assert [prediction.id for prediction in scores.predictions] == ["1", "2"]
    with pytest.raises(DataError, match=r"1 of 5 samples .* could not be read"):
        scored(source)
    for number in (2, 4):
        (tmp_path / f"{number}.png").unlink()
    with pytest.raises(DataError, match="no example with all of its images: 3 of 5 samples"):
        scored(source, loading=LOADING._replace(max_bad_share=1.0))


def test_images_are_encoded_without_text_unless_captions_guide_them(tmp_path):
    model, source = Table(), pairs(tmp_path)
    scored(source, model, itm=True)
    assert model.guides == [None, None]  # two batches of three images
    model.guides.clear()
    scored(source, model, itm=True, guided=True)
    guides = [float(guide) for batch in model.guides for guide in batch]
    assert guides == [1, 2, 1, 2, 3, 4, 3, 4, 5, 6, 5, 6]  # both captions of each image


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with own_process():
        return folder, train(tiny_config(folder, "optim.steps=1", "data.eval=null"))


def test_the_command_scores_a_run(run, tmp_path, capsys):
    (folder, result), output = run, tmp_path / "scores.json"
    command = ["eval", "composition", "--model", folder, "--data"]
    data = "emoji_composition:seed=1,size=6"
    assert elip(*command, data, "--output", output) == 0
    printed = capsys.readouterr().out
    assert "composition: 6 examples" in printed and "relation_group_score" in printed
    source = EmojiComposition(6, seed=1, image_size=result.model.config.image_size)
    scores = Composition().evaluate(result.model, result.tokenizer, source)
    assert json.loads(output.read_text()) == json.loads(json.dumps(scores.as_dict()))
    assert elip(*command, data, "--itm") == 2
    assert "--model: expected one with image-text matching" in capsys.readouterr().err


def test_a_guided_image_has_the_features_that_its_caption_selects(run):
    _, result = run
    model, tokenizer = result.model.eval(), result.tokenizer
    source = EmojiComposition(3, image_size=model.config.image_size)
    guided, plain = (
        json.loads(Composition(guided=g).evaluate(model, tokenizer, source).predictions[0].output)
        for g in (True, False)
    )
    assert guided != plain
    example = source.examples[0]
    with torch.no_grad():
        texts = model.text_features(**model.tokenise(tokenizer, example.captions))
        images = torch.stack([evaluation_transform(model)(source[i].image) for i in (0, 1)])
        for similar, text in zip(guided, texts, strict=True):
            features = model.encode_image(images, text.expand(2, -1))
            torch.testing.assert_close(torch.tensor(similar), features @ text)
