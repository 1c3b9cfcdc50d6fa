"""BLIP's models of VQA, NLVR2, retrieval and captioning against the official ones."""

import pytest
import torch
from transformers import GenerationConfig

from elip_models.pretraining.models.blip.tasks import (
    BLIPNLVR2,
    BLIPVQA,
    BLIPCaptioning,
    BLIPRetrieval,
)
from elip_models.pretraining.models.momentum_model import Negatives
from elip_models.saving.weights import load_weights
from tests.helpers.golden_weights import (
    assert_close,
    assert_gradients,
    padded,
    recorded,
    ruled,
)
from tests.helpers.towers import gradients, our_names

SIZES = {
    "image_size": 24,
    "patch_size": 8,
    "vision_width": 16,
    "vision_depth": 2,
    "vision_heads": 2,
    "vision_mlp_ratio": 2.0,
    "text_width": 16,
    "text_depth": 3,
    "text_heads": 2,
    "text_hidden": 32,
    "text_dropout": 0.0,
    "vocab_size": 40,
    "max_positions": 16,
    "context_length": 9,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "decoder_token_id": 4,
    "encoder_token_id": 5,
    "embed_dim": 8,
    "queue_size": 6,
}
MODELS = {model.task: model for model in (BLIPVQA, BLIPNLVR2, BLIPRetrieval, BLIPCaptioning)}
OWN = {"vqa": {"drop_path": 0.0}, "nlvr2": {"text_depth": 8, "drop_path": 0.0}}
TASKS = pytest.mark.parametrize("task", MODELS)


def fresh(task, **options):
    """Create a model in fp64 with initial weights."""
    model = MODELS[task]
    torch.manual_seed(0)
    return model(model.config_class(**(SIZES | OWN.get(task, {}) | options))).double()


def made(task, **options):
    """Create a model in fp64 with weights large enough to change its outputs."""
    model = fresh(task, **options)
    for name, weight in model.named_parameters():
        if name != "temperature":
            weight.data = ruled(name, tuple(weight.shape))
    model.reset_momentum_()
    return model


def our_name(name):
    return our_names("blip")(name).replace("cls_head.", "classifier.")


def loaded(task, case, **options):
    """Return our model with the weights of the official one."""
    model = made(task, **options)
    state = model.state_dict()
    shapes = {n.removeprefix("grad/"): tuple(g.shape) for n, g in case.items() if "grad/" in n}
    shapes |= {n.replace(".", "_m.", 1): shape for n, shape in shapes.items() if "." in n}
    weights = {our_name(n): ruled(n, shape) for n, shape in shapes.items() if n != "temp"}
    weights = {n: w.view(state[n].shape) for n, w in weights.items() if n in state}
    weights |= {n: t for n, t in case.items() if n.startswith("queue.")}
    missing = ["temperature"] if task == "retrieval" else []
    load_weights(model, weights, allow_missing=missing)
    return model


def mask_of(ids):
    return (ids != 0).long()


def batch_of(task, case=None):
    case = recorded(f"blip_{task}") if case is None else case
    ids = case["input_ids"]
    batch = {"images": case["images"], "input_ids": ids, "attention_mask": mask_of(ids)}
    if task == "vqa":
        ids, weights = padded(case["counts"], case["answers"], case["weights"])
        return batch | {"answer_ids": ids, "answer_mask": mask_of(ids), "answer_weights": weights}
    if task == "retrieval":
        drawn = Negatives(case["negative_images"], case["negative_texts"])
        return batch | {"image_ids": case["image_ids"], "drawn": drawn}
    return batch | ({"labels": case["labels"]} if task == "nlvr2" else {})


@TASKS
def test_the_official_step_is_reproduced(task):
    case = recorded(f"blip_{task}")
    model = loaded(task, case)
    out = model(**batch_of(task, case))
    assert_close(out.loss, case["loss"])
    out.loss.backward()
    expected = {our_name(n.removeprefix("grad/")): g for n, g in case.items() if "grad/" in n}
    assert_gradients(gradients(model), expected, least=1e-6)
    after = {our_name(n.removeprefix("after/")): t for n, t in case.items() if "after/" in n}
    assert len(after) == (6 if task == "retrieval" else 0)  # queue and momentum encoders
    for name, tensor in after.items():
        assert_close(model.state_dict()[name], tensor.double(), name)
    for name in {"loss_itc", "loss_itm"} & case.keys():
        assert_close(getattr(out, name), case[name], name)


@pytest.mark.parametrize("k", [1, 4, 5, 6])
def test_answers_are_ranked_as_the_official_model_does(k):
    case = recorded("blip_vqa")
    model = loaded("vqa", case)
    batch = batch_of("vqa", case)
    question = (batch["images"], batch["input_ids"], batch["attention_mask"])
    candidates = case["candidates"]
    ranked = model.rank_answers(*question, candidates, mask_of(candidates), k)
    assert torch.equal(ranked, case[f"ranked_{k}"])
    assert model.training


def test_generated_answers_and_captions_are_the_official_ones():
    case = recorded("blip_vqa")
    questions = case["questions"]
    written = loaded("vqa", case).generate_answers(case["images"], questions, mask_of(questions))
    assert torch.equal(written, case["written"])
    case = recorded("blip_captioning")
    prompt = case["input_ids"][:, 1:4]
    decoding = GenerationConfig(num_beams=3, max_length=12, min_length=6)
    model = loaded("captioning", case)
    written = model.generate(case["images"], prompt=prompt, decoding=decoding)
    assert torch.equal(written, case["written"])


def test_the_prompt_has_no_loss():
    model, batch = made("captioning"), batch_of("captioning")
    logits = model(**batch).logits
    logits.retain_grad()
    model.predict = lambda *args: logits
    model(**batch).loss.backward()
    asked = logits.grad.abs().sum(2) > 0
    after_prompt = torch.arange(9) >= 3
    followed = torch.nn.functional.pad(batch["attention_mask"][:, 1:], (0, 1)) == 1
    assert torch.equal(asked, after_prompt & followed)
