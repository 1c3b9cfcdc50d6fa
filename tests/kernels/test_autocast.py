"""Token selection under autocast leaves no weight without gradient in the autocast cache."""

import pytest
import torch

import elip_models
from elip_models.towers import Tower, as_image_text
from tests.helpers.models import PAIRS, ROTARY, ids, output_of_pair
from tests.helpers.towers import SCHEDULE, images, plain_vit


@pytest.fixture(autouse=True)
def _cache():
    """The cache is on, as at the start; an export by TorchScript that fails leaves it off."""
    torch.set_autocast_cache_enabled(True)


@pytest.fixture
def cached(monkeypatch):
    """Return whether the cache was enabled, for each row and each block of a dry run."""
    seen = []

    def watch(name):
        method = getattr(Tower, name)

        def watched(self, *args, **kwargs):
            seen.append(torch.is_autocast_cache_enabled())
            return method(self, *args, **kwargs)

        monkeypatch.setattr(Tower, name, watched)

    for name in ("cls_attention", "run_block_without_hooks", "cls_block"):
        watch(name)
    return seen


@pytest.mark.parametrize(
    ("strategy", "scorer"), [("elip", "exact"), ("elip", "alternate"), ("elip", "cls")]
)
def test_a_scorer_leaves_none(cached, strategy, scorer):
    model = elip_models.reduce_(plain_vit(), schedule=SCHEDULE, strategy=strategy, scorer=scorer)
    with torch.autocast("cpu", torch.bfloat16):
        model(images())
        assert torch.is_autocast_cache_enabled()
    assert cached == [False] * 2  # two stages have a block to run


def test_the_generic_row_leaves_none(cached):
    model = elip_models.reduce_(ROTARY["DINOv3"](), schedule=SCHEDULE, scorer="last")
    with torch.autocast("cpu", torch.bfloat16):
        model(images())
    assert cached == [False] * 3


@pytest.mark.parametrize("name", PAIRS)
def test_the_guiding_text_leaves_none(name, monkeypatch):
    model, seen = PAIRS[name](), []
    adapter = type(as_image_text(model))
    original = adapter.text_cls

    def watched(self, *args, **kwargs):
        seen.append(torch.is_autocast_cache_enabled())
        return original(self, *args, **kwargs)

    monkeypatch.setattr(adapter, "text_cls", watched)
    elip_models.reduce_(model, schedule=SCHEDULE)
    with torch.autocast("cpu", torch.bfloat16):
        output_of_pair(model, images(), ids())
    assert seen == [False]
