"""Text reduction: the dropped tokens against a loop over texts, and CLIP's text tower with it."""

import json
import math
from typing import get_args
from unittest.mock import Mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import elip_models
from elip_models.pretraining.models.clip import model as clip
from elip_models.pretraining.models.layers.text_reduction import TextReduction, TextStrategy
from elip_models.pretraining.tasks.retrieval import Retrieval
from elip_models.pretraining.training.trainer import train
from elip_models.reduction.user_warnings import UnguidedWarning, warn_once
from tests.helpers.tiers import tiered
from tests.helpers.tiny_run import own_process, tiny_config

LENGTHS = (13, 9, 5, 2, 1, 0)
L = 13


def texts(anchor="last", dtype=torch.float32):
    """Return tokens (6, 13, 4), a ragged mask, anchors, and scores with ties and a NaN."""
    tokens = torch.randn(len(LENGTHS), L, 4, dtype=dtype)
    lengths = torch.tensor(LENGTHS)
    mask = torch.arange(L) < lengths[:, None]
    mask[1] = mask[1].flip(0)  # padded on the left
    last = (mask * torch.arange(L)).amax(1)
    scores = torch.randint(0, 4, (len(LENGTHS), L)).float()
    scores[0, 3] = torch.nan
    return tokens, mask, last if anchor == "last" else mask.int().argmax(1), scores


def oracle(mask, anchor, key, drop):
    """Return the remaining positions of each text; tokens with a small `key` are dropped first."""
    kept = []
    for row, place, values in zip(mask.tolist(), anchor.tolist(), key.tolist(), strict=True):
        real = [i for i in range(len(row)) if row[i] or i == place]
        others = [i for i in real if i != place]
        others.sort(key=lambda i, v=values: (v[i] != v[i], -v[i], i))
        kept.append(sorted([place, *others[: len(real) - int(drop * len(real)) - 1]]))
    return kept


@pytest.mark.parametrize("drop", [0.0, 0.05, 0.4, 0.99])
@pytest.mark.parametrize("anchor", ["first", "last"])
@pytest.mark.parametrize("strategy", get_args(TextStrategy))
def test_drops_what_a_loop_over_texts_drops(strategy, anchor, drop):
    tokens, mask, places, scores = texts(anchor)
    torch.manual_seed(7)
    out = TextReduction(strategy, drop)(tokens, mask, places, scores)
    torch.manual_seed(7)
    by_position = -torch.arange(L).float().expand(mask.shape)
    key = {"random": torch.rand(mask.shape), "post": by_position, "learned": scores}[strategy]
    expected = oracle(mask, places, key, drop)
    assert out.tokens.shape == (len(LENGTHS), L - int(drop * L), 4)
    assert [row[m].tolist() for row, m in zip(out.kept, out.mask, strict=True)] == expected
    assert torch.equal(out.tokens, tokens.gather(1, out.kept[..., None].expand(-1, -1, 4)))
    assert torch.equal(out.kept.gather(1, out.anchor[:, None])[:, 0], places)


def test_each_text_drops_its_own_share_and_padding_displaces_nothing():
    tokens, mask, places, _ = texts()
    out = TextReduction("post")(tokens, mask, places)
    assert out.mask.sum(1).tolist() == [8, 6, 3, 2, 1, 1]
    assert out.kept[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 12]
    assert out.anchor.tolist() == [7, 5, 2, 1, 0, 0]


def test_an_int_is_the_anchor_of_every_text():
    tokens, mask, _, scores = texts()
    out = TextReduction("learned")(tokens, mask, 0, scores)
    expected = TextReduction("learned")(tokens, mask, torch.zeros(6, dtype=torch.int64), scores)
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


def test_gradients_reach_the_kept_tokens_only():
    tokens, mask, places, scores = texts(dtype=torch.float64)
    tokens.requires_grad_()
    scores.requires_grad_()
    out = TextReduction("learned")(tokens, mask, places, scores)
    weight = torch.randn_like(out.tokens)
    (out.tokens * weight).sum().backward()
    index = out.kept[..., None].expand_as(weight)
    assert torch.equal(tokens.grad, torch.zeros_like(tokens).scatter(1, index, weight))
    assert scores.grad is None


@pytest.mark.parametrize("strategy", tiered(get_args(TextStrategy), [], slow=["random"]))
def test_compiles_whole_for_any_length(strategy):
    torch._dynamo.reset()
    tokens, mask, places, scores = texts("first")
    reduction = TextReduction(strategy)
    compiled = torch.compile(reduction.__call__, fullgraph=True, backend="eager", dynamic=True)
    for length in (L, 11):
        arguments = tokens[:, :length], mask[:, :length], places.clamp(max=length - 1)
        torch.manual_seed(3)
        got = compiled(*arguments, scores[:, :length])
        torch.manual_seed(3)
        expected = reduction(*arguments, scores[:, :length])
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


