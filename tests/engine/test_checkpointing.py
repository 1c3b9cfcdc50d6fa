"""Activation checkpointing of a reduced model replays the selection and does not score again."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import elip_models
from elip_models import ELIP, TRIPS, EViT, GuidedToMe, ToMe
from elip_models.strategies import elip as stage
from elip_models.strategies import scorers
from tests.helpers.own_warnings import UNGUIDED
from tests.helpers.tiers import tiered
from tests.helpers.towers import (
    SCHEDULE,
    assert_equal_gradients,
    clip_vit,
    gradients,
    gradients_of_a_step,
    images,
    plain_vit,
    text,
)
from tests.strategies.test_strategies import STRATEGIES

NAMES = tiered(STRATEGIES, ["elip", "tome", "evit"])


def in_blocks(model, x, run):
    """Run the model on images; `run(block, tokens)` runs each block."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    for block in model.blocks:
        x = run(block, x)
    return model.forward_head(model.norm(x))


def checkpointed_blocks(model):
    return lambda x: in_blocks(model, x, partial(checkpoint, use_reentrant=False))


def in_segments(model):
    return lambda x: sequential(model, x)


def timm_checkpointing(model):
    model.set_grad_checkpointing()
    return model


@pytest.mark.parametrize("scorer", ["exact", "last"])
@pytest.mark.parametrize("wrap", [checkpointed_blocks, in_segments, timm_checkpointing])
def test_checkpointing_replays_the_selection(wrap, scorer):
    model = clip_vit(proj_drop_rate=0.2, attn_drop_rate=0.1, drop_path_rate=0.2)
    elip_models.reduce_(model, schedule=SCHEDULE, scorer=scorer)
    x, t = images(3), text(3)
    expected = gradients_of_a_step(model, x, t)
    rows = []
    read = scorers.get_scorer(scorer).read

    def counted(*args):
        rows.append(args)
        return read(*args)

    with pytest.MonkeyPatch.context() as patch:
        for module in (scorers, stage):
            patch.setattr(module, "get_scorer", lambda name: scorers.Scorer(counted))
        got = gradients_of_a_step(model, x, t, wrap)
    assert len(rows) == 3  # once per stage: nothing is scored again in backward
    assert_equal_gradients(got, expected)


def whole(model, x):
    return checkpoint(model, x, use_reentrant=False)


def nested(model, x):
    model.set_grad_checkpointing()
    return whole(model, x)


def sequential(model, x):
    x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    x = checkpoint_sequential(model.blocks, 2, x, use_reentrant=False)
    return model.forward_head(model.norm(x))


FIRST_IN = ["first in, first out", "last in, first out"]


@pytest.mark.parametrize("mode", tiered(["train", "eval"], ["train"]))
@pytest.mark.parametrize("order", tiered(FIRST_IN, FIRST_IN[1:]))
@pytest.mark.parametrize("forward", [whole, nested, sequential])
def test_a_recomputation_finds_its_own_pass(forward, order, mode):
    """The same images run under other texts, with a pass without gradient in between."""
    model = getattr(clip_vit(), mode)()
    elip_models.reduce_(model, schedule=SCHEDULE, scorer="exact", fusion=0.2)
    x, texts = images(3).requires_grad_(), [text(3) for _ in range(3)]
    expected = [gradients_of_a_step(model, x, t) for t in texts]
    losses = []
    for t in texts:
        with elip_models.guidance(model, t):
            losses.append(forward(model, x).square().sum())
        with elip_models.guidance(model, text(3)), torch.no_grad():
            model(x)
    indices = range(3) if order.startswith("first") else reversed(range(3))
    for i in indices:
        model.zero_grad()
        losses[i].backward()
        assert_equal_gradients(gradients(model), expected[i], rtol=1e-5, atol=1e-5)


@UNGUIDED
@pytest.mark.parametrize("name", NAMES)
def test_a_recomputed_block_finds_its_own_pass(name):
    """Two batches wait for backward, no pass without checkpoints came before, one without gradient
    lies between."""
    strategy = STRATEGIES[name]
    model, batches = clip_vit(), [(images(3), text(3)) for _ in range(2)]

    def step(reduced, run):
        model.zero_grad()
        torch.manual_seed(1)
        loss = 0.0
        for x, t in batches:
            with elip_models.guidance(reduced, t):
                loss = loss + in_blocks(model, x, run).square().sum()
                with torch.no_grad():
                    model(images(3).flip(0))
        loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    checkpointed = partial(checkpoint, use_reentrant=False)
    got = step(elip_models.reduce_(model, strategy=strategy), checkpointed)
    elip_models.unreduce_(model)
    expected = step(elip_models.reduce_(model, strategy=strategy), lambda block, x: block(x))
    assert_equal_gradients(got, expected)


IN_ONE_GRAPH = {"elip": ELIP("1(100%) 2(50%)"), "trips": TRIPS("1(100%) 2(50%)")}
IN_SEVERAL = {
    "tome": ToMe(4),
    "nearest": ELIP("1(100%) 2(50%)", merge="nearest"),
    "evit": EViT(0.7, layers=(1,)),
    "guided_tome": GuidedToMe(4),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tome", "elip"])
def test_a_compiled_model_may_checkpoint_its_blocks(name):
    """In one graph where blocks know nothing of one another; no checkpoint of a graph hands on what
    another block is to know."""
    model, x = plain_vit(depth=3), images()
    elip_models.reduce_(model, strategy=(IN_ONE_GRAPH | IN_SEVERAL)[name])

    def step(model):
        model.zero_grad()
        model(x).square().sum().backward()

    step(model)
    expected = gradients(model)
    model.set_grad_checkpointing()

    def compiled(**options):
        torch._dynamo.reset()
        step(torch.compile(model, backend="aot_eager", **options))
        assert_equal_gradients(gradients(model), expected, rtol=1e-4, atol=1e-5)

    if name in IN_SEVERAL:
        with pytest.raises(torch._dynamo.exc.Unsupported, match="Unsafe side effect"):
            compiled(fullgraph=True)
    compiled(fullgraph=name in IN_ONE_GRAPH)
