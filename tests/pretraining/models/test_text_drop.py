"""Text reduction in BLIP and METER: layers against a loop over texts, labels, training."""

import copy
from typing import get_args

import pytest
import torch
import torch.nn.functional as F

from elip_models.pretraining.models.layers.losses import next_tokens
from elip_models.pretraining.models.layers.text_reduction import TextReduction, TextStrategy
from tests.helpers.cross_modal_cases import batch_of_four, descend, draws, made, step
from tests.helpers.tiers import tiered
from tests.helpers.towers import assert_equal_gradients

FAMILIES = ["blip", "meter"]
WAYS = get_args(TextStrategy)
CASES = [(family, way) for family in FAMILIES for way in WAYS]
KEPT = (5, 5, 3, 2)  # of 8, 7, 4 and 3 real tokens, of which 40% go


def dropping(family, way, **options):
    return made(family, text_reduction=way, text_depth=3, **options)


@pytest.mark.parametrize(("family", "way"), CASES)
def test_dropping_nothing_changes_no_bit(family, way):
    """Check equality with the model without reduction, dropout included."""
    dropout = {"blip": "text_dropout", "meter": "dropout"}[family]
    options, batch = {dropout: 0.1, "text_depth": 3}, batch_of_four()
    drawn, found = draws(family, *batch, "local"), []
    for reduction in ({}, {"text_reduction": way, "text_drop": 0.0}):
        torch.manual_seed(1)
        model = made(family, **options, **reduction)
        torch.manual_seed(2)
        found.append(step(model, batch, drawn))
    assert torch.equal(found[0][0], found[1][0])
    assert_equal_gradients(found[1][1], found[0][1])


def stacks():
    """Return layers of text towers of BLIP and METER, with the inputs of their cross attention."""
    blip, meter = (made(family, text_depth=3) for family in FAMILIES)
    image = torch.randn(4, 9, 16).double()
    mask = torch.rand(4, 9) < 0.7
    mask[:, 0] = True
    return {
        "alone": (meter.text, {}),
        "with image": (blip.encoders.text, {"image_tokens": image}),
        "decoder": (
            blip.decoder,
            {"image_tokens": image, "image_mask": mask, "causal": True},
        ),
    }


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stack", ["alone", "with image", "decoder"])
def test_layers_run_whole_and_then_on_the_kept_tokens(stack, way):
    (tower, options), every = stacks()[stack], range(3)
    _, ids, mask = batch_of_four()
    hidden, cls = tower.embed(ids), torch.randn(4, 16).double()
    text = tower.run_reduced(hidden, mask, every, TextReduction(way), **options, image_cls=cls)
    assert text.mask.sum(1).tolist() == list(KEPT) and text.tokens.shape == (4, 5, 16)
    assert (text.anchor == 0).all()
    for row, n in enumerate(mask.sum(1)):
        each = {k: v[row : row + 1] if torch.is_tensor(v) else v for k, v in options.items()}
        half = tower.run(hidden[row : row + 1, :n], mask[row : row + 1, :n], every[:1], **each)
        kept = text.kept[row][text.mask[row]]
        assert kept[0] == 0 and (kept.diff() > 0).all()
        if way == "post":
            assert kept.tolist() == list(range(KEPT[row]))
        expected = tower.run(half[:, kept], mask[row : row + 1, kept], every[1:], **each)
        torch.testing.assert_close(text.tokens[row, : len(kept)], expected[0])


@pytest.mark.parametrize("stack", ["alone", "with image", "decoder"])
def test_dropping_no_token_is_the_layers_alone(stack):
    (tower, options), every = stacks()[stack], range(3)
    _, ids, mask = batch_of_four()
    hidden, reduction = tower.embed(ids), TextReduction("post", 0.0)
    text = tower.run_reduced(hidden, mask, every, reduction, **options)
    assert torch.equal(text.tokens, tower.run(hidden, mask, every, **options))
    assert torch.equal(text.labels(ids.where(mask == 1, -100)), ids.where(mask == 1, -100))


def test_learned_keeps_what_the_image_attends_to():
    tower, (_, ids, mask) = made("meter", text_depth=2).text, batch_of_four()
    hidden, cls = tower.embed(ids), torch.randn(4, 16).double()
    reduction, kept = TextReduction("learned"), []
    for sign in (1, -1):
        text = tower.run_reduced(hidden, mask, range(2), reduction, image_cls=sign * cls)
        attention = tower.layers[1].attention.self
        half = tower.run(hidden, mask, range(1))
        q = attention.query(sign * cls).view(4, 2, 1, 8)
        k = attention.key(half).view(4, 8, 2, 8).transpose(1, 2)
        scores = (q @ k.mT * 8**-0.5).masked_fill(~(mask == 1)[:, None, None], -torch.inf)
        scores = scores.softmax(-1).mean(1)[:, 0]
        scores[:, 0] = torch.inf
        for row, n in enumerate(KEPT):
            best = scores[row].topk(n).indices.sort().values
            assert torch.equal(text.kept[row, :n], best)
        kept.append(text.kept)
    assert not torch.equal(*kept)


