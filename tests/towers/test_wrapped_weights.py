"""LoRA counts in every scorer and strategy, before and after `reduce_`.

An adapted model returns what its merged copy returns: `merge_and_unload`, then `reduce_`.
"""

import copy
import itertools

import pytest
import torch
import transformers
from peft import IA3Config, LoHaConfig, LoraConfig, get_peft_model
from torch import nn

import elip_models
from tests.helpers.models import (
    HF,
    dinov2,
    enlarged,
    eva,
    hf_clip,
    ids,
    open_clip_pair,
    open_clip_vit,
    output,
)
from tests.helpers.own_warnings import UNGUIDED
from tests.helpers.tiers import slow_except, tiered
from tests.helpers.towers import SCHEDULE, images, plain_vit, text

MODELS = {
    "timm": (plain_vit, ["qkv", "attn.proj", "fc1", "fc2"]),
    "timm q/k norm": (lambda: plain_vit(qk_norm=True), ["qkv"]),
    "timm registers": (lambda: plain_vit(reg_tokens=3), ["qkv"]),
    "Eva": (lambda: eva(qkv_fused=False, swiglu_mlp=True), ["q_proj", "k_proj", "v_proj"]),
    "Eva rope": (lambda: eva(attn_type="rope", use_rot_pos_emb=False), ["qkv"]),
    "open_clip": (open_clip_vit, ["attn"]),
    "HF ViT": (
        lambda: enlarged(transformers.ViTForImageClassification(transformers.ViTConfig(**HF))),
        ["q_proj", "k_proj"],
    ),
    "HF BLIP": (
        lambda: enlarged(transformers.BlipVisionModel(transformers.BlipVisionConfig(**HF))),
        ["qkv", "projection"],
    ),
    "HF DINOv2": (dinov2, ["q_proj", "o_proj", "fc1"]),
}
ORDERS = ("reduce first", "adapt first")
SCORERS = ("official", "exact", "cls", "last", 1)
TOME, EVIT = {"strategy": elip_models.ToMe(r=3)}, {"strategy": elip_models.EViT(keep_ratio=0.7)}


def elip(scorer):
    return {"schedule": SCHEDULE, "scorer": scorer}


def adapted(model, order, how, config):
    """Return the reduced model inside peft's, with adapters of large weights."""
    if order == "reduce first":
        elip_models.reduce_(model, **how)
    wrapped = get_peft_model(model, config)
    return wrapped if order == "reduce first" else elip_models.reduce_(wrapped, **how)


def merged(model, how, unload="merge_and_unload"):
    """Return a reduced copy without adapters."""
    copied = elip_models.unreduce_(copy.deepcopy(model))
    return elip_models.reduce_(getattr(copied, unload)(), **how)


def lora(targets=("qkv",), **options):
    return LoraConfig(target_modules=list(targets), init_lora_weights=False, **options)


def assert_equal_outputs(got, expected, x=None, t=None):
    x, t = images() if x is None else x, text() if t is None else t
    guided = elip_models.guidance
    for mode in (True, False):
        with guided(got, t), guided(expected, t):
            a, b = output(got.train(mode), x), output(expected.train(mode), x)
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()
    return b


def scored():
    """Return cases: one model of each library with every scorer, the others with two scorers."""
    for name in MODELS:
        scorers = SCORERS if name in ("timm", "Eva", "open_clip", "HF ViT") else ("cls", "last")
        yield from ((name, scorer) for scorer in scorers)


EVERY = list(scored())


@pytest.mark.parametrize("order", tiered(ORDERS, ORDERS[:1]))
@pytest.mark.parametrize(
    ("name", "scorer"),
    tiered(
        EVERY,
        [("timm", "cls"), ("timm", "last"), ("open_clip", "last")],
    ),
)
def test_lora_counts_as_its_merged_weight(name, scorer, order):
    make, targets = MODELS[name]
    model, how = make(), elip(scorer)
    base = elip_models.reduce_(copy.deepcopy(model), **how)
    model = adapted(model, order, how, lora(targets))
    x, t = images(), text()
    out = assert_equal_outputs(model, merged(model, how), x, t)
    with elip_models.guidance(base, t):
        assert not torch.allclose(output(base.eval(), x), out, atol=1e-2)


OTHERS = {
    "tome": TOME,
    "evit": EVIT,
    "evit without gradient": {
        "strategy": elip_models.EViT(keep_ratio=0.7, attention_gradient=False)
    },
    "trips": {"strategy": "trips", "schedule": SCHEDULE},
    "nearest": {"schedule": SCHEDULE, "merge": "nearest"},
}


@UNGUIDED
@pytest.mark.parametrize(
    ("strategy", "name", "order"),
    tiered(
        itertools.product(OTHERS, ("timm", "open_clip"), ORDERS),
        [(strategy, "timm", ORDERS[0]) for strategy in OTHERS],
    ),
)
def test_lora_counts_in_other_strategies(strategy, name, order):
    (make, targets), how = MODELS[name], OTHERS[strategy]
    model = adapted(make(), order, how, lora(targets))
    assert_equal_outputs(model, merged(model, how))


