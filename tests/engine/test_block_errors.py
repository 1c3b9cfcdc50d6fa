"""A block that raises an error leaves nothing of its forward pass behind."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import elip_models
from tests.engine.test_memory import alive, forwards  # noqa: F401
from tests.helpers.own_warnings import UNGUIDED
from tests.helpers.towers import SCHEDULE, clip_vit, images, text


class Broken(RuntimeError):
    pass


class Raising:
    """A hook that raises an error in the next call of a block's MLP."""

    def __init__(self, block):
        self.is_on = False
        block.mlp.register_forward_pre_hook(self)

    def __call__(self, module, args):
        if self.is_on:
            self.is_on = False
            raise Broken


@UNGUIDED
@pytest.mark.parametrize("strategy", ["elip", "tome", "evit"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("by_blocks", [False, True])
def test_the_next_call_is_right(forwards, strategy, grad, by_blocks):  # noqa: F811
    model, x, t = clip_vit().eval(), images(3), text(3)
    elip_models.reduce_(model, strategy, **({"fusion": 0.2} if strategy == "elip" else {}))
    raising = Raising(model.blocks[3])

    def run():
        if not by_blocks:
            return model(x)
        tokens = model.norm_pre(model._pos_embed(model.patch_embed(x)))
        return model.blocks(tokens)

    with torch.set_grad_enabled(grad):
        expected = run().detach()
        raising.is_on = True
        with (
            elip_models.guidance(model, t),
            elip_models.record_stages(model) as stages,
            pytest.raises(Broken),
        ):
            run()
        assert stages and alive(forwards) == 0
        assert model.blocks[3].forward.passes.eager.running.forward is None
        with elip_models.record_stages(model) as stages:
            assert torch.equal(run(), expected)
        blocks = [info.stage.first for info in stages]
        assert blocks == sorted(set(blocks))


def test_a_checkpoint_that_raises_leaves_nothing(forwards):  # noqa: F811
    model, x = clip_vit(), images(2)
    elip_models.reduce_(model, schedule=SCHEDULE)
    raising = Raising(model.blocks[3])
    raising.is_on = True
    with pytest.raises(Broken):
        checkpoint(model, x, use_reentrant=False)
    assert alive(forwards) == 0
    loss = checkpoint(model, x, use_reentrant=False).sum()
    raising.is_on = True
    with pytest.raises(Broken):
        loss.backward()
    del loss
    assert alive(forwards) == 0
