"""SigLIP: towers without a CLS token, where the text alone asks which patches stay."""

import pytest
import torch
import transformers

import elip_kernels
import elip_models
from elip_models.reduction.strategies import get_strategy
from elip_models.towers import as_image_text, as_tower
from tests.test_towers import enlarged
from tests.towers import SCHEDULE, WIDTH, gradients, images, text

VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "image_size": 48,
    "patch_size": 8,
}


def siglip_vision(attention="sdpa", **options):
    config = transformers.SiglipVisionConfig(**(VISION | options), attn_implementation=attention)
    return enlarged(transformers.SiglipVisionModel(config))


def siglip(projection_size=WIDTH):
    text_config = {
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 50,
        "max_position_embeddings": 8,
        "projection_size": projection_size,
    }
    config = transformers.SiglipConfig(text_config=text_config, vision_config=VISION)
    return enlarged(transformers.SiglipModel(config))


@pytest.fixture(params=["sdpa", "eager"])
def model(request):
    return siglip_vision(request.param).eval()


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_empty_schedule_is_the_untouched_model(mode):
    model, x = siglip_vision(attention_dropout=0.1), images()
    getattr(model, mode)()
    torch.manual_seed(1)
    expected, keys = model(x), list(model.state_dict())
    elip_models.reduce_(model, schedule="6(100%)")
    torch.manual_seed(1)
    got = model(x)
    assert torch.equal(got.pooler_output, expected.pooler_output)
    assert torch.equal(got.last_hidden_state, expected.last_hidden_state)
    assert list(model.state_dict()) == keys


@torch.no_grad()
def test_parts_add_up_to_the_block(model):
    tower = as_tower(model)
    tokens = tower.embed(images())
    assert tokens.shape == (2, tower.num_tokens, WIDTH) == (2, 36, WIDTH)
    assert not tower.has_cls
    for i in range(tower.depth):
        whole = tower.block(i, tokens)
        close = {"atol": 2e-5, "rtol": 2e-5}
        torch.testing.assert_close(tower.mlp(i, tower.attend(i, tokens)), whole, **close)
        tokens = whole


def row_by_hand(layer, tokens, t):
    """Head mean of softmax over the tokens of q(norm(t)) . k(norm(x))."""
    attn = layer.self_attn
    q = attn.q_proj(layer.layer_norm1(t)).view(2, 2, 1, -1)
    k = attn.k_proj(layer.layer_norm1(tokens)).view(2, -1, 2, WIDTH // 2).transpose(1, 2)
    return (q @ k.mT * attn.scale).softmax(-1).mean(1)[:, 0]


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


@pytest.mark.parametrize("scorer", ["exact", "last", 1])
def test_patched_model_equals_encode_image(model, scorer):
    x, t = images(), text()
    dense = model(x)
    tokens, infos = elip_models.encode_image(
        model, x, t, schedule=SCHEDULE, scorer=scorer, return_info=True
    )
    assert tokens.shape == (2, 10 + 1, WIDTH)  # no CLS
    assert [i.stage.keep for i in infos] == [28, 18, 10] == [int(36 * r) for r in (0.8, 0.5, 0.3)]
    elip_models.reduce_(model, schedule=SCHEDULE, scorer=scorer)
    with elip_models.guidance(model, t):
        reduced = model(x)
    assert torch.equal(reduced.last_hidden_state, tokens)
    assert torch.equal(reduced.pooler_output, model.head(tokens))  # pools what is left
    assert not torch.allclose(reduced.pooler_output, dense.pooler_output)
    reduced.pooler_output.sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]
    elip_models.unreduce_(model)
    assert torch.equal(model(x).pooler_output, dense.pooler_output)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_another_text_keeps_other_patches_and_its_length_does_not_matter():
    model, x, t = siglip_vision().eval(), images(), text()
    kept = [
        elip_models.encode_image(model, x, each, schedule=SCHEDULE, return_info=True)[1]
        for each in (t, 3 * t, -t)
    ]
    first, longer, other = (infos[0].reduction.kept for infos in kept)
    assert torch.equal(first, longer)
    assert not torch.equal(first, other)


