"""Each public function of a reduction, with each kind of model: one façade for all of them."""

import pytest
import timm
import torch

import elip_models
from elip_models.api import strategies_in
from tests.helpers.models import hf_clip
from tests.vlm.models import build


def image_tower():
    model = timm.create_model("vit_tiny_patch16_224", depth=3, embed_dim=24, num_heads=2)
    return model, {"x": torch.randn(2, 3, 224, 224)}


def transformers_clip():
    ids = torch.tensor([[1, 2, 49], [1, 3, 49]])
    return hf_clip(), {"pixel_values": torch.randn(2, 3, 48, 48), "input_ids": ids}


def paper_clip():
    ids = torch.tensor([[1, 5, 2], [1, 6, 2]])
    inputs = {"images": torch.randn(2, 3, 64, 64), "input_ids": ids, "attention_mask": ids > 0}
    return elip_models.create_model("clip_tiny"), inputs


def llava():
    return build("llava")


OUTPUTS = {
    image_tower: lambda output: output,
    transformers_clip: lambda output: output.image_embeds,
    paper_clip: lambda output: output.loss,
    llava: lambda output: output.logits,
}


class Kind:
    """A model, a strategy with its rate, and a forward pass that returns one tensor."""

    def __init__(self, make):
        torch.manual_seed(0)
        self.make, self.strategy = make, "diverse" if make is llava else "tome"
        self.model, self.inputs = make()
        self.model.eval()

    @torch.no_grad()
    def __call__(self, model=None):
        return OUTPUTS[self.make]((model or self.model)(**self.inputs))

    def reduce(self):
        return elip_models.reduce_(self.model, self.strategy, keep=0.5)


@pytest.fixture(params=OUTPUTS)
def kind(request):
    return Kind(request.param)


def test_reduce_and_unreduce_change_the_output_and_restore_it(kind):
    dense = kind()
    assert kind.reduce() is kind.model and elip_models.is_reduced(kind.model)
    assert not torch.equal(kind(), dense)
    assert elip_models.unreduce_(kind.model) is kind.model
    assert not elip_models.is_reduced(kind.model) and torch.equal(kind(), dense)


def test_the_summary_names_the_strategy_and_a_forward_pass_is_recorded(kind):
    assert kind.strategy not in str(elip_models.reduction_summary(kind.model))
    assert kind.strategy in str(elip_models.reduction_summary(kind.reduce()))
    with elip_models.record_stages(kind.model) as infos:
        kind()
    assert infos


def test_a_saved_model_is_loaded_and_opened_with_its_reduction(kind, tmp_path):
    expected = strategies_in(kind.reduce())
    elip_models.save_reduced(kind.model, tmp_path / "saved")
    for load in (elip_models.load_reduced, lambda folder: elip_models.open_model(str(folder))):
        assert strategies_in(load(tmp_path / "saved")) == expected


def test_a_guided_image_model_takes_a_text_and_others_say_why_not(kind):
    errors = {
        paper_clip: (TypeError, "whose forward takes its texts"),
        llava: (ValueError, "'diverse', which acts on the language model"),
    }
    if kind.make in errors:
        kind.reduce()
        error, message = errors[kind.make]
        with (
            pytest.raises(error, match=message),
            elip_models.guidance(kind.model, torch.randn(1, 8)),
        ):
            pass
        return
    elip_models.reduce_(kind.model, "elip", keep=0.5)
    image_model = getattr(kind.model, "vision_model", kind.model)
    width = 24 if kind.make is image_tower else kind.model.config.vision_config.hidden_size
    with elip_models.guidance(image_model, torch.randn(1, width)):
        assert kind().isfinite().all()
