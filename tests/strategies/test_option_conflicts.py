"""Options that contradict each other, or that the strategy does not have, raise an error."""

import pytest
import torch

import elip_models
from elip_models import (
    ELIP,
    EViT,
    ImageResize,
    encode_image,
    reduce_,
    reduction_summary,
)
from elip_models.strategies import STRATEGIES
from elip_models.user_warnings import warn_again
from tests.helpers.towers import SCHEDULE, images, plain_vit, text


def encode(model, **options):
    return encode_image(model, images(), **options)


BOTH = pytest.mark.parametrize("call", [reduce_, encode], ids=["reduce_", "encode_image"])


# merge


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


def test_a_text_that_the_default_ignores_is_warned_about(recwarn):
    warn_again()
    model, x, t = plain_vit(), images(), text()
    ignored = encode_image(model, x, t)
    (found,) = (each for each in recwarn if "text_cls is ignored" in str(each.message))
    assert found.category is elip_models.UnguidedWarning and found.filename == __file__
    assert torch.equal(ignored, encode_image(model, x))
