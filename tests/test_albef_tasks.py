"""ALBEF's downstream models: their losses, what they begin as, and what they promise beside."""

import pytest
import torch

from elip_models.models.downstream.albef_retrieval import ALBEFRetrieval
from elip_models.models.layers.losses import hard_negatives, soft_contrastive_loss
from elip_models.models.layers.momentum import NO_IMAGE
from tests import cross_modal_cases
from tests.cross_modal_cases import DISTILLED, MASK, SIZES, batch_of_four

OWN = SIZES | DISTILLED | {"text_layers": 1, "mask_token_id": MASK}


def made(model_class, **options):
    """A model in fp64, with weights that matter."""
    model = model_class(model_class.config_class(**(OWN | options))).double()
    for weight in model.encoders.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.2)
    model.reset_momentum_()
    return model


def test_the_captions_of_an_image_are_all_right_in_batch_and_queue():
    model, image_ids = made(ALBEFRetrieval), torch.tensor([7, 3, 7, 5])
    assert model.queue.ids.tolist() == [NO_IMAGE] * 6
    first = model(*batch_of_four(), image_ids)
    assert model.queue.ids.tolist() == [7, 3, 7, 5, NO_IMAGE, NO_IMAGE]
    positives = model.queue.positives(image_ids, image_ids).int().tolist()
    assert positives[0] == positives[2] == [1, 0, 1, 0, 1, 0, 1, 0, 0, 0]
    assert positives[1] == [0, 1, 0, 0, 0, 1, 0, 0, 0, 0]
    assert first.loss == first.loss_itc + first.loss_itm


def test_alone_a_positive_is_the_pair_itself():
    similar = tuple(torch.randn(3, 5) for _ in range(2))
    teacher, pairs = tuple(torch.randn(3, 5) for _ in range(2)), torch.eye(3, 5, dtype=torch.bool)
    expected = soft_contrastive_loss(similar, teacher, 0.4)
    got = soft_contrastive_loss(similar, teacher, 0.4, positives=pairs)
    torch.testing.assert_close(got, expected)


def test_a_negative_never_shows_the_image_of_its_row():
    positives = torch.eye(4, dtype=torch.bool)
    positives[0, 2] = positives[2, 0] = True
    for _ in range(20):
        drawn = hard_negatives(torch.randn(4, 4), positives=positives)
        assert not positives.gather(1, drawn[:, None]).any()
    alone = hard_negatives(torch.randn(4, 4), positives=torch.ones(4, 4, dtype=torch.bool))
    assert (alone != torch.arange(4)).all()  # another caption of the image, if there is no more


@pytest.mark.parametrize("family", ["albef", "blip", "albef_retrieval"])
def test_matching_logits_are_those_of_itm(family):
    retrieval = family == "albef_retrieval"
    model = made(ALBEFRetrieval) if retrieval else cross_modal_cases.made(family)
    images, ids, mask = batch_of_four()
    tokens, image_mask = model.eval().matching_tokens(images)
    assert tokens.shape == (4, 17, 16) and image_mask is None  # no text, no reduction
    logits = model.matching_logits(tokens, image_mask, ids, mask)
    order = torch.tensor([2, 0, 3, 1])
    others = model.matching_logits(tokens[order], None, ids[order], mask[order])
    torch.testing.assert_close(others, logits[order])
    text = ids if family == "blip" else model.encode_text(ids, mask)
    expected = model.itm_head(model.fuse(text, mask, tokens)[:, 0])[:, 1]
    assert torch.equal(logits, expected.float())
    guided, _ = model.matching_tokens(images, model.text_cls(ids, mask))
    assert guided.shape[1] < 17
