"""Merged tokens at the mean position of their patches, whose rotation is computed."""

import copy
from dataclasses import replace

import pytest
import torch
from timm.layers.pos_embed_sincos import RotaryEmbeddingMixed, get_mixed_freqs

import elip_models
from elip_models import GuidedToMe, ToMe
from elip_models.towers import as_tower
from tests.helpers.models import ROTARY
from tests.helpers.own_warnings import UNGUIDED
from tests.helpers.tiers import slow_except
from tests.helpers.towers import (
    images,
    text,
)

ROTATING = [name for name in ROTARY if name != "EVA without rotation"]
MEANS = {
    "tome": ToMe((9, 0, 12, 3, 0, 0), position="mean"),
    "guided_tome": GuidedToMe((9, 0, 12, 3, 0, 0), position="mean"),
}


def own_rotations(rope, offset):
    """The rotations that an embedding computes of the 6 x 6 grid moved by `offset` patches."""
    if isinstance(rope, RotaryEmbeddingMixed):
        return get_mixed_freqs(rope.freqs, *(t + offset for t in rope._get_grid_values((6, 6))))
    rope = copy.deepcopy(rope)
    rope._use_cached_embed, rope.grid_offset = False, rope.grid_offset + offset
    return rope.get_embed(shape=(6, 6))


@torch.no_grad()
@pytest.mark.parametrize("name", slow_except(["EVA-02 tiny", "DINOv3", "rope mixed"], ROTATING))
def test_a_rotation_between_patches_is_that_of_the_models_own_embedding(name):
    """The mean of a patch and its diagonal neighbour is half a patch further in both axes."""
    model, close = ROTARY[name]().eval(), {"atol": 1e-6, "rtol": 0}
    tower, rope = as_tower(model), model.rope
    grid = tower.coordinates()
    first = torch.arange(36).view(6, 6)[:5, :5].flatten()
    diagonal = (grid[first] + grid[first + 7]) / 2
    for at, offset, patches in ((grid, 0.0, slice(None)), (diagonal, 0.5, first)):
        for i in (0, 5):
            expected = own_rotations(rope, offset)
            expected = expected[i] if tower.is_mixed else expected[None]
            found = tower.with_positions(at[None])._rope(i)
            torch.testing.assert_close(found[0], expected[:, patches], **close)


@UNGUIDED
@torch.no_grad()
@pytest.mark.parametrize("strategy", slow_except(["tome"], MEANS))
@pytest.mark.parametrize("name", slow_except(["DINOv3"], ["DINOv3", "rope mixed"]))
def test_a_merged_token_has_the_mean_coordinates_of_its_patches(name, strategy):
    model, x, t = ROTARY[name]().eval(), images(), text()
    options = {"strategy": MEANS[strategy]}
    tokens, infos = elip_models.encode_image(model, x, t, return_info=True, **options)
    p, grid, source = model.num_prefix_tokens, as_tower(model).coordinates(), None
    for info in infos:
        source = info.reduction.source_map(source)
        share = source[:, p:, p:].double()
        mean = share / share.sum(2, keepdim=True) @ grid
        torch.testing.assert_close(info.positions, mean.float(), atol=1e-6, rtol=1e-6)
    kept = elip_models.encode_image(model, x, t, strategy=replace(MEANS[strategy], position="kept"))
    assert not torch.allclose(kept, tokens, atol=1e-2)
    elip_models.reduce_(model, **options)
    with elip_models.guidance(model, t):
        torch.testing.assert_close(model.forward_features(x), tokens, atol=1e-6, rtol=1e-6)
