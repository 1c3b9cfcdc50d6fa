"""Checkpoints that hold more than the model, and those that are refused, never select otherwise."""

import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import elip_models
from tests.helpers.towers import (
    SCHEDULE,
    assert_equal_gradients,
    clip_vit,
    gradients,
    images,
    plain_vit,
    text,
)


def reduced(**options):
    options = {"schedule": SCHEDULE, "scorer": "exact", "fusion": 0.2} | options
    return elip_models.reduce_(clip_vit(), **options)


def and_loss(model):
    """Return a function of images that goes on after the model."""
    return lambda x: model(x).square().sum()


def expected_gradients(model, function, x, t):
    model.zero_grad()
    with elip_models.guidance(model, t):
        function(x).backward()
    expected = gradients(model)
    model.zero_grad()
    return expected


def test_a_checkpoint_with_the_loss_is_right_inside_of_the_guidance():
    model, x, t = reduced(), images(3), text(3)
    expected = expected_gradients(model, and_loss(model), x, t)
    with elip_models.guidance(model, t):
        checkpoint(and_loss(model), x, use_reentrant=False).backward()
    assert_equal_gradients(gradients(model), expected)


def test_a_checkpoint_with_the_loss_is_right_with_the_guidance_in_it():
    model, x, t = reduced(), images(3), text(3)
    expected = expected_gradients(model, and_loss(model), x, t)

    def guided(x):
        with elip_models.guidance(model, 1 * t):  # another tensor in the recomputation
            return and_loss(model)(x)

    checkpoint(guided, x, use_reentrant=False).backward()
    assert_equal_gradients(gradients(model), expected)


@pytest.mark.parametrize("blocks_too", [False, True])
@pytest.mark.parametrize("other", [False, True])
def test_a_checkpoint_with_the_loss_never_selects_by_another_text(other, blocks_too):
    model, x = reduced(), images(3)
    model.set_grad_checkpointing(blocks_too)
    with elip_models.guidance(model, text(3)):
        loss = checkpoint(and_loss(model), x, use_reentrant=False)
    with pytest.raises(RuntimeError, match=r"guidance: .* inside of the checkpointed function"):
        if other:
            with elip_models.guidance(model, 5 * text(3)):
                loss.backward()
        else:
            loss.backward()


def test_other_settings_before_backward_are_an_error():
    model = reduced(scorer="last")
    loss = checkpoint(and_loss(model), images(3), use_reentrant=False)
    elip_models.reduce_(model, schedule=SCHEDULE, scorer=1)
    with pytest.raises(RuntimeError, match="call reduce_ before the forward"):
        loss.backward()


@pytest.mark.parametrize("strategy", ["tome", "evit", "random"])
def test_what_no_text_guides_is_right_in_any_checkpoint(strategy):
    model, x = elip_models.reduce_(clip_vit(proj_drop_rate=0.1), strategy=strategy), images(3)
    steps = []
    for use_reentrant in (None, False, True):
        model.zero_grad()
        torch.manual_seed(3)
        loss = and_loss(model)
        x.requires_grad_()
        out = loss(x) if use_reentrant is None else checkpoint(loss, x, use_reentrant=use_reentrant)
        out.backward()
        steps.append(gradients(model))
    assert_equal_gradients(steps[1], steps[0])
    assert_equal_gradients(steps[2], steps[0])


@pytest.mark.parametrize("strategy", ["elip", "tome"])
def test_two_passes_in_one_checkpoint_under_one_text(strategy):
    model, x = elip_models.reduce_(clip_vit(), strategy=strategy), images(3)
    t = text(3)

    def both(x):
        return torch.cat([model(x), model(x.flip(0))])

    expected = expected_gradients(model, lambda x: both(x).square().sum(), x, t)
    with elip_models.guidance(model, t):
        out = checkpoint(both, x, use_reentrant=False)
    out.square().sum().backward()
    assert_equal_gradients(gradients(model), expected, rtol=1e-5, atol=1e-6)


def frozen_with_head():
    model = reduced()
    model.requires_grad_(False)
    return nn.Sequential(model, nn.Linear(5, 3)), model


def test_a_frozen_tower_before_a_head_is_right_inside_of_the_guidance():
    whole, model = frozen_with_head()
    x, t = images(3), text(3)
    expected = expected_gradients(whole, and_loss(whole), x, t)
    with elip_models.guidance(model, t):
        checkpoint(whole, x, use_reentrant=False).square().sum().backward()
    assert_equal_gradients(gradients(whole), expected)


def test_a_frozen_tower_before_a_head_never_selects_by_another_text():
    whole, model = frozen_with_head()
    with elip_models.guidance(model, text(3)):
        loss = checkpoint(whole, images(3), use_reentrant=False).square().sum()
    with pytest.raises(RuntimeError, match="guidance"), elip_models.guidance(model, text(3)):
        loss.backward()


def test_frozen_blocks_before_the_models_own_head():
    model, x, t = reduced(), images(3), text(3)
    model.blocks.requires_grad_(False)
    model.patch_embed.requires_grad_(False)
    expected = expected_gradients(model, and_loss(model), x, t)
    with elip_models.guidance(model, t):
        out = checkpoint(model, x, use_reentrant=False)
    out.square().sum().backward()
    assert_equal_gradients(gradients(model), expected)


def test_backward_frees_what_a_checkpoint_saved_while_the_loss_is_alive():
    model, entered = reduced(), []
    model.set_grad_checkpointing()
    for block in model.blocks[1:]:
        block.register_forward_pre_hook(lambda _, args: entered.append(weakref.ref(args[0])))
    loss = model(images(2)).square().sum()
    assert all(tokens() is not None for tokens in entered)
    loss.backward()
    assert all(tokens() is None for tokens in entered)


def test_a_block_may_be_changed_in_place_after_a_checkpoint():
    model, x = reduced(), images(2)
    model.set_grad_checkpointing()
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    for block in model.blocks:
        tokens = checkpoint(block, tokens, use_reentrant=False)
        tokens += 1
    tokens.square().sum().backward()
    assert all(g.isfinite().all() for g in gradients(model).values())


@pytest.mark.parametrize("strategy", ["elip", "tome"])
@pytest.mark.parametrize("segments", [None, 3])
def test_reentrant_checkpoints_of_blocks_are_refused(strategy, segments):
    model = elip_models.reduce_(plain_vit(), strategy=strategy)
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(images(2))))
    with pytest.raises(RuntimeError, match=r"re-entrant .*; pass use_reentrant=False"):
        if segments:
            checkpoint_sequential(model.blocks, segments, tokens, use_reentrant=True)
        else:
            for block in model.blocks:
                tokens = checkpoint(block, tokens, use_reentrant=True)


def test_a_reentrant_checkpoint_of_a_guided_model_is_refused():
    model, x = reduced(), images(2).requires_grad_()
    refused = pytest.raises(RuntimeError, match="use_reentrant=False")
    with refused, elip_models.guidance(model, text(2)):
        checkpoint(model, x, use_reentrant=True)
    with torch.no_grad(), elip_models.guidance(model, text(2)):
        assert model(x).isfinite().all()


def test_an_unguided_model_in_a_backward_hook_selects_anew():
    model, seen = reduced(), []
    x = images()

    def run(gradient):
        for is_checkpointed in (True, False):
            model.set_grad_checkpointing(is_checkpointed)
            seen.append(model(x))

    y = torch.ones(1, requires_grad=True)
    y.register_hook(run)
    y.sum().backward()
    assert torch.equal(*seen)