BAD = [
    ({"strategy": "first"}, {}, "strategy: expected one of 'random', 'post', .* got 'first'"),
    ({"drop": 1.0}, {}, r"drop: expected a number in \[0, 1\), got 1.0"),
    ({"drop": True}, {}, r"drop: expected a number in \[0, 1\), got True"),
    ({}, {"tokens": torch.zeros(6, 4)}, r"tokens: expected a tensor \(B, L, D\), got \(6, 4\)"),
    ({}, {"mask": torch.ones(6, 4, dtype=torch.bool)}, r"mask: expected .* = \(6, 13\)"),
    ({}, {"mask": torch.ones(6, 13)}, "mask: expected a bool tensor"),
    ({}, {"anchor": 13}, "anchor: expected a position from 0 to 12, got 13"),
    ({}, {"anchor": torch.zeros(5).long()}, r"anchor: expected .* \(B,\) = \(6,\)"),
    ({}, {"scores": None}, "scores: expected .* for strategy='learned', got None; elip_kernels"),
    ({}, {"scores": torch.zeros(6, 4)}, r"scores: expected \(B, L\) = \(6, 13\)"),
]


@pytest.mark.parametrize(("settings", "changed", "message"), BAD, ids=[m for *_, m in BAD])
def test_bad_arguments(settings, changed, message):
    names = ("tokens", "mask", "anchor", "scores")
    arguments = dict(zip(names, texts(), strict=True)) | changed
    with pytest.raises((TypeError, ValueError), match=message):
        TextReduction(**({"strategy": "learned"} | settings))(**arguments)


TINY = {
    "image_size": 32,
    "vision_width": 24,
    "vision_heads": 2,
    "text_width": 16,
    "text_heads": 2,
    "text_depth": 4,
    "vocab_size": 64,
    "context_length": 10,
    "embed_dim": 12,
}


def tiny(strategy=None, **overrides):
    torch.manual_seed(1)
    overrides = TINY | overrides
    return elip_models.create_model("elip_clip_tiny", text_reduction=strategy, **overrides)


def batch():
    input_ids = torch.randint(3, 64, (4, 10))
    mask = torch.arange(10) < torch.tensor([10, 7, 2, 1])[:, None]
    input_ids[range(4), mask.sum(1) - 1] = 2
    return {"images": torch.randn(4, 3, 32, 32), "input_ids": input_ids, "attention_mask": mask}


def text_arguments(inputs):
    return inputs["input_ids"], inputs["attention_mask"]


@pytest.mark.parametrize("padded", ["right", "left", "unmarked"])
def test_dropping_nothing_is_the_text_tower_without_reduction(padded):
    inputs = batch()
    ids, mask = text_arguments(inputs)
    if padded == "left":
        order = mask.int().argsort(dim=1, stable=True)
        ids, mask = ids.gather(1, order), mask.gather(1, order)
    arguments = (ids,) if padded == "unmarked" else (ids, mask)
    dense = tiny().eval().encode_text(*arguments)
    model = tiny("post", text_drop=0.0).eval()
    torch.testing.assert_close(model.encode_text(*arguments), dense)
    model = tiny("post").eval()
    assert torch.equal(model.encode_text(*arguments, reduce=False), dense)
    assert not torch.allclose(model.encode_text(*arguments), dense)


def test_tokens_after_eos_are_padding_without_a_mask():
    model, (ids, mask) = tiny("post").eval(), text_arguments(batch())
    torch.testing.assert_close(model.encode_text(ids), model.encode_text(ids, mask))


def test_first_half_runs_whole_and_the_other_on_the_kept_tokens():
    model, inputs = tiny("post").eval(), batch()
    ids, mask = text_arguments(inputs)
    tower, places = model.text.transformer, torch.arange(10)
    for row, n in enumerate(mask.sum(1).tolist()):
        hidden = tower.embeddings(ids[row : row + 1, :n])
        stays = [*places[: n - int(0.4 * n) - 1], n - 1]
        for i, layer in enumerate(tower.encoder.layers):
            hidden = hidden[:, stays] if i == 2 else hidden
            N = hidden.shape[1]
            hidden = layer(hidden, torch.ones(1, 1, N, N, dtype=torch.bool).tril())
        expected = tower.final_layer_norm(hidden)[0, -1]
        torch.testing.assert_close(model.text(ids, mask)[row], expected)


def test_the_image_decides_what_learned_drops():
    model, inputs = tiny("learned").eval(), batch()
    ids, mask = text_arguments(inputs)
    image_cls = torch.randn(4, 16, requires_grad=True)
    seen = {}
    reduction = model.text.reduction

    def spy(hidden, real, anchor, scores):
        seen.update(hidden=hidden, scores=scores, kept=reduction(hidden, real, anchor, scores).kept)
        return reduction(hidden, real, anchor, scores)

    model.text.reduction = Mock(side_effect=spy, strategy="learned")
    model.text(ids, mask, image_cls=image_cls).sum().backward()
    assert image_cls.grad is None
    layer = model.text.transformer.encoder.layers[2]
    q = layer.self_attn.q_proj(layer.layer_norm1(image_cls)).view(4, 2, 1, 8)
    k = layer.self_attn.k_proj(layer.layer_norm1(seen["hidden"])).view(4, 10, 2, 8).transpose(1, 2)
    row = (q @ k.mT * 8**-0.5).masked_fill(~mask[:, None, None], -torch.inf).softmax(-1)
    torch.testing.assert_close(seen["scores"], row[:, :, 0].mean(1))
    kept = seen["kept"]
    model.text(ids, mask, image_cls=-image_cls)
    assert not torch.equal(seen["kept"][0], kept[0])


