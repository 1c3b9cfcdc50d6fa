"""Towers that pool their patches: each token is weighted by its number of patches."""

import pytest
import torch

import elip_models
from elip_models import (
    ELIP,
    TRIPS,
    EViT,
    RandomPruning,
    ToMe,
)
from elip_models.towers import as_tower
from tests.helpers.models import (
    POOLED,
    POOLED_WITHOUT_CLS,
    eva,
    output,
)
from tests.helpers.own_warnings import UNGUIDED
from tests.helpers.towers import SCHEDULE, images, text

MODELS = POOLED | POOLED_WITHOUT_CLS
MERGING = {
    "elip": ELIP(SCHEDULE, scorer="last"),
    "evit": EViT(0.7, layers=(1, 3)),
    "evit in the last block": EViT(0.5, layers=(2, 5)),
    "tome": ToMe(4),
    "trips": TRIPS(SCHEDULE),
    "random": RandomPruning(SCHEDULE),
    "nearest": ELIP(SCHEDULE, merge="nearest"),
}


def sizes(infos, num_prefix_tokens):
    """Return the number of patches in each token, (B, T-p)."""
    source = None
    for info in infos:
        source = info.reduction.source_map(source)
    return source[:, num_prefix_tokens:].sum(2)


def reduced(model, strategy, x, t):
    """Return the output under `reduce_`, and tokens and infos of `encode_image`, with one seed."""
    torch.manual_seed(1)
    tokens, infos = elip_models.encode_image(model, x, t, strategy=strategy, return_info=True)
    elip_models.reduce_(model, strategy=strategy)
    torch.manual_seed(1)
    with elip_models.guidance(model, t):
        return output(model, x), tokens, infos


@UNGUIDED
@pytest.mark.parametrize("strategy", MERGING.values(), ids=MERGING)
@pytest.mark.parametrize("name", ["timm average", "timm average, register"])
def test_an_average_is_weighted_by_sizes(name, strategy):
    model, x, t = MODELS[name]().train(), images(), text()
    tower = as_tower(model)
    if not tower.has_cls and strategy.name == "evit":
        pytest.skip("EViT scores by a CLS token")
    p = tower.num_prefix_tokens
    got, tokens, infos = reduced(model, strategy, x, t)
    weights = sizes(infos, p)
    assert torch.equal(weights.sum(1), torch.full((2,), 36))
    assert weights.max() > 1
    mean = (weights[..., None] * tokens[:, p:]).sum(1) / 36
    torch.testing.assert_close(got, model.head(model.fc_norm(mean)), atol=1e-5, rtol=1e-5)


@UNGUIDED
@pytest.mark.parametrize("strategy", [MERGING["elip"], ToMe(4)], ids=["elip", "tome"])
def test_attention_pooling_adds_the_log_of_sizes_to_its_scores(strategy):
    model, x, t = MODELS["timm SigLIP"]().eval(), images(), text()
    got, tokens, infos = reduced(model, strategy, x, t)
    bias = sizes(infos, 0).log()[:, None, None]
    torch.testing.assert_close(
        got, model.head(model.attn_pool(tokens, attn_mask=bias)), atol=1e-5, rtol=1e-5
    )


def test_a_text_is_the_query_of_a_rotary_tower_without_cls_by_any_layer():
    """A wrapped projection, which is called, and a plain one, which is read, score alike."""
    model, x, t = POOLED_WITHOUT_CLS["rope average, no CLS"]().eval(), images(), text()
    tower = as_tower(model)
    tokens = tower.embed(x)
    expected = tower.cls_attention(2, tokens, t)
    model.blocks[2].attn.qkv.register_forward_hook(lambda m, args, out: out)
    assert tower.weights(2) is None
    torch.testing.assert_close(tower.cls_attention(2, tokens, t), expected, atol=1e-6, rtol=1e-5)
    registers = eva(attn_type="rope", global_pool="avg", class_token=False, num_reg_tokens=2)
    registers.blocks[2].attn.qkv.register_forward_hook(lambda m, args, out: out)
    assert as_tower(registers).cls_attention(2, as_tower(registers).embed(x), t).shape == (2, 38)
