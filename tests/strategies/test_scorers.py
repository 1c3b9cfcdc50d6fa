"""The scorers that approximate `exact`, on every tower."""

import pytest
import torch

from elip_models.strategies.schedule import Stage
from elip_models.strategies.scorers import get_scorer, row_of
from elip_models.towers import Query, as_tower
from elip_models.towers.attention_rows import with_cls
from tests.helpers.towers import clip_vit, images, plain_vit, text

STAGE = Stage(first=1, layers=5, keep=10)
LAYERS = range(1, 6)


def entered(model):
    """Return the tower, tokens that enter its stage, and a query from a text."""
    tower = as_tower(model.eval())
    return tower, tower.embed(images()), text()


def row(scorer, tower, tokens, cls, stage=STAGE):
    with torch.no_grad():
        query = Query(tokens[:, 0], cls, fusion=0.0)
        return row_of(get_scorer(scorer), tower, stage, tokens, query)


def switch_off(*linears):
    for linear in linears:
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)


@pytest.mark.parametrize("scorer", ["attention", "alternate"])
@pytest.mark.parametrize("make", [plain_vit, clip_vit])
def test_what_a_scorer_leaves_out_is_all_that_differs_from_exact(make, scorer):
    """`attention` leaves out the MLPs before the last layer, `alternate` every second layer."""
    model = make()
    tower, *inputs = entered(model)
    assert not torch.allclose(row(scorer, tower, *inputs), row("exact", tower, *inputs))
    blocks = model.blocks
    if scorer == "attention":
        switch_off(*(blocks[i].mlp.fc2 for i in LAYERS[:-1]))
    else:
        switch_off(*(part for i in (2, 4) for part in (blocks[i].attn.proj, blocks[i].mlp.fc2)))
    torch.testing.assert_close(row(scorer, tower, *inputs), row("exact", tower, *inputs))


def test_bf16_is_exact_under_autocast_and_leaves_other_dtypes_as_they_are():
    model = plain_vit()
    tower, *inputs = entered(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected = row("exact", tower, *inputs)
    low, exact = row("bf16", tower, *inputs), row("exact", tower, *inputs)
    assert torch.equal(low, expected)
    assert low.dtype == torch.float32
    assert not torch.equal(low, exact)
    assert (low - exact).abs().max() < 0.05 * exact.max()
    tower, inputs = as_tower(model.double()), [tensor.double() for tensor in inputs]
    assert torch.equal(row("bf16", tower, *inputs), row("exact", tower, *inputs))


def test_mean_is_that_of_the_maps_of_all_layers_of_the_stage():
    tower, tokens, cls = entered(plain_vit())
    x = with_cls(tokens, cls)
    maps = torch.stack([tower.attention_map(i, x)[:, :, 0].mean(1) for i in LAYERS])
    torch.testing.assert_close(row("mean", tower, tokens, cls), maps.mean(0))
