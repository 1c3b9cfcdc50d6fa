"""`config.elip` of transformers: `reduce_` sets it and `unreduce_` removes it."""

import json

import torch
import transformers

import elip_models
from elip_models import TokenMerging, ToMe, is_reduced, reduction_summary
from tests.helpers.models import hf_clip
from tests.helpers.own_warnings import UNGUIDED
from tests.helpers.towers import SCHEDULE
from tests.saving.test_saved_reduced import features


@UNGUIDED
def test_save_pretrained_stores_the_strategy_until_unreduce_removes_it(tmp_path):
    model = elip_models.reduce_(hf_clip().eval(), schedule=SCHEDULE)
    model.save_pretrained(tmp_path / "reduced")
    assert torch.equal(features(elip_models.load_reduced(tmp_path / "reduced")), features(model))
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "reduced")
    assert loaded.config.elip["strategy"] == "elip" and not is_reduced(loaded)
    assert not hasattr(elip_models.unreduce_(loaded).config, "elip")
    elip_models.unreduce_(model).save_pretrained(tmp_path / "dense")
    assert "elip" not in json.loads((tmp_path / "dense" / "config.json").read_text())


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