def test_clip_guides_the_text_by_its_image_with_learned():
    model, inputs = tiny("learned", scorer="last").eval(), batch()
    text = text_arguments(inputs)
    image_features = model.encode_image(inputs["images"], reduce=False)
    expected = model.encode_text(*text, image_features=image_features)
    out = model(**inputs)
    torch.testing.assert_close(out.text_features, expected)
    assert torch.equal(out.image_features, model.encode_image(inputs["images"], out.text_features))
    image_cls = image_features @ model.text_projection.weight
    text_cls = model.text_projection(model.text(*text, image_cls=image_cls))
    torch.testing.assert_close(expected, torch.nn.functional.normalize(text_cls, dim=-1))


def test_texts_without_images_keep_all_tokens_with_learned():
    model, text = tiny("learned").eval(), text_arguments(batch())
    warn_once.cache_clear()
    with pytest.warns(UnguidedWarning, match="no image guidance"):
        features = model.encode_text(*text)
    assert torch.equal(features, tiny().eval().encode_text(*text))


def test_learned_without_guidance_raises():
    model, text = tiny("learned"), text_arguments(batch())
    with pytest.raises(TypeError, match=r"image_cls: expected .* got None; pass the image CLS"):
        model.text(*text)
    with pytest.raises(ValueError, match=r"image_cls: .*text_projection"):
        model.text(*text, image_cls=torch.zeros(4, 12))


@pytest.mark.parametrize("strategy", tiered(get_args(TextStrategy), [], slow=["random"]))
def test_clip_learns_and_checkpointing_gives_the_same_gradients(strategy):
    model, inputs = tiny(strategy), batch()
    grads = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(5)
        loss = model(**inputs).loss
        torch.manual_seed(6)
        loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = [loss.item()]
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_every_weight_trains_under_autocast_with_learned():
    model = tiny("learned")
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch()).loss
    loss.backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]


@pytest.mark.slow
def test_clip_compiles_whole():
    torch._dynamo.reset()
    model, inputs = (
        tiny("learned", text_depth=2, vision_depth=2, schedule="1(100%) 1(50%)"),
        batch(),
    )
    expected = model(**inputs).loss
    got = torch.compile(model, fullgraph=True, backend="eager")(**inputs).loss
    torch.testing.assert_close(got, expected)


def test_the_second_half_costs_in_proportion():
    flops = {}
    for strategy in (None, "post"):
        model = tiny(strategy, context_length=20).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.encode_text(torch.full((2, 20), 2))
        flops[strategy] = counter.get_total_flops()
    assert 0.75 < flops["post"] / flops[None] < 0.82  # half of the layers at 60%, projection aside


def test_save_and_load_keep_the_settings_and_older_configs_load(tmp_path):
    model, inputs = tiny("post", text_drop=0.3).eval(), batch()
    assert model.state_dict().keys() == tiny().state_dict().keys()
    model.save_pretrained(tmp_path)
    loaded = clip.CLIP.from_pretrained(tmp_path).eval()
    assert (loaded.config.text_reduction, loaded.config.text_drop) == ("post", 0.3)
    assert torch.equal(loaded(**inputs).loss, model(**inputs).loss)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["text_reduction"], config["text_drop"]
    path.write_text(json.dumps(config))
    assert clip.CLIP.from_pretrained(tmp_path).text.reduction is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"text_reduction": "last"},
            "text_reduction: expected one of 'random', .* or None",
        ),
        ({"text_reduction": "post", "text_drop": 1.0}, "text_drop: expected a number in"),
    ],
)
def test_bad_settings_of_a_model(overrides, message):
    with pytest.raises(ValueError, match=message):
        elip_models.create_model("elip_clip_tiny", **overrides)


@pytest.mark.parametrize("strategy", tiered(["random", "learned"], ["learned"], slow=["random"]))
def test_a_recipe_trains_with_it_and_evaluation_draws_nothing(strategy, tmp_path):
    overrides = [f"model.overrides.{key}" for key in (f"text_reduction={strategy}", "text_depth=2")]
    with own_process():
        result = train(tiny_config(tmp_path / "run", *overrides))
    assert result.model.text.reduction == TextReduction(strategy)
    assert math.isfinite(result.loss)
    before = torch.get_rng_state()
    Retrieval(candidates=0).evaluate(result.model, result.tokenizer, result.eval_source)
    assert torch.equal(torch.get_rng_state(), before)
