"""Our models are loaded by name from the hub, and have a model card of their cost."""

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

import elip_models
from elip_models.embedding.encoder import open_embedding_model
from elip_models.pretraining.models.clip.model import CLIP
from elip_models.pretraining.models.registry import create_model, load_model
from elip_models.saving.open_model import open_model
from tests.helpers.models import hf_clip
from tests.helpers.tiers import first_quick

NAMES = ["clip_tiny", "elip_clip_tiny", "elip_albef_tiny", "elip_blip_tiny", "elip_meter_tiny"]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Return a function that saves a model into the cache of the hub's client; it is offline."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def put(model, name="me/model", revision="main"):
        place = tmp_path / "cache" / f"models--{name.replace('/', '--')}"
        model.save_pretrained(place / "snapshots" / ("0" * 40))
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / revision).write_text("0" * 40)
        return name

    return put


@pytest.mark.parametrize("name", first_quick(NAMES))
def test_the_card_has_tokens_flops_and_usage(name, tmp_path):
    model = create_model(name)
    model.save_pretrained(tmp_path)
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "elip-kernels"
    assert {"elip", "model_hub_mixin", "token-reduction"} <= set(card.data.tags)
    assert 'elip_models.create_model("hf:owner/name")' in card.text
    rows = [line for line in card.text.splitlines() if line.startswith("| `")]
    assert rows[0].startswith("| `dense()` | 65, ")
    assert len(rows) == (2 if name.startswith("elip_") else 1)
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize("is_offline", [True, False])
def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch, is_offline):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", is_offline)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        ConnectionError, match=r"127\.0\.0\.1|repo_id: .* 'me/model'; save"
    ) as raised:
        create_model("elip_clip_tiny").push_to_hub("me/model", token="hf_none")
    assert "\n" not in str(raised.value)
    with pytest.raises(FileNotFoundError, match="'owner/name' of a hub repository") as raised:
        elip_models.load_reduced("me/model")
    assert "\n" not in str(raised.value)


WAYS = {
    "CLIP.from_pretrained": CLIP.from_pretrained,
    "create_model": lambda name: create_model(f"hf:{name}"),
    "create_model, weights": lambda name: create_model("elip_clip_tiny", name),
    "load_model": load_model,
    "open_model": lambda name: open_model(f"hf:{name}"),
    "open_model without hf:": open_model,
    "load_reduced": elip_models.load_reduced,
    "embed": lambda name: open_embedding_model(f"hf:{name}", True)[0],
}


@pytest.mark.parametrize("way", WAYS)
def test_a_repository_is_loaded_by_name(way, hub):
    model = create_model("elip_clip_tiny", scorer="last")
    again = WAYS[way](hub(model))
    assert again.config == model.config
    assert torch.equal(again.visual.pos_embed, model.visual.pos_embed)


def test_a_reduced_model_of_another_library_is_loaded_by_name(hub):
    model = elip_models.reduce_(hf_clip(), strategy="tome")
    other = elip_models.load_reduced(hub(model))
    assert other.config.elip == model.config.elip
    assert torch.equal(other.logit_scale, model.logit_scale)
