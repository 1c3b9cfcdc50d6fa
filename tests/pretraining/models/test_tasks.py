"""What all models of ALBEF, BLIP and METER have in common, fine-tuned ones first."""

import copy

import pytest
import torch

from elip_models.strategies import STRATEGIES
from tests.helpers.cross_modal_cases import (
    MODELS,
    TASKS,
    batch_for,
    batch_of_four,
    check_checkpointing,
    made,
)
from tests.helpers.tiers import first_quick, tiered
from tests.helpers.weights import assert_equal_weights
from tests.pretraining.models.test_every_strategy import OPTIONS

QUICK = [
    *(("albef_vqa", "elip"), ("albef_entailment", "tome"), ("albef_nlvr2", "merge")),
    *(("albef_retrieval", "evit"), ("blip_vqa", "guided_tome"), ("blip_nlvr2", "elip")),
    *(("blip_captioning", "elip"), ("blip_retrieval", "tome"), ("meter_vqa", "trips")),
    *(("meter_nlvr2", "elip"), ("meter_retrieval", "evit")),
]
STEPS = [(name, strategy) for name in TASKS for strategy in STRATEGIES]
PAIRS = [name for name in TASKS if name.endswith(("vqa", "entailment", "nlvr2"))]
WITH_MOMENTUM = [
    *(name for name in MODELS if name != "meter"),
    *(name for name in TASKS if "albef" in name or name == "blip_retrieval"),
]


@pytest.mark.parametrize(("name", "strategy"), tiered(STEPS, QUICK))
def test_every_strategy_trains_and_checkpointing_changes_nothing(name, strategy):
    options = {"without_text": "vision"} if strategy == "elip" else {}
    model = made(name, strategy=strategy, strategy_options=OPTIONS.get(strategy), **options)
    check_checkpointing(model)


@pytest.mark.parametrize("name", [*MODELS, *first_quick(TASKS, 2)])
def test_a_saved_model_loads_with_equal_outputs(name, tmp_path):
    model = made(name).float()
    batch = {n: t.float() if t.is_floating_point() else t for n, t in batch_for(model).items()}
    model(**batch)
    other = type(model).from_pretrained(model.eval().save_pretrained(tmp_path)).eval()
    assert other.config == model.config
    assert_equal_weights(other, model)
    losses = []
    for loaded in (model, other):
        torch.manual_seed(0)
        losses.append(loaded(**batch).loss)
    assert torch.equal(*losses)
    trained = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (model, other)]
    assert trained[0] == trained[1]
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, other.get_buffer(name)), name


@pytest.mark.parametrize("name", PAIRS)
def test_the_text_guides_every_image_that_it_comes_with(name):
    model, guided = made(name).eval(), []
    encode = model.encode_image

    def encode_image(images, text_cls, *rows):
        guided.append((images, text_cls))
        return encode(images, text_cls, *rows)

    model.encode_image = encode_image
    batch = batch_for(model)
    model(**batch)
    ((images, guides),) = guided
    assert torch.equal(images, batch["images"].flatten(0, -4))
    cls = model.text_cls(batch["input_ids"], batch["attention_mask"])
    torch.testing.assert_close(guides, cls.repeat_interleave(len(images) // 4, 0))


@pytest.mark.parametrize("name", ["blip_vqa", "blip_nlvr2"])
def test_a_dense_tower_reads_no_text_for_guidance(name):
    model, passes = made(name, schedule=None), []
    run = model.encoders.encode_text
    model.encoders.encode_text = lambda *args: passes.append(args) or run(*args)
    model(**batch_for(model))
    assert len(passes) == 1


@pytest.mark.parametrize("name", WITH_MOMENTUM)
def test_momentum_encoders_and_queue_are_updated_in_training_only(name):
    model = made(name)
    batch, momentum = batch_for(model), dict(model.encoders_m.named_parameters())
    for weight in model.encoders.parameters():
        weight.data += 0.1
    before = copy.deepcopy(model)
    model.eval()(**batch)
    assert_equal_weights(model, before)
    model.train()(**batch)
    online = dict(model.encoders.named_parameters())
    for part, weight in before.encoders_m.named_parameters():
        torch.testing.assert_close(momentum[part], (weight + online[part]) / 2)
    if hasattr(model, "queue"):
        assert model.queue.pointer == 4
        assert not torch.equal(model.queue.image, before.queue.image)


@pytest.mark.parametrize("name", ["albef", "blip", "albef_retrieval", "blip_retrieval"])
def test_drawn_negatives_never_show_the_image_of_their_row(name):
    model, (_, ids, _) = made(name), batch_of_four()
    image_ids = torch.tensor([7, 3, 7, 5]) if "retrieval" in name else None
    shown = torch.arange(4) if image_ids is None else image_ids
    for _ in range(20):
        similar = torch.randn(2, 4, 4).double().mul(100).unbind()
        for negatives in model.draw(similar, ids, image_ids)[:2]:
            assert (shown[negatives] != shown).all()
    if image_ids is not None:  # another caption of the image, if there is no more
        (negatives, _) = model.draw(similar, ids, torch.zeros(4))
        assert (negatives != torch.arange(4)).all()
