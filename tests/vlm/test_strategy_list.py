"""`list_strategies` and `elip strategies`: every strategy, where it acts, and why it cannot."""

from dataclasses import fields

import pytest
import timm

import elip_models
from elip_models import LANGUAGE_STRATEGIES, STRATEGIES
from elip_models.strategies.flops import DEFAULT_KEEP
from elip_models.strategies.spec import StrategyOptions
from tests.helpers.models import siglip_vision
from tests.helpers.tiers import slow_except
from tests.helpers.tiny_run import elip
from tests.helpers.towers import plain_vit
from tests.vlm.configs import EAGER
from tests.vlm.models import build

SLOW = ["qwen2_5_vl_video", "lfm2_vl", "llama4", "gemma3n"]
QUICK = ["llava", "qwen2_5_vl", "gemma3", "idefics2", "internvl", "paligemma"]
GUIDED = {"guided_tome", "elip", "trips", "cdpruner", "fastv", "pyramid"}


def reasons(model):
    entries = elip_models.list_strategies(model)
    return {entry.name: entry.why_unsupported for entry in entries if entry.why_unsupported}


def test_type_checkers_know_the_options_of_every_strategy():
    strategies = (STRATEGIES | LANGUAGE_STRATEGIES).values()
    options = {field.name for strategy in strategies for field in fields(strategy)}
    assert options - {"keep", "schedule"} == StrategyOptions.__annotations__.keys()


def test_the_list_has_every_strategy():
    entries = {entry.name: entry for entry in elip_models.list_strategies()}
    assert entries.keys() == STRATEGIES.keys() | LANGUAGE_STRATEGIES.keys()
    assert {name for name, entry in entries.items() if entry.is_guided} == GUIDED
    for name, entry in entries.items():
        own_keep = None if name == "dedup" else 0.5
        assert entry.keep == (DEFAULT_KEEP if name in STRATEGIES else own_keep)
        assert entry.place and entry.why_unsupported is None
        assert 1 <= len(entry.summary.split()) <= 10


def test_the_list_of_a_model_has_the_reasons():
    needs = dict.fromkeys(LANGUAGE_STRATEGIES, "it needs a multimodal language model")
    assert reasons(plain_vit()) == needs
    no_cls = {"evit": "the tower has no CLS token, whose attention selects and fuses"}
    assert reasons(siglip_vision()) == needs | no_cls
    reason = "its language model has a token for each patch of the image"
    grid = dict.fromkeys(("resize_merge", "resize"), reason)
    video = {"evs": "it has no clips of comparable frames: it reads images, or each frame as one"}
    tower = {
        "dedup": "its image tower needs every patch: it makes their positions in its embeddings, "
        "or joins them, by the grid of the whole image"
    }
    assert reasons(build("llava")[0]) == grid | video | tower
    with pytest.raises(TypeError, match="got ResNet"):
        elip_models.list_strategies(timm.create_model("resnet18"))


@pytest.mark.parametrize("name", slow_except(QUICK, [*QUICK, *SLOW]))
def test_a_strategy_of_a_language_model_has_a_reason_exactly_if_reduce_raises(name):
    try:
        model = build(name)[0]
    except ValueError as error:  # of transformers
        assert "scaled_dot_product_attention" in str(error) and name in EAGER
        model = build(name, "eager")[0]
    for entry in elip_models.list_strategies(model):
        elip_models.unreduce_(model)
        if entry.why_unsupported is None:
            assert elip_models.is_reduced(elip_models.reduce_(model, entry.name))
            continue
        with pytest.raises((TypeError, ValueError)) as error:
            elip_models.reduce_(model, entry.name)
        assert entry.why_unsupported in str(error.value)
        assert not elip_models.is_reduced(model)


def test_the_command_gives_the_reasons_of_a_model(capsys):
    assert elip("strategies", "timm:vit_base_patch16_siglip_224") == 0
    printed = capsys.readouterr().out
    assert "not supported: evit: the tower has no CLS token" in printed and " merge " in printed
    assert "not supported: diverse, cdpruner" in printed
    assert elip("strategies", "timm:resnet18") == 2
    assert "error: MODEL: expected an image model" in capsys.readouterr().err
