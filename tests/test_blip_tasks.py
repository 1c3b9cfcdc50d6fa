"""BLIP's models of VQA, NLVR2, retrieval and captioning against the official ones."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from elip_models.models.base import load_weights
from elip_models.models.downstream.blip_captioning import BLIPCaptioning
from elip_models.models.downstream.blip_nlvr2 import BLIPNLVR2
from elip_models.models.downstream.blip_retrieval import BLIPRetrieval
from elip_models.models.downstream.blip_vqa import BLIPVQA
from elip_models.models.downstream.momentum_retrieval import Drawn
from elip_models.models.layers.generation import Decoding
from tests.golden_weights import ruled
from tests.towers import gradients, our_names

GOLDEN = Path(__file__).parent / "golden"
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
BOUND = 2e-6  # of the largest entry: the official runs are fp64, our losses are fp32 inside


def made(task, **options):
    """A model in fp64 with weights that matter."""
    model = MODELS[task]
    model = model(model.config_class(**(SIZES | OWN.get(task, {}) | options))).double()
    for name, weight in model.named_parameters():
        if name != "temperature":
            weight.data = ruled(name, tuple(weight.shape))
    model.reset_momentum_()
    return model


def recorded(task):
    """The tensors of the official run, in fp64."""
    tensors = load_file(GOLDEN / f"blip_{task}.safetensors")
    return {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}


def our_name(name):
    return our_names("blip")(name).replace("cls_head.", "head.")


def loaded(task, case, **options):
    """Our model with the weights of the official one."""
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


def answers_of(case):
    """The flat list of answers as (B, A, La), their mask and weights."""
    counts, most = case["counts"].tolist(), int(case["counts"].max())
    ids = case["answers"].new_zeros(len(counts), most, case["answers"].shape[1])
    weights = torch.zeros(ids.shape[:2])
    real = torch.arange(most) < case["counts"][:, None]
    ids[real], weights[real] = case["answers"], case["weights"].float()
    return {"answer_ids": ids, "answer_mask": mask_of(ids), "answer_weights": weights}


def batch_of(task, case=None):
    case = recorded(task) if case is None else case
    ids = case["input_ids"]
    batch = {"images": case["images"], "input_ids": ids, "attention_mask": mask_of(ids)}
    if task == "vqa":
        return batch | answers_of(case)
    if task == "retrieval":
        drawn = Drawn(case["negative_images"], case["negative_texts"])
        return batch | {"image_ids": case["image_ids"], "drawn": drawn}
    return batch | ({"labels": case["labels"]} if task == "nlvr2" else {})


def assert_close(got, expected, name="", least=0.0):
    """Where all of it is below `least`, such as what softmax makes zero, that is the scale."""
    bound = BOUND * expected.abs().max().clamp_min(least)
    assert (got.double().reshape(expected.shape) - expected).abs().max() <= bound, name


@TASKS
def test_the_official_loss_and_gradients_are_reproduced(task):
    case = recorded(task)
    model = loaded(task, case)
    out = model(**batch_of(task, case))
    assert_close(out.loss, case["loss"])
    out.loss.backward()
    got = gradients(model)
    expected = {our_name(n.removeprefix("grad/")): g for n, g in case.items() if "grad/" in n}
    assert got.keys() == expected.keys()
    least = 1e-6 * max(grad.abs().max() for grad in expected.values())
    for name, grad in expected.items():
        assert_close(got[name], grad, name, least)


def test_the_official_queue_and_momentum_encoders_are_reproduced():
    case = recorded("retrieval")
    model = loaded("retrieval", case)
    out = model(**batch_of("retrieval", case))
    assert_close(out.loss_itc, case["loss_itc"])
    assert_close(out.loss_itm, case["loss_itm"])
    state = model.state_dict()
    after = {our_name(n.removeprefix("after/")): t for n, t in case.items() if "after/" in n}
    assert len(after) == 6
    for name, tensor in after.items():
        assert_close(state[name], tensor.double(), name)


def test_negatives_are_drawn_by_the_official_chances():
    case = recorded("retrieval")
    model = loaded("retrieval", case)
    batch = batch_of("retrieval", case)
    text = batch["input_ids"], batch["attention_mask"]
    seen = model.contrast(batch["images"], *text, None, None, case["image_ids"])
    own = case["image_ids"][:, None] == case["image_ids"]
    image_to_text, text_to_image = (s.softmax(1).masked_fill(own, 0) for s in seen.similar)
    assert_close(text_to_image, case["chances_images"])
    assert_close(image_to_text, case["chances_texts"])


def test_the_official_logits_of_nlvr2_are_reproduced():
    case = recorded("nlvr2")
    batch = batch_of("nlvr2", case)
    del batch["labels"]
    assert_close(loaded("nlvr2", case).logits(**batch), case["logits"])


@pytest.mark.parametrize("k", [1, 4, 5, 6])
def test_answers_are_ranked_as_the_official_model_does(k):
    case = recorded("vqa")
    model = loaded("vqa", case)
    batch = batch_of("vqa", case)
    question = (batch["images"], batch["input_ids"], batch["attention_mask"])
    candidates = case["candidates"]
    ranked = model.rank_answers(*question, candidates, mask_of(candidates), k)
    assert torch.equal(ranked, case[f"ranked_{k}"])
    assert model.training


def test_answers_are_written_as_the_official_model_does():
    case = recorded("vqa")
    questions = case["questions"]
    written = loaded("vqa", case).generate_answers(case["images"], questions, mask_of(questions))
    assert torch.equal(written, case["written"])


def test_captions_are_written_as_the_official_model_does():
    case = recorded("captioning")
    prompt = case["input_ids"][:, 1:4]
    decoding = Decoding(max_length=12, min_length=6)
    model = loaded("captioning", case)
    written = model.generate(case["images"], prompt=prompt, decoding=decoding)
    assert torch.equal(written, case["written"])
