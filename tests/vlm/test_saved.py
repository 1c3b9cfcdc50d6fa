"""A reduced language model keeps its strategies in its config, also behind save_pretrained."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForImageTextToText

import elip_models
from elip_models import is_reduced, reduce_, reduction_summary, unreduce_
from elip_models.strategies.serialization import settings_of
from elip_models.validation import ConfigError
from elip_models.vlm.strategies import LANGUAGE_STRATEGIES
from elip_models.vlm.strategies.controls import Stride
from elip_models.vlm.strategies.diverse import Diverse
from elip_models.vlm.strategies.layer_strategy import FastV
from tests.vlm.models import build


def places(model):
    """Return the strategies before the language model, inside it, and of the tower."""
    summary = reduction_summary(model)
    return summary.strategy, summary.inside, summary.tower and summary.tower.strategy


@pytest.fixture
def llava():
    return build("llava")


@torch.no_grad()
def test_all_strategies_are_saved_and_loaded(llava, tmp_path):
    model = llava[0].float()
    inputs = llava[1] | {"pixel_values": llava[1]["pixel_values"].float()}
    reduce_(model, "diverse:relevance=true", keep=5)
    reduce_(model, "tome", keep=0.7)
    reduce_(model, "fastv:layer=1", keep=0.25)
    expected = places(model)
    assert expected[:2] == (Diverse(relevance=True, keep=5), FastV(layer=1, keep=0.25))
    assert expected[2].name == "tome"
    model.save_pretrained(tmp_path)
    dense = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert not is_reduced(dense)
    assert places(reduce_(dense)) == expected
    loaded = elip_models.load_reduced(tmp_path)
    assert places(loaded) == expected
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    elip_models.save_reduced(model, tmp_path / "saved")
    assert places(elip_models.load_reduced(tmp_path / "saved")) == expected
    assert places(elip_models.load_reduced(tmp_path, strategy="stride"))[0] == Stride()


def test_a_call_with_arguments_replaces_what_is_stored(llava):
    model, _ = llava
    stored = reduce_(reduce_(copy.deepcopy(model), "tome", keep=0.7), "diverse").config.elip
    model.config.elip = stored
    assert places(reduce_(model, "stride"))[::2] == (Stride(), None)
    assert "strategy" not in model.config.elip
    unreduce_(model).config.elip = stored
    assert places(reduce_(model, keep=0.25)) == (Diverse(keep=0.25), None, None)
    assert reduction_summary(reduce_(model)).strategy == Diverse()  # of a reduced model: defaults


STRIDE = settings_of(Stride(), LANGUAGE_STRATEGIES)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"version": 99}, "version: expected at most 1"), ({"front": 1}, "front: expected keys")],
)
def test_settings_of_another_version_are_an_error(llava, tmp_path, change, message):
    reduce_(llava[0]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["elip"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message):
        elip_models.load_reduced(tmp_path)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ([{"version": 1, "strategy": "mine.Own", "settings": {}}], "strategy: expected one of div"),
        ({"strategy": "diverse"}, "language_model: expected a list"),
        ([], "language_model: expected one strategy before .* got 0 before and 0 inside"),
        ([STRIDE] * 5000, "language_model: expected one strategy before .* got 5000 before"),
    ],
)
def test_strategies_that_cannot_be_read_are_an_error(llava, tmp_path, saved, message):
    model, _ = llava
    reduce_(model).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["elip"]["language_model"] = saved
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message):
        elip_models.load_reduced(tmp_path)
    unreduce_(model).config.elip = config["elip"]
    with pytest.raises(ConfigError, match=f"LlavaConfig.elip: {message}"):
        reduce_(model)
    assert not is_reduced(model)