def test_dropped_masked_tokens_have_no_loss():
    model, batch = dropping("meter", "post"), batch_of_four()
    drawn = draws("meter", *batch, "local")
    loss = model(*batch, drawn=drawn).loss_mlm
    left = torch.arange(8) >= torch.tensor(KEPT)[:, None]
    others = torch.where(left & (drawn.labels != -100), drawn.labels % 34 + 6, drawn.labels)
    assert not torch.equal(others, drawn.labels)
    assert torch.equal(model(*batch, drawn=drawn._replace(labels=others)).loss_mlm, loss)
    none = drawn.labels.masked_fill(left, -100)
    assert torch.equal(model(*batch, drawn=drawn._replace(labels=none)).loss_mlm, loss)
    others = torch.where(left | (drawn.labels == -100), drawn.labels, drawn.labels % 34 + 6)
    assert not torch.equal(model(*batch, drawn=drawn._replace(labels=others)).loss_mlm, loss)


def test_dropped_tokens_predict_no_next_token():
    """Drop the last tokens of a causal text, which earlier tokens do not attend to."""
    model, (images, ids, mask) = dropping("blip", "post"), batch_of_four()
    drawn = draws("blip", images, ids, mask, "local")
    loss = model(images, ids, mask, drawn=drawn).loss_lm
    tokens, _ = model.encode_image(images, model.encode_text_reduced(images, ids, mask)[:, 0])
    stays = torch.arange(8) < torch.tensor(KEPT)[:, None]
    labels = next_tokens(ids, mask).masked_fill(~stays, -100)
    assert (labels != -100).sum() == sum(KEPT)
    logits = model.predict(ids, mask, tokens)
    expected = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), label_smoothing=model.config.label_smoothing
    )
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(("family", "way"), tiered(CASES, [], slow=[("blip", "random")]))
def test_it_trains_and_checkpointing_changes_nothing(family, way):
    model, batch = dropping(family, way), batch_of_four()
    drawn, other = draws(family, *batch, "local"), copy.deepcopy(model)
    other.set_grad_checkpointing()
    torch.manual_seed(3)
    first, gradients = step(model, batch, drawn)
    torch.manual_seed(3)
    same, recomputed = step(other, batch, drawn)
    assert torch.equal(same, first)
    assert_equal_gradients(recomputed, gradients)
    assert gradients.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for _ in range(6):
        descend(model)
        last, _ = step(model, batch, drawn)
    assert last[0] < first[0]


@pytest.mark.parametrize(("family", "way"), CASES)
def test_texts_outside_of_training_losses_keep_all_tokens(family, way):
    model, (_, ids, mask) = dropping(family, way).eval(), batch_of_four()
    state, whole = torch.get_rng_state(), model.encode_text(ids, mask)
    assert whole.shape == (4, 8, 16) and torch.equal(torch.get_rng_state(), state)
    text = (model.encoders if family == "blip" else model).text
    assert torch.equal(whole, text.run(text.embed(ids), mask, range(3)))


@pytest.mark.parametrize("family", FAMILIES)
def test_learned_encodes_the_dense_image_first(family):
    batch = batch_of_four()
    drawn, passes = draws(family, *batch, "local"), {}
    for way in WAYS:
        model, seen = dropping(family, way, scorer="last"), []
        model.visual.blocks[0].register_forward_hook(lambda m, args, out, s=seen: s.append(out))
        model(*batch, drawn=drawn)
        passes[way] = [tokens.requires_grad for tokens in seen]
    online = [True] * (1 if family == "blip" else 2)
    assert passes["random"] == passes["post"] == online
    assert passes["learned"] == [grad for each in online for grad in (False, each)]


def test_a_config_drops_nothing_by_default_and_albef_has_no_such_field():
    assert made("blip").text_reduction is None and made("meter").text_reduction is None
    with pytest.raises(TypeError, match="text_reduction"):
        made("albef", text_reduction="post")
    with pytest.raises(ValueError, match="text_reduction: expected one of 'random'"):
        made("meter", text_reduction="last")