HOW = {"elip": elip("last"), "evit": EVIT, "tome": TOME}
TRAINED = [(name, how) for name in MODELS for how in HOW]
TRAINED = tiered(TRAINED, [case for case in TRAINED if case[0] == "timm"])


@UNGUIDED
@pytest.mark.parametrize(("name", "how"), TRAINED)
def test_its_gradient_is_that_of_the_merged_weight(name, how):
    how = HOW[how]
    make, targets = MODELS[name]
    model = adapted(make(), "reduce first", how, lora(targets))
    whole, x, t = merged(model, how), images(), text()
    weigh = torch.randn_like(output(whole, x))
    for each in (model.train(), whole.train().requires_grad_()):
        with elip_models.guidance(each, t):
            (output(each, x) * weigh).sum().backward()
    layers = {n: m for n, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")}
    assert layers
    for path, layer in layers.items():
        path = path.replace(".base_layer", "")
        inner, name = whole.get_submodule(path), "weight"
        if isinstance(inner, nn.MultiheadAttention):
            name = "in_proj_weight"
        gradient, scale = getattr(inner, name).grad, layer.scaling["default"]
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        close = {"rtol": 1e-4, "atol": 1e-5 * float(gradient.abs().max())}
        torch.testing.assert_close(b.grad, scale * gradient @ a.T, **close)
        torch.testing.assert_close(a.grad, scale * b.T @ gradient, **close)
        assert b.grad.any()


def perturbed(model):
    with torch.no_grad():
        for weight in (p for p in model.parameters() if p.requires_grad):
            weight.add_(0.3 * torch.randn_like(weight))
    return model


KINDS = {
    "rsLoRA": lora(use_rslora=True, r=4),
    "DoRA": lora(use_dora=True),
    "LoRA with a bias": lora(lora_bias=True),
    "a trained norm": lora(modules_to_save=["norm1"]),
    "a trained projection": LoraConfig(target_modules=["attn.proj"], modules_to_save=["qkv"]),
    "LoHa": LoHaConfig(target_modules=["qkv"]),
    "IA3": IA3Config(target_modules=["qkv"], feedforward_modules=[]),
}


@pytest.mark.parametrize("order", tiered(ORDERS, ORDERS[:1]))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scorer", tiered(["cls", "last"], ["last"]))
def test_other_kinds_count_as_merged(kind, scorer, order):
    """Run in fp64, because large adapters round to more than the bound in fp32."""
    how = elip(scorer)
    model = perturbed(adapted(plain_vit(), order, how, KINDS[kind])).double()
    assert_equal_outputs(model, merged(model, how), images().double(), text().double())


def second(model, targets, active=("default", "second")):
    model.add_adapter("second", lora(targets))
    model.base_model.set_adapter(list(active))


def scaled(model, targets):
    for layer in (m for m in model.modules() if hasattr(m, "scale_layer")):
        layer.scale_layer(0.5)


def merged_then_disabled(model, targets):
    model.merge_adapter()
    model.disable_adapter_layers()


STATES = {
    "two active": second,
    "the second alone": lambda model, targets: second(model, targets, ["second"]),
    "scaled": scaled,
    "merged": lambda model, targets: model.merge_adapter(),
    "disabled": lambda model, targets: model.disable_adapter_layers(),
    "merged, then disabled": merged_then_disabled,
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", tiered(["timm", "timm, DoRA", "open_clip"], ["timm"]))
@pytest.mark.parametrize(
    "how", slow_except([elip("last")], [elip("last"), TOME]), ids=["last", "tome"]
)
def test_the_active_adapter_counts(name, state, how):
    make, targets = MODELS[name.split(",")[0]]
    config = lora(targets, use_dora="DoRA" in name)
    model = perturbed(adapted(make(), "reduce first", how, config))
    model.eval()(images())  # reads the layers: nothing of it may stay
    expected = merged(model, how, "unload" if "disabled" in state else "merge_and_unload")
    STATES[state](model, targets)
    if "merged" not in state and "disabled" not in state:
        expected = merged(model, how)
    assert_equal_outputs(model, expected)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("make", [hf_clip, open_clip_pair])
def test_a_whole_model_guides_itself_by_its_adapted_text(make, order):
    targets = ["q_proj", "k_proj"] if make is hf_clip else r"visual.*\.attn"
    config = LoraConfig(target_modules=targets, init_lora_weights=False)
    model = adapted(enlarged(make()), order, elip("last"), config).eval()
    whole, tokens, x = merged(model, elip("last")), ids(), images()
    arguments = {"input_ids": tokens, "pixel_values": x} if make is hf_clip else {}
    positional = () if arguments else (x, tokens)
    outputs = []
    for each in (model, whole.eval()):
        with elip_models.guidance(each, paired=True):
            outputs.append(each(*positional, **arguments))
    got, expected = outputs
    name = "image_embeds" if make is hf_clip else "image_features"
    torch.testing.assert_close(got[name], expected[name], atol=1e-5, rtol=1e-5)
