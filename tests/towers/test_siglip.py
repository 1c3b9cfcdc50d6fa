"""SigLIP: in towers without a CLS token, the text alone scores the patches."""

import pytest
import torch

import elip_kernels
import elip_models
from elip_models.strategies.spec import get_strategy
from elip_models.towers import as_tower
from tests.helpers.models import siglip_vision
from tests.helpers.own_warnings import SLOW_SCORER, UNGUIDED
from tests.helpers.towers import SCHEDULE, WIDTH, images, text, whole_grid


@pytest.fixture(params=["sdpa", "eager"])
def model(request):
    return siglip_vision(request.param).eval()


def row_by_hand(layer, tokens, t):
    """Return the head mean of the softmax over tokens of q(norm(t)) . k(norm(x))."""
    attn = layer.self_attn
    q = attn.q_proj(layer.layer_norm1(t)).view(2, 2, 1, -1)
    k = attn.k_proj(layer.layer_norm1(tokens)).view(2, -1, 2, WIDTH // 2).transpose(1, 2)
    return (q @ k.mT * attn.scale).softmax(-1).mean(1)[:, 0]


@SLOW_SCORER
@torch.no_grad()
@pytest.mark.parametrize(("scorer", "whole", "row"), [("last", 0, 2), ("exact", 2, 2), (2, 1, 1)])
def test_the_text_is_the_query_of_the_scorers_layer(model, scorer, whole, row):
    x, t, tower = images(), text(), as_tower(model)
    _, (info,) = elip_models.encode_image(
        model, x, t, schedule="3(100%) 3(50%)", scorer=scorer, return_info=True
    )
    tokens = tower.embed(x)
    for layer in tower.blocks[:3]:
        tokens = layer(tokens, attention_mask=None)
    entered = tokens
    for layer in tower.blocks[3 : 3 + whole]:
        tokens = layer(tokens, attention_mask=None)
    expected = row_by_hand(tower.blocks[3 + row], tokens, t)
    torch.testing.assert_close(info.attention, expected, atol=1e-6, rtol=1e-5)
    kept = elip_kernels.reduce(
        entered, info.attention, int(36 * 0.5), num_prefix_tokens=0, return_info=True
    )[1].kept
    assert torch.equal(info.reduction.kept, kept)


def probed(head, tokens, sizes):
    """Return the head's output for tokens of `sizes` (B, N) patches: their log biases the probe."""
    bias = sizes.log().repeat_interleave(head.attention.num_heads, 0)[:, None]
    probe = head.probe.expand(len(tokens), -1, -1)
    attended = head.attention(probe, tokens, tokens, attn_mask=bias)[0]
    return (attended + head.mlp(head.layernorm(attended)))[:, 0]


STRATEGIES = {
    "elip": {"schedule": SCHEDULE},
    "tome": {"strategy": "tome:r=4"},
}


@UNGUIDED
@pytest.mark.parametrize("settings", STRATEGIES.values(), ids=STRATEGIES)
def test_the_probe_weights_each_token_by_its_patches(model, settings):
    x, t = images(), text()
    strategy = get_strategy(**({"strategy": "elip"} | settings))
    tokens, infos = elip_models.encode_image(model, x, t, strategy=strategy, return_info=True)
    elip_models.reduce_(model, strategy=strategy)
    with elip_models.guidance(model, t):
        reduced = model(x)
    assert tokens.shape[1] < 36
    assert torch.equal(reduced.last_hidden_state, whole_grid(tokens, infos))
    source = None
    for info in infos:
        source = info.reduction.source_map(source)
    expected = probed(model.head, tokens, source.sum(2))
    torch.testing.assert_close(reduced.pooler_output, expected, atol=1e-5, rtol=1e-5)