def test_scoring_counts_the_key_projection():
    size = as_tower(siglip_vision()).size
    last = get_strategy("elip", schedule="3(100%) 3(50%)", scorer="last")
    assert last.scoring_flops(size) == 2 * 36 * WIDTH * (WIDTH + 1)


def test_without_text_it_stays_dense():
    model, x = siglip_vision().eval(), images()
    dense = model(x).pooler_output
    elip_models.reduce_(model, schedule=SCHEDULE)
    assert torch.equal(model(x).pooler_output, dense)


def test_compiles_whole():
    torch._dynamo.reset()
    model, x, t = siglip_vision().eval(), images(), text()
    elip_models.reduce_(model, schedule="3(100%) 3(50%)", scorer="exact")
    with elip_models.guidance(model, t):
        expected = model(x).pooler_output
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with elip_models.guidance(compiled, t):
        got = compiled(x).pooler_output
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    got.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_replays(reentrant):
    model, x, t, found = siglip_vision(attention_dropout=0.1).train(), images(), text(), []
    x.requires_grad_()
    elip_models.reduce_(model, schedule=SCHEDULE, scorer="exact")
    for checkpoint in (False, True):
        if checkpoint:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        torch.manual_seed(3)
        with elip_models.guidance(model, t):
            out = model(x).pooler_output
        out.square().sum().backward()
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected)


@pytest.mark.parametrize("name", ["tome", "random", "patch_dropout", "trips"])
def test_strategies_without_a_cls_row_run(name):
    model, x, t = siglip_vision().train(), images(), text()
    options = {"schedule": SCHEDULE} if name in ("random", "trips") else {}
    strategy = get_strategy(name, **options)
    tower = as_tower(model)
    torch.manual_seed(0)
    tokens = elip_models.encode_image(model, x, t, strategy=strategy)
    assert tokens.shape[1] == strategy.token_counts(tower.size)[-1].mlp < 36
    elip_models.reduce_(model, strategy=strategy)
    torch.manual_seed(0)
    with elip_models.guidance(model, t):
        assert torch.equal(model(x).last_hidden_state, tokens)


REFUSED = {
    "no CLS token whose row keeps": {"strategy": "evit"},
    "a text alone can score": {"schedule": SCHEDULE, "without_text": "vision"},
    "fusion below 1": {"schedule": SCHEDULE, "fusion": 1.0},
    "'official' takes a CLS token through": {"schedule": SCHEDULE, "scorer": "official"},
    "'cls' takes a CLS token through": {"schedule": SCHEDULE, "scorer": "cls"},
    "needs the norm of a CLS token": {"schedule": SCHEDULE, "guidance_norm": "match"},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_needs_a_cls_token_is_refused_with_the_reason(reason):
    model = siglip_vision()
    with pytest.raises(TypeError, match=reason):
        elip_models.reduce_(model, **REFUSED[reason])
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_classifier_that_averages_its_tokens_is_refused():
    config = transformers.SiglipConfig(vision_config=VISION, num_labels=3)
    with pytest.raises(TypeError, match="it averages its tokens"):
        elip_models.reduce_(transformers.SiglipForImageClassification(config), schedule="6(100%)")


def test_a_pair_is_guided_by_the_feature_of_its_last_text_token():
    model, tokens = siglip().eval(), torch.randint(0, 50, (2, 8))
    mask = torch.ones_like(tokens)
    mask[:, 5:7] = 0
    pair, x = as_image_text(model), images()
    for each in (None, mask):
        features = model.text_model(tokens, attention_mask=each).pooler_output
        assert torch.equal(pair.text_cls(tokens, x, each), features)
        assert torch.equal(pair.text_cls(tokens, x, attention_mask=each), features)


def test_a_text_of_another_width_is_refused():
    with pytest.raises(TypeError, match="its text is 24 wide, its image tower 32"):
        elip_models.reduce_(siglip(projection_size=24), schedule=SCHEDULE)
