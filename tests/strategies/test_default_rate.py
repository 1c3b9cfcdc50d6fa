"""One meaning of `keep` and one default rate for every strategy, and the list of all strategies."""

import re
from functools import cache

import pytest
import timm
import torch

import elip_models
from elip_models import (
    STRATEGIES,
    ToMe,
    create_model,
    encode_image,
    reduce_,
)
from elip_models.embedding.encoder import set_reduction
from elip_models.strategies.flops import DEFAULT_KEEP, kept_share
from elip_models.strategies.spec import fit_strategy, get_strategy, option_types
from elip_models.towers import as_tower
from elip_models.validation import ConfigError
from tests.helpers.tiers import first_quick
from tests.helpers.towers import images, plain_vit

MODELS = ("vit_base_patch16_224", "vit_large_patch16_224", "vit_small_patch14_dinov2")
every_strategy = pytest.mark.parametrize("name", STRATEGIES)


def on_meta(name):
    with torch.device("meta"):
        return timm.create_model(name)


@cache
def default_rate(model):
    return elip_models.reduction_summary(reduce_(on_meta(model))).keep


# the rate


@pytest.mark.parametrize("model", first_quick(MODELS))
@every_strategy
def test_every_strategy_has_the_rate_of_a_call_without_arguments(name, model):
    named, asked = on_meta(model), on_meta(model)
    rate = default_rate(model)
    summary = elip_models.reduction_summary(reduce_(named, name))
    one_token = 0.05 if name == "resize" else 2 / 197  # a row or column of patches
    assert summary.keep == pytest.approx(rate, abs=one_token)
    assert rate == pytest.approx(DEFAULT_KEEP, abs=2 / 197)
    reduce_(asked, name, keep=DEFAULT_KEEP)
    assert summary.strategy == elip_models.reduction_summary(asked).strategy


@every_strategy
def test_a_name_a_line_and_an_instance_have_the_same_rate(name):
    model = plain_vit()
    tower = as_tower(model)
    expected = elip_models.reduction_summary(reduce_(model, name)).strategy
    assert elip_models.reduction_summary(reduce_(model, STRATEGIES[name]())).strategy == expected
    assert fit_strategy(get_strategy(name), tower) == expected
    assert fit_strategy(expected, tower) == expected
    assert kept_share(STRATEGIES[name](), tower.size) == kept_share(expected, tower.size)


def test_a_strategy_that_cannot_reach_the_default_rate_raises():
    with pytest.raises(ValueError, match=r"keep: expected at least 0\.9.*got 0.7"):
        reduce_(plain_vit(), "evit:layers=5,")
    model = reduce_(plain_vit(), "evit:layers=5,", keep=0.95)
    assert elip_models.reduction_summary(model).keep == pytest.approx(0.95, abs=0.02)


def test_models_of_the_paper_keep_the_schedule_of_the_paper():
    for family, schedule in (("clip", "clip"), ("albef", "albef"), ("blip", "blip")):
        strategy = create_model(f"elip_{family}_tiny", schedule=schedule).reduction
        assert [ratio for _, ratio in strategy.schedule.groups] == [1.0, 0.9, 0.65, 0.4]
    merging = create_model("elip_clip_tiny", strategy="tome")
    assert merging.reduction == ToMe().at_keep(merging.tower, DEFAULT_KEEP)


# a share is a float


@pytest.mark.parametrize("keep", [1, 2, 0, -1])
@pytest.mark.parametrize(
    "call",
    [
        reduce_,
        lambda model, keep: encode_image(model, images(), keep=keep),
        lambda model, keep: ToMe().at_keep(model, keep),
        lambda model, keep: set_reduction(model, None, keep),
        lambda model, keep: elip_models.distill(model, images(8), keep=keep),
    ],
)
def test_an_integer_is_an_error_that_offers_a_float(call, keep):
    message = rf"^keep: expected a float in \(0, 1\], .* got the integer {keep}; pass "
    with pytest.raises((TypeError, ConfigError), match=message + ("1.0" if keep == 1 else "0.5")):
        call(plain_vit(), keep=keep)


@pytest.mark.parametrize("strategy", ["merge", "evit", "elip"])
def test_a_share_that_is_too_small_is_an_error_with_one_that_is_not(strategy):
    model = plain_vit()
    with pytest.raises(ValueError, match=r"^keep: .*got 0\.01; pass 0\.\d+ or more") as raised:
        reduce_(model, strategy, keep=0.01)
    assert "layers" not in str(raised.value).partition(";")[2] or strategy == "evit"
    reduce_(model, strategy, keep=float(re.search(r"pass (\S+)", str(raised.value))[1]))


# the default strategy


@pytest.mark.parametrize("keep", [None, 0.5])
def test_merge_is_tome_that_compares_tokens_and_keeps_norms(keep):
    model, x = plain_vit(), images()
    line = "tome:compare=tokens,keep_norm=true"
    expected = encode_image(model, x, strategy=line, keep=keep)
    assert torch.equal(encode_image(model, x, strategy="merge", keep=keep), expected)
    assert torch.equal(encode_image(model, x, keep=keep), expected)
    assert not torch.equal(encode_image(model, x, strategy="tome", keep=keep), expected)
    assert option_types("merge") == option_types("tome")
