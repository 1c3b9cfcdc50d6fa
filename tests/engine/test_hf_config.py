"""`config.elip` of transformers: `reduce_` sets it and `unreduce_` removes it."""

import json

import pytest
import torch
import transformers

import elip_models
from elip_models import TokenMerging, ToMe, is_reduced, reduction_summary
from elip_models.user_warnings import warn_again
from tests.helpers.models import hf_clip, hf_vision
from tests.helpers.own_warnings import DENSE_BY_TRANSFORMERS, UNGUIDED
from tests.helpers.towers import SCHEDULE
from tests.saving.test_saved_reduced import features


@UNGUIDED
@DENSE_BY_TRANSFORMERS
def test_save_pretrained_stores_the_strategy_until_unreduce_removes_it(tmp_path):
    model = elip_models.reduce_(hf_clip().eval(), schedule=SCHEDULE)
    model.save_pretrained(tmp_path / "reduced")
    assert torch.equal(features(elip_models.load_reduced(tmp_path / "reduced")), features(model))
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "reduced")
    assert loaded.config.elip["strategy"] == "elip" and not is_reduced(loaded)
    assert not hasattr(elip_models.unreduce_(loaded).config, "elip")
    elip_models.unreduce_(model).save_pretrained(tmp_path / "dense")
    assert "elip" not in json.loads((tmp_path / "dense" / "config.json").read_text())


@pytest.mark.parametrize("make", [hf_clip, lambda: hf_vision("ViTModel", "ViTConfig")])
def test_a_dense_model_of_a_config_with_a_reduction_warns_once(make, tmp_path, recwarn):
    warn_again()
    elip_models.reduce_(make()).save_pretrained(tmp_path)
    elip_models.load_reduced(tmp_path)
    assert not recwarn.list
    for _ in range(2):
        model = transformers.AutoModel.from_pretrained(tmp_path)
    warning = recwarn.pop(UserWarning)
    assert "the model is dense; call elip_models.reduce_(model), or load" in str(warning.message)
    warn_again()
    elip_models.reduce_(model).classifier = torch.nn.Linear(2, 2)
    assert not recwarn.list


@DENSE_BY_TRANSFORMERS
def test_a_call_without_arguments_uses_the_stored_strategy(tmp_path):
    elip_models.reduce_(hf_clip(), strategy=ToMe(r=2)).save_pretrained(tmp_path)
    model = elip_models.reduce_(transformers.AutoModel.from_pretrained(tmp_path))
    assert reduction_summary(model).strategy == ToMe(r=2)
    assert reduction_summary(elip_models.reduce_(model)).strategy == TokenMerging().at_keep(
        model, 0.7
    )
    model = transformers.AutoModel.from_pretrained(tmp_path)
    expected = TokenMerging().at_keep(model, 0.8)
    assert reduction_summary(elip_models.reduce_(model, keep=0.8)).strategy == expected
