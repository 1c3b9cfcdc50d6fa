"""Checkpoints that hold more than the model, and those that are refused, never select otherwise."""

import weakref
from contextlib import nullcontext

import pytest
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


@pytest.mark.parametrize("guided_inside", [False, True])
def test_a_checkpoint_with_the_loss_is_right_with_its_guidance_around_or_in_it(guided_inside):
    model, x, t = reduced(), images(3), text(3)
    expected = expected_gradients(model, and_loss(model), x, t)

    def guided(x):
        with elip_models.guidance(model, 1 * t):  # another tensor in the recomputation
            return and_loss(model)(x)

    with nullcontext() if guided_inside else elip_models.guidance(model, t):
        function = guided if guided_inside else and_loss(model)
        checkpoint(function, x, use_reentrant=False).backward()
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


def test_backward_frees_what_a_checkpoint_saved_while_the_loss_is_alive():
    model, entered = reduced(), []
    model.set_grad_checkpointing()
    for block in model.blocks[1:]:
        block.register_forward_pre_hook(lambda _, args: entered.append(weakref.ref(args[0])))
    loss = model(images(2)).square().sum()
    assert all(tokens() is not None for tokens in entered)
    loss.backward()
    assert all(tokens() is None for tokens in entered)


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
