"""Adapters in models of ours are saved beside plain weights, and loaded by us or by peft itself."""

import copy
import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import elip_models
from elip_models.integrations.peft.adapt import adapt_
from elip_models.integrations.peft.saved_adapter import load_adapter_, save_adapter
from tests.helpers.cross_modal_cases import losses
from tests.helpers.weights import assert_equal_weights
from tests.integrations.test_peft import (
    CASES,
    FAMILIES,
    adapted,
    config,
    inputs_of,
    perturbed,
    plain,
)


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_a_saved_adapter_gives_equal_outputs_on_the_plain_model(family, kind, tmp_path):
    model, inputs = plain(family).eval(), inputs_of(family)
    other = copy.deepcopy(model)
    perturbed(adapt_(model, config(kind)))
    save_adapter(model, tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert not [name for name in saved if "base_layer" in name]
    load_adapter_(other, tmp_path)
    assert torch.equal(losses(other(**inputs)), losses(model(**inputs)))
    assert other.state_dict().keys() == model.state_dict().keys()
    assert other.adapted == model.adapted


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")  # other names of what is shared
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_itself_reads_a_saved_lora(family, tmp_path):
    model, inputs = plain(family).eval(), inputs_of(family)
    other = copy.deepcopy(model)
    perturbed(adapt_(model, config("lora")))
    with torch.no_grad():
        for name in ("temperature", "logit_scale"):
            getattr(model, name, torch.zeros(())).mul_(1.1)
    wrapped = PeftModel.from_pretrained(other, save_adapter(model, tmp_path)).double()
    assert torch.equal(losses(wrapped(**inputs)), losses(model(**inputs)))


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_a_saved_model_keeps_its_adapters_beside_plain_weights(family, kind, tmp_path):
    names = list(plain(family).state_dict())
    model = adapted(family, kind).float()
    folder = model.save_pretrained(tmp_path / "model")
    assert load_file(folder / "model.safetensors").keys() <= set(names)
    loaded = type(model).from_pretrained(folder).double().eval()
    inputs = inputs_of(family)
    assert torch.equal(losses(loaded(**inputs)), losses(model.double().eval()(**inputs)))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == trained
    again = elip_models.create_model(f"hf:{folder}", scorer="exact")
    assert again.config.scorer == "exact"
    assert_equal_weights(model.float(), again)


@pytest.mark.parametrize(("kind", "field"), [("lora", "r"), ("adapter", "width")])
def test_the_rank_is_held_to_the_file_before_memory_is_taken(kind, field, tmp_path):
    folder = adapted("clip", kind).float().save_pretrained(tmp_path)
    path = folder / "adapter.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: 10**9}))
    with pytest.raises(ValueError, match=f"{path}: {field}: expected the first size in .* got 10"):
        elip_models.create_model(f"hf:{folder}")
