"""Each public function of a reduction, with each kind of model: one façade for all of them."""

import copy

import pytest
import timm
import torch

import elip_models
from elip_models.api import strategies_in
from elip_models.integrations.hf_trainer import ReductionCallback
from tests.helpers.models import hf_clip
from tests.vlm.models import build


class Kind:
    """A model, a strategy with its rate, and a forward pass that returns one tensor."""

    strategy = "tome"

    def __init__(self):
        torch.manual_seed(0)
        self.model = self.make().eval()
        self.inputs = self.make_inputs()

    @torch.no_grad()
    def __call__(self, model=None):
        return self.output((model or self.model)(**self.inputs))

    def output(self, output):
        return output

    def reduce(self):
        return elip_models.reduce_(self.model, self.strategy, keep=0.5)


class ImageTower(Kind):
    def make(self):
        return timm.create_model("vit_tiny_patch16_224", depth=3, embed_dim=24, num_heads=2)

    def make_inputs(self):
        return {"x": torch.randn(2, 3, 224, 224)}


class TransformersCLIP(Kind):
    def make(self):
        return hf_clip()

    def make_inputs(self):
        size = self.model.config.vision_config.image_size
        return {
            "pixel_values": torch.randn(2, 3, size, size),
            "input_ids": torch.tensor([[1, 2, 49], [1, 3, 49]]),
        }

    def output(self, output):
        return output.image_embeds


class PaperCLIP(Kind):
    def make(self):
        return elip_models.create_model("clip_tiny")

    def make_inputs(self):
        ids = torch.tensor([[1, 5, 2], [1, 6, 2]])
        return {"images": torch.randn(2, 3, 64, 64), "input_ids": ids, "attention_mask": ids > 0}

    def output(self, output):
        return output.loss


class LLaVA(Kind):
    strategy = "diverse"

    def make(self):
        self.prompt = build("llava")
        return self.prompt[0]

    def make_inputs(self):
        return self.prompt[1]

    def output(self, output):
        return output.logits


@pytest.fixture(params=[ImageTower, TransformersCLIP, PaperCLIP, LLaVA])
def kind(request):
    return request.param()


def test_reduce_and_unreduce_change_the_output_and_restore_it(kind):
    dense = kind()
    assert kind.reduce() is kind.model and elip_models.is_reduced(kind.model)
    assert not torch.equal(kind(), dense)
    assert elip_models.unreduce_(kind.model) is kind.model
    assert not elip_models.is_reduced(kind.model) and torch.equal(kind(), dense)


def test_the_summary_names_the_strategy(kind):
    assert kind.strategy not in str(elip_models.reduction_summary(kind.model))
    assert kind.strategy in str(elip_models.reduction_summary(kind.reduce()))


def test_a_forward_pass_is_recorded(kind):
    with elip_models.record_stages(kind.reduce()) as infos:
        kind()
    assert infos
    with elip_models.record_stages(kind.model) as others:
        pass
    assert not others


def test_a_saved_model_is_loaded_and_opened_with_its_reduction(kind, tmp_path):
    expected = strategies_in(kind.reduce())
    elip_models.save_reduced(kind.model, tmp_path / "saved")
    for load in (elip_models.load_reduced, lambda folder: elip_models.open_model(str(folder))):
        assert strategies_in(load(tmp_path / "saved")) == expected


def test_a_guided_image_model_takes_a_text_and_others_say_why_not(kind):
    if isinstance(kind, LLaVA | PaperCLIP):
        kind.reduce()
        error, message = (
            (TypeError, "whose forward takes its texts")
            if isinstance(kind, PaperCLIP)
            else (ValueError, "'diverse', which acts on the language model")
        )
        with (
            pytest.raises(error, match=message),
            elip_models.guidance(kind.model, torch.randn(1, 8)),
        ):
            pass
        return
    elip_models.reduce_(kind.model, "elip", keep=0.5)
    image_model = getattr(kind.model, "vision_model", kind.model)
    width = 24 if isinstance(kind, ImageTower) else kind.model.config.vision_config.hidden_size
    with elip_models.guidance(image_model, torch.randn(1, width)):
        assert kind().isfinite().all()


class State:
    """The part of transformers' TrainerState that the callback reads."""

    def __init__(self, step, max_steps=10):
        self.global_step, self.max_steps = step, max_steps


@pytest.mark.parametrize("until", [None, 0.9])
def test_the_callback_keeps_the_reduction_until_the_last_steps(kind, until):
    dense = copy.deepcopy(kind.model)
    expected = strategies_in(kind.reduce())
    callback = ReductionCallback(until=until)
    callback.on_train_begin(None, State(0), None, model=kind.model)
    for step in range(10):
        callback.on_step_begin(None, State(step), None, model=kind.model)
        is_last = until is not None and step >= 9
        assert strategies_in(kind.model) == (() if is_last else expected)
    if until is not None:
        assert torch.equal(kind(), kind(dense))


def test_the_callback_keeps_every_strategy_of_a_language_model(tmp_path):
    model = build("llava")[0].float()
    for strategy, keep in (("tome", 0.7), ("diverse", 0.5), ("fastv:layer=1", 0.5)):
        elip_models.reduce_(model, strategy, keep=keep)
    expected, stored = strategies_in(model), model.config.elip
    callback = ReductionCallback(until=0.9)
    for step in range(9):
        callback.on_step_begin(None, State(step), None, model=model)
    assert strategies_in(model) == expected and model.config.elip == stored
    callback.on_step_begin(None, State(9), None, model=model)
    assert not elip_models.is_reduced(model)
    assert getattr(model.config, "elip", None) is None
