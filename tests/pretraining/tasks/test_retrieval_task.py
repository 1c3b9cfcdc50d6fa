"""Fine-tuned retrieval: training samples, re-ranking, and which texts guide which images."""

import math

import numpy as np
import pytest
import torch

from elip_models.pretraining.data import DataError, MixedSource
from elip_models.pretraining.tasks.retrieval_task import Retrieval
from tests.helpers.task_cases import LOADING, Captioned, Tokens, matcher, preprocessor


def test_a_retrieval_sample_has_its_image_id_and_the_false_texts_of_the_model():
    source, rng = Captioned(), np.random.default_rng(0)
    sample = Retrieval().sample(preprocessor(source), source[2], 2, rng)
    assert sample["image_ids"] == 2 and "false_ids" not in sample
    sample = Retrieval().sample(preprocessor(source, false_texts=5), source[2], 2, rng)
    assert sample["false_ids"].shape == sample["false_mask"].shape == (5, 4)
    assert not (sample["false_ids"][:, 0] == 3).any()  # of other images


class Pairs(Captioned):
    """A sample a caption, the images of `Captioned` in turn."""

    def __len__(self):
        return 12

    def image_number(self, index):
        return index % 6

    def captions(self, index):
        return super().captions(index % 6)[index // 6 :][:1]

    def __getitem__(self, index):
        return super().__getitem__(index % 6)._replace(captions=self.captions(index))


def test_pairs_of_the_same_image_are_not_negatives():
    source, rng = Pairs(), np.random.default_rng(0)
    sample = Retrieval().sample(preprocessor(source, false_texts=40), source[8], 8, rng)
    assert sample["image_ids"] == 2
    assert not (sample["false_ids"][:, 0] == 3).any()
    mixed = MixedSource([Captioned(), source])
    assert Retrieval().sample(preprocessor(mixed), mixed[14], 14, rng)["image_ids"] == 6 + 2


@pytest.mark.parametrize("size", [1, 3])
def test_one_image_alone_has_no_false_texts(size):
    class Alone(Pairs):
        def __len__(self):
            return size

        def image_number(self, index):
            return 0

    source, rng = Alone(), np.random.default_rng(0)
    with pytest.raises(DataError, match="false_texts: expected captions of other images, got 0"):
        Retrieval().sample(preprocessor(source, false_texts=2), source[0], 0, rng)


def test_images_of_pairs_are_ranked_once_with_all_their_captions():
    model, _ = matcher()
    found = Retrieval(candidates=12).evaluate(model, Tokens(), Pairs(), LOADING)
    assert found.num_examples == 6
    assert found.scores["image_to_text_r1"].mean == found.scores["text_to_image_r1"].mean == 1


def test_another_caption_guides_if_the_model_uses_guide_captions():
    source, rng = Captioned(), np.random.default_rng(0)
    sample = Retrieval().sample(preprocessor(source, reads_guide_captions=True), source[2], 2, rng)
    assert sample["guide_ids"].shape == sample["guide_mask"].shape == (4,)


def test_matching_reranks_candidates_with_equal_features():
    model, source = matcher()
    found = Retrieval(candidates=12).evaluate(model, Tokens(), source, LOADING)
    assert found.scores["image_to_text_r1"].mean == found.scores["text_to_image_r1"].mean == 1
    assert found.baselines["features"]["text_to_image_r1"] == 0  # all alike: ties count against it
    assert found.baselines["chance"]["text_to_image_r1"] == pytest.approx(1 / 6)
    assert [each.score for each in found.predictions] == [1.0] * 6
    few = Retrieval(candidates=1).evaluate(model, Tokens(), source, LOADING)
    assert few.scores["text_to_image_r1"].mean == pytest.approx(1 / 6)  # the first image's alone


def test_features_are_compared_in_fp32_also_under_autocast():
    """Angles of 0.05 between the first and the last: in bf16 all are equal."""
    model, source = matcher()

    def angle(share):
        return torch.stack([(0.05 * share).cos(), (0.05 * share).sin()], dim=1)

    low, high = float(model.low), float(model.high)
    model.project_image = lambda tokens: angle((tokens.mean((1, 2)) - low) / (high - low))
    model.text_features = lambda input_ids, attention_mask: angle((input_ids[:, 0] - 1) / 5)
    with torch.autocast("cpu", torch.bfloat16):
        found = Retrieval(candidates=1).evaluate(model, Tokens(), source, LOADING)
    assert found.scores["text_to_image_r1"].mean == 1


def test_a_model_without_features_scores_every_pair():
    model, source = matcher()
    model.ranks = False
    found = Retrieval(candidates=1).evaluate(model, Tokens(), source, LOADING)
    assert found.scores["image_to_text_r1"].mean == found.scores["text_to_image_r1"].mean == 1
    assert found.baselines.keys() == {"chance"}


def test_a_model_without_matching_ranks_by_features():
    class Features:  # of an image its level, of a text that of its digit
        ranks = True

        def __init__(self):
            self.stub, _ = matcher()
            self.config, self.text_cls = self.stub.config, self.stub.text_cls

        def __getattr__(self, name):
            if name.startswith("matching"):
                raise AttributeError(name)
            return getattr(self.stub, name)

        def image_features(self, images):
            level = images.mean((1, 2, 3))
            low, high = float(self.stub.low), float(self.stub.high)
            return angle((level - low) / (high - low))

        def text_features(self, input_ids, attention_mask):
            return angle((input_ids[:, 0] - 1) / 5)

    def angle(share):
        return torch.stack([share.cos(), share.sin()], dim=1)

    found = Retrieval().evaluate(Features(), Tokens(), Captioned(), LOADING)
    assert found.scores["image_to_text_r1"].mean == found.scores["text_to_image_r1"].mean == 1
    assert found.baselines.keys() == {"chance"}


def test_index_images_are_encoded_without_text_and_queries_guide_only_candidates():
    model, source = matcher()
    Retrieval(candidates=4).evaluate(model, Tokens(), source, LOADING)
    assert model.guides == [None] * math.ceil(len(source) / LOADING.batch_size)
    model.guides.clear()
    Retrieval(candidates=2, guided=True).evaluate(model, Tokens(), source, LOADING)
    index, queries = model.guides[:2], model.guides[2:]
    assert index == [None, None]
    # Images look for texts first, by the index; then each text guides the two images it may fit.
    expected = [float(image + 1) for image in range(6) for _ in range(2)]
    assert [guide.flatten().tolist() for guide in queries] == [[text] * 2 for text in expected]
