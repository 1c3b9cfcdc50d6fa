"""Scorer `received`: the attention that a token receives, with and without a CLS token."""

import pytest
import torch

import elip_models
from elip_models.towers import as_tower
from elip_models.user_warnings import UnguidedWarning, warn_again
from tests.helpers.models import siglip_vision
from tests.helpers.towers import SCHEDULE, images, plain_vit, text, whole_grid

TOWERS = {"timm": plain_vit, "siglip": siglip_vision}


@torch.no_grad()
@pytest.mark.parametrize("name", TOWERS)
def test_the_row_is_the_mean_of_the_columns_of_the_last_layers_map(name):
    model, x = TOWERS[name]().eval(), images()
    tower, plan = as_tower(model), {"schedule": "3(100%) 3(50%)", "scorer": "received"}
    _, (info,) = elip_models.encode_image(model, x, **plan, return_info=True)
    tokens = tower.embed(x)
    for i in range(3):
        tokens = tower.block(i, tokens)
    expected = tower.attention_map(5, tokens).mean((1, 2))
    torch.testing.assert_close(info.attention, expected, atol=1e-6, rtol=1e-5)
    p = tower.num_prefix_tokens
    best = expected[:, p:].topk(tower.num_patches // 2).indices.sort().values + p
    assert torch.equal(info.reduction.kept, best)


@pytest.mark.parametrize("without_text", ["dense", "vision", None])
def test_a_tower_without_cls_is_reduced_by_itself(without_text):
    model, x = siglip_vision().eval(), images()
    plan = {"schedule": SCHEDULE, "scorer": "received", "without_text": without_text}
    tokens, infos = elip_models.encode_image(model, x, **plan, return_info=True)
    elip_models.reduce_(model, strategy="elip", **plan)
    assert torch.equal(model(x).last_hidden_state, whole_grid(tokens, infos))
    assert tokens.shape[1] < as_tower(model).size.num_tokens


def test_a_text_changes_nothing_and_a_warning_names_the_scorer():
    warn_again()
    model, x = plain_vit().eval(), images()
    elip_models.reduce_(model, strategy="elip", schedule=SCHEDULE, scorer="received")
    alone = model(x)
    with (
        pytest.warns(UnguidedWarning, match="^'elip' reads no text with scorer='received'"),
        elip_models.guidance(model, text()),
    ):
        assert torch.equal(model(x), alone)
