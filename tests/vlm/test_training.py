"""Loss and gradients of reduced models, adapters of peft, and labels that cannot be predicted."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from elip_models import is_reduced, record_stages, reduce_, unreduce_
from tests.helpers.tiers import tiered
from tests.helpers.towers import gradients as gradients_of
from tests.vlm import oracle
from tests.vlm.configs import CASES, IMAGE, PAD, VIDEO, attentions
from tests.vlm.models import build

TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-6}  # norms compute in fp32 in both
QUICK = {"llava", "qwen3_vl_video", "gemma3", "paligemma", "lfm2_vl"}
LORA = LoraConfig(
    target_modules=r".*layers\.\d+\.self_attn\.[qv]_proj", r=4, init_lora_weights=False
)


EVERY = [(n, attention, how) for n in CASES for attention in attentions(n) for how in (True, False)]


def trained(name, attention="sdpa"):
    """Return a model in training mode, and inputs with labels at every token of text.

    The token behind an image has a label too.
    """
    model, inputs = build(name, attention, padding="right")
    ids = inputs["input_ids"]
    hidden = torch.isin(ids, torch.tensor([IMAGE, VIDEO, PAD]))
    labels = ids.masked_fill(hidden, -100)
    assert ((ids[:, :-1] == IMAGE) & (labels[:, 1:] != -100)).any()
    return model.train(), inputs | {"labels": labels, "use_cache": False}


def gradients(model, inputs):
    """Return the loss, and the gradients by the names of parameters."""
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), gradients_of(model)


def assert_trains_as_oracle(
    model, inputs, hidden=lambda model, info: oracle.hidden(model, info.kept)
):
    """Compare with the stock model, from which `hidden` hides what was removed."""
    with record_stages(model) as infos:
        loss, reduced = gradients(model, inputs)
    unreduce_(model)
    with hidden(model, infos[0]):
        other, expected = gradients(model, inputs)
    assert not all(kept.all() for kept in (infos[0].kept, *infos[0].kept_behind))
    tolerance = TOLERANCE[other.dtype]
    assert (loss - other).abs() <= tolerance * other
    assert set(reduced) == set(expected)
    largest = torch.stack([grad.abs().max() for grad in expected.values()]).max()
    assert largest > 1e-3
    for name, grad in reduced.items():
        assert (grad - expected[name]).abs().max() <= tolerance * largest, name
    return reduced


@pytest.mark.parametrize(
    ("name", "attention", "is_checkpointed"),
    tiered(EVERY, [case for case in EVERY if case[0] in QUICK and case[1] == "sdpa"]),
)
def test_loss_and_gradients_are_those_of_the_model_without_removed_columns(
    name, attention, is_checkpointed
):
    model, inputs = trained(name, attention)
    if is_checkpointed:
        model.gradient_checkpointing_enable()
    assert_trains_as_oracle(reduce_(model, keep=0.5), inputs)


@pytest.mark.parametrize("is_first", [True, False])
def test_adapters_train(is_first):
    model, inputs = trained("llava")
    if is_first:
        reduce_(model, keep=0.5)
    torch.manual_seed(0)
    adapted = get_peft_model(model, LORA)
    if not is_first:
        reduce_(adapted, keep=0.5)
    assert is_reduced(adapted)
    found = assert_trains_as_oracle(adapted, inputs)
    assert found and all("lora" in name for name in found)


@pytest.mark.parametrize("name", ["llava", "gemma3", "idefics3"])
def test_labels_that_removed_tokens_would_predict_are_refused(name):
    model, inputs = trained(name)
    inputs["labels"] = inputs["input_ids"]
    reduce_(model, keep=0.5)
    with pytest.raises(ValueError, match="labels: expected -100 at image tokens"):
        model(**inputs)
    del inputs["labels"]
    model(**inputs)  # the labels of a call that failed are forgotten
    inputs["labels"] = inputs["input_ids"]
    assert reduce_(model, keep=1.0)(**inputs).loss.isfinite()
