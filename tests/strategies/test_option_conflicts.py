"""Options that contradict each other, or that the strategy does not have, raise an error."""

import functools

import pytest
import torch

import elip_models
from elip_models import (
    ELIP,
    EViT,
    ImageResize,
    create_model,
    encode_image,
    reduce_,
    reduction_summary,
)
from elip_models.analysis.visualize_inputs import open_visualized_model
from elip_models.integrations.open_clip import parse_reduce
from elip_models.profiling.table import ProfileSettings
from elip_models.strategies import STRATEGIES
from elip_models.strategies.serialization import settings_of, strategy_of
from elip_models.user_warnings import warn_again
from elip_models.validation import ConfigError
from tests.helpers.towers import SCHEDULE, images, plain_vit, text


def encode(model, **options):
    return encode_image(model, images(), **options)


BOTH = pytest.mark.parametrize("call", [reduce_, encode], ids=["reduce_", "encode_image"])


# merge


@pytest.mark.parametrize(("value", "word"), [(True, "one"), (False, "none")])
@pytest.mark.parametrize(
    "make",
    [
        lambda merge: ELIP(merge=merge),
        lambda merge: create_model("elip_clip_tiny", merge=merge),
        lambda merge: strategy_of(
            (stored := settings_of(ELIP("clip")))
            | {"settings": stored["settings"] | {"merge": merge}}
        ),
    ],
)
def test_a_bool_is_refused_and_the_word_for_it_is_named(make, value, word):
    message = f"merge: expected 'one', 'none' or 'nearest', got {value}; pass '{word}'"
    with pytest.raises((TypeError, ValueError), match=message):
        make(value)


# keep beside the strategy's own option


@BOTH
@pytest.mark.parametrize(
    ("options", "other"),
    [
        ({"strategy": "patch_dropout:keep_ratio=0.5"}, "keep_ratio=0.5"),
        ({"strategy": "tome:r=8"}, "r=8"),
        ({"strategy": EViT(keep_ratio=0.6)}, "keep_ratio=0.6"),
        ({"strategy": ImageResize(32)}, "size=32"),
        ({"schedule": SCHEDULE}, f"schedule='{SCHEDULE}'"),
        ({"strategy": ELIP(SCHEDULE)}, f"schedule='{SCHEDULE}'"),
    ],
    ids=str,
)
def test_keep_beside_the_strategys_own_option_names_both(call, options, other):
    with pytest.raises(ValueError, match=r"keep: expected no .* got keep=0.7 and ") as error:
        call(plain_vit(), keep=0.7, **options)
    assert other in str(error.value)


def test_every_strategy_names_the_field_that_keep_sets():
    for cls in STRATEGIES.values():
        model = plain_vit()
        found, default = cls().at_keep(model, 0.7), cls()
        changed = {name for name in vars(found) if vars(found)[name] != vars(default)[name]}
        assert cls.keep_field in changed <= {cls.keep_field, "without_text", "size"}


SHARE = {"keep": None, "flops": 0.7}


def test_the_command_line_refuses_both_too():
    settings = {"models": (), "flops": None, "batch_sizes": (1,), "mode": "both", "dtype": "fp32"}
    settings |= {"rounds": None, "keep": 0.7}
    with pytest.raises(ConfigError, match=r"--strategy: keep: expected no r beside it"):
        ProfileSettings(strategies=("tome:r=8",), schedule=None, **settings)
    with pytest.raises(ConfigError, match=r"--strategy: flops: expected no r beside it"):
        ProfileSettings(strategies=("tome:r=8",), schedule=None, **settings | SHARE)
    with pytest.raises(ConfigError, match="--keep: expected it or --schedule"):
        ProfileSettings(strategies=(), schedule="clip", **settings)
    with pytest.raises(ValueError, match="keep: expected no r beside it"):
        parse_reduce(["tome:r=8", "keep=0.7"])
    for options in ({"strategy": "tome:r=8"}, {"schedule": "clip"}):
        with pytest.raises(ConfigError, match="--keep: expected no"):
            open_visualized_model("elip_clip_tiny", pretrained=False, keep=0.7, **options)


# an option without its strategy


@BOTH
@pytest.mark.parametrize(
    ("options", "has", "owners", "remedy"),
    [
        ({"scorer": "exact"}, "has no such option", "'elip', 'trips'", "'elip'"),
        (
            {"fusion": 0.5, "keep": 0.7},
            "has no such option",
            "'guided_tome', 'elip', 'trips'",
            "'guided_tome'",
        ),
        (
            {"r": 8},
            "is set by keep alone",
            "'resize_merge', 'merge', 'tome', 'guided_tome'",
            "'tome', or keep in its place",
        ),
    ],
    ids=str,
)
def test_an_option_without_a_strategy_names_those_that_have_it(call, options, has, owners, remedy):
    name = next(iter(options))
    start = f"{name}: expected a strategy beside it, since the default, 'merge', {has}, got {name}="
    with pytest.raises(ValueError, match=start) as error:
        call(plain_vit(), **options)
    assert str(error.value).endswith(f"strategies with it: {owners}. Pass strategy={remedy}")


@BOTH
@pytest.mark.parametrize(
    ("options", "close"),
    [
        ({"kep": 0.7}, "keep"),
        ({"strategy": "elip", "scorr": "last"}, "scorer"),
        ({"strategy": "evit:keep_rate=0.7"}, "keep_ratio"),
    ],
    ids=str,
)
def test_an_unknown_option_names_the_closest_one(call, options, close):
    with pytest.raises(ValueError, match=f"did you mean '{close}'"):
        call(plain_vit(), **options)


def test_a_schedule_means_elip_and_takes_its_options():
    options = {"schedule": SCHEDULE, "scorer": "exact", "fusion": 0.5, "merge": "none"}
    model, x, t = plain_vit(), images(), text()
    tokens = encode_image(model, x, t, **options)
    expected = ELIP(**options, without_text="vision")
    assert torch.equal(tokens, encode_image(model, x, t, strategy=expected))
    assert reduction_summary(reduce_(model, **options)).strategy == expected


# the default strategy


def replaced_block():
    model = plain_vit()
    model.blocks[3].forward = functools.partial(type(model.blocks[3]).forward, model.blocks[3])
    return model


@BOTH
def test_another_strategy_than_the_default_is_named_once(call, recwarn):
    warn_again()
    for _ in range(2):
        call(replaced_block())
    (found,) = (each for each in recwarn if "default strategy" in str(each.message))
    message = str(found.message)
    assert "using 'elip' in place of 'merge', the default strategy, on this Vision" in message
    assert "a block was replaced" in message and "Pass strategy='elip'" in message
    assert found.filename == __file__
    recwarn.clear()
    warn_again()
    call(replaced_block(), strategy="elip")
    assert not [each for each in recwarn if "default strategy" in str(each.message)]


def test_a_text_that_the_default_ignores_is_warned_about(recwarn):
    warn_again()
    model, x, t = plain_vit(), images(), text()
    ignored = encode_image(model, x, t)
    (found,) = (each for each in recwarn if "text_cls is ignored" in str(each.message))
    assert found.category is elip_models.UnguidedWarning and found.filename == __file__
    assert torch.equal(ignored, encode_image(model, x))
