"""A recomputation replays the passes of its calls, whichever others wait for backward."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import elip_models
from elip_models import StageInfo
from elip_models.engine import recomputation
from examples.own_strategy import Longest
from tests.engine.test_checkpointing import in_blocks
from tests.helpers.models import hf_clip, ids
from tests.helpers.towers import assert_equal_gradients, clip_vit, gradients, images

checkpointed = partial(checkpoint, use_reentrant=False)


@dataclass(frozen=True)
class Drawn(Longest):
    """Keep patches by scores from a generator that no checkpoint restores."""

    name: ClassVar[str] = "drawn"
    generator: ClassVar[torch.Generator] = torch.Generator()

    def step(self, tower, stage, tokens, context):
        scores = None if context.replay is None else context.replay.attention
        if scores is None:
            scores = torch.rand(tokens.shape[:2], generator=self.generator)
        tokens, reduction = tower.reduce(tokens, scores, stage.keep, merge="one")
        return tokens, StageInfo(stage, reduction, scores)


def drawing_vit():
    return elip_models.reduce_(clip_vit(), Drawn())


def gradients_of(model, loss, *, blocks_too=False):
    """Return the gradients of a loss, with the same random numbers in each call."""
    Drawn.generator.manual_seed(0)
    torch.manual_seed(0)
    model.zero_grad()
    model.set_grad_checkpointing(blocks_too)
    loss().backward()
    return gradients(model)


def first_blocks(model, x):
    """Run the model with its first blocks, up to the first step, in one checkpoint."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    x = checkpointed(model.blocks[:2], x)
    for block in model.blocks[2:]:
        x = checkpointed(block, x)
    return model.forward_head(model.norm(x))


WAYS = {
    "no checkpoint": lambda model, x: model(x),
    "model": lambda model, x: checkpointed(model, x),
    "images made in it": lambda model, x: checkpointed(lambda x: model(x / 2 + x / 2), x),
    "first blocks": first_blocks,
    "each block": lambda model, x: in_blocks(model, x, checkpointed),
}


@pytest.mark.parametrize("same_images", [False, True])
@pytest.mark.parametrize(
    ("way", "blocks_too"),
    [("no checkpoint", True), ("model", True), *((way, False) for way in WAYS if "no" not in way)],
)
def test_passes_in_checkpoints_of_their_own(way, blocks_too, same_images):
    model, x = drawing_vit(), images(3)
    others = x if same_images else 2 * x

    def loss(run):
        a, b = run(model, x), run(model, others)
        return a.square().sum() + 3 * b.square().sum()

    expected = gradients_of(model, lambda: loss(WAYS["no checkpoint"]))
    got = gradients_of(model, lambda: loss(WAYS[way]), blocks_too=blocks_too)
    assert_equal_gradients(got, expected, rtol=1e-5, atol=1e-5)


def both(model, x):
    return torch.stack([model(x), model(x)])


def to_loss(model, x):
    return model(x).square()


@pytest.mark.parametrize("function", [both, to_loss])
def test_a_draw_that_cannot_be_found_is_an_error(function):
    """Of two calls on the same images, or of a model that other operations follow."""
    model, x = drawing_vit(), images(3)
    loss = checkpointed(partial(function, model), x).sum()
    with pytest.raises(RuntimeError, match=r"random numbers of the forward .* by itself"):
        loss.backward()


@pytest.mark.parametrize("same_images", [False, True])
@pytest.mark.parametrize("first_back", [0, 1])
def test_calls_of_a_whole_model_with_several_texts_in_one_checkpoint(first_back, same_images):
    model, x, texts = hf_clip().train(), images(2), (ids(2), ids(2).flip(0))
    elip_models.reduce_(model, "elip", keep=0.6)
    pictures = (x, x) if same_images else (x, 2 * x)
    anchor = torch.ones((), requires_grad=True)

    def calls(anchor):
        return tuple(
            model(input_ids=words, pixel_values=anchor * pixels).image_embeds
            for words, pixels in zip(texts, pictures, strict=True)
        )

    def step(run):
        model.zero_grad()
        with elip_models.guidance(model, paired=True):  # which ends before backward
            outputs = run(calls, anchor)
        weight = torch.linspace(-1, 1, outputs[0].shape[1])
        first, second = (outputs[i] @ weight for i in (first_back, 1 - first_back))
        (first.square().sum() + second.detach().sum() * first.sum() + second.sum()).backward()
        return gradients(model)

    expected = step(lambda function, anchor: function(anchor))
    assert_equal_gradients(step(checkpointed), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [lambda model: elip_models.reduce_(model, "evit"), elip_models.unreduce_],
    ids=["reduce_", "unreduce_"],
)
@pytest.mark.parametrize("blocks_too", [False, True])
def test_another_strategy_before_backward_is_an_error(change, blocks_too):
    model, x = elip_models.reduce_(clip_vit(), "tome"), images(2)
    model.set_grad_checkpointing(blocks_too)
    out = model(x) if blocks_too else checkpointed(model, x)
    change(model)
    with pytest.raises(RuntimeError, match="call reduce_ before the forward"):
        out.sum().backward()


def in_another_tensor(module, args):
    """Cast the input of a block and back, as FSDP2 does under mixed precision."""
    return (args[0].double().float(),)


def offloaded(model, x):
    with torch.autograd.graph.save_on_cpu():
        return WAYS["each block"](model, x)


@pytest.mark.parametrize("run", [WAYS["each block"], offloaded], ids=["cast", "offloaded"])
def test_blocks_that_run_again_on_other_tensors_find_their_pass(run):
    model, x = drawing_vit(), images(3)
    for block in model.blocks:
        block.register_forward_pre_hook(in_another_tensor)

    def loss(run):
        a, b = run(model, x), run(model, x)
        return a.square().sum() + 3 * b.square().sum()

    expected = gradients_of(model, lambda: loss(WAYS["no checkpoint"]))
    assert_equal_gradients(gradients_of(model, lambda: loss(run)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", ["no checkpoint", "each block"])
def test_a_block_saves_a_label_in_a_checkpoint_alone(way, monkeypatch):
    model, labels = drawing_vit(), []
    of = recomputation.Label.of
    monkeypatch.setattr(recomputation.Label, "of", lambda *args: labels.append(args) or of(*args))
    WAYS[way](model, images(3)).sum().backward()
    reduced = len(model.blocks) - model.blocks[-1].forward.reduction.first
    assert len(labels) == (0 if way == "no checkpoint" else 2 * reduced)
