"""ALBEF's downstream models against the official ones, and their other properties."""

import math

import pytest
import torch

from elip_models.pretraining.models.albef.tasks import (
    ALBEFNLVR2,
    ALBEFVQA,
    ALBEFEntailment,
    ALBEFRetrieval,
)
from elip_models.pretraining.models.layers.momentum import NO_IMAGE
from elip_models.pretraining.models.momentum_model import Negatives
from tests.helpers.golden_weights import (
    assert_close,
    assert_gradients,
    matrix,
    padded,
    recorded,
    ruled,
)
from tests.helpers.towers import gradients

OFFICIAL = {
    "image_size": 24,
    "patch_size": 8,
    "vision_depth": 2,
    "vision_mlp_ratio": 2.0,
    **{f"{part}_width": 8 for part in ("vision", "text")},
    **{f"{part}_heads": 2 for part in ("vision", "text")},
    "text_hidden": 16,
    "text_dropout": 0.0,
    "vocab_size": 30,
    "context_length": 8,
    "max_positions": 8,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "mask_token_id": 3,
    "embed_dim": 6,
    "queue_size": 8,
}
DEPTHS = {
    ALBEFVQA: {"text_depth": 7, "text_layers": 1},
    ALBEFEntailment: {"text_depth": 4, "text_layers": 2},
    ALBEFNLVR2: {"text_depth": 12, "text_layers": 6},
    ALBEFRetrieval: {"text_depth": 4, "text_layers": 2},
}
THEIRS = {  # how names begin, ours and theirs
    "encoders.visual.": "visual_encoder.",
    "encoders.text.layers.": "text_encoder.encoder.layer.",
    "encoders.text.": "text_encoder.",
    "encoders.decoder.layers.": "text_decoder.bert.encoder.layer.",
    "encoders.decoder.": "text_decoder.bert.",
    "encoders.language_head.": "text_decoder.cls.",
    "encoders.classifier.": "cls_head.",
    "encoders.image_projection.": "vision_proj.",
    "encoders.text_projection.": "text_proj.",
    "itm_head.": "itm_head.",
    "temperature": "temp",
}


def official_name(name):
    online = name.replace("encoders_m.", "encoders.")
    ours = next(part for part in THEIRS if online.startswith(part))
    theirs = THEIRS[ours]
    if online != name:
        theirs = theirs.replace(".", "_m.", 1)
    return theirs + online.removeprefix(ours)


def official(model_class, **options):
    """Return the tensors of the official run and our model with its weights, in fp64."""
    config = model_class.config_class(**OFFICIAL, **DEPTHS[model_class], **options)
    model = model_class(config)
    for name, weight in model.named_parameters():
        if name != "temperature":
            weight.data = ruled(official_name(name), weight.shape).float()  # as theirs
    model.double().alpha.fill_(config.full_alpha)
    return recorded(model_class.family), model


def pixels(name, *batch):
    """Return the images (*batch, 3, 24, 24) with that name in the official run."""
    shape = *batch, 3, 24, 24
    return 2 * matrix(1, math.prod(shape), name).view(shape)


def text_of(case):
    return case["input_ids"], case["attention_mask"]


def assert_official_gradients(model, case):
    expected = {n.removeprefix("grad/"): g for n, g in case.items() if n.startswith("grad/")}
    got = {official_name(n): g for n, g in gradients(model).items()}
    assert_gradients(got, expected, least=1e-3)


def answers_of(case):
    return padded(case["counts"], *(case[f"answer_{name}"] for name in ("ids", "mask", "weights")))


def test_vqa_is_the_official_one():
    case, model = official(ALBEFVQA)
    images = pixels("images", 3)
    out = model(images, *text_of(case), *answers_of(case))
    assert_close(out.loss, case["loss"])
    out.loss.backward()
    assert_official_gradients(model, case)
    _, plain = official(ALBEFVQA, distill=False)
    assert_close(plain(images, *text_of(case), *answers_of(case)).loss, case["loss_plain"])


def test_answers_are_ranked_as_officially():
    case, model = official(ALBEFVQA)
    images, text = pixels("images", 3), text_of(case)
    candidates = case["candidate_ids"], case["candidate_mask"]
    best = model.rank_answers(images, *text, *candidates, k=4)
    assert torch.equal(best, case["topk_ids"][:, 0])
    states = model.encode_pair(images, *text), text[1]
    numbers, scores = model.score_answers(*states, *candidates, k=4)
    chances, order = scores.softmax(1).sort(descending=True)
    assert torch.equal(numbers.gather(1, order), case["topk_ids"])
    assert_close(chances, case["topk_probs"])
    assert torch.equal(model.rank_answers(images, *text, *candidates, k=99), best)


@pytest.mark.parametrize("model_class", [ALBEFEntailment, ALBEFNLVR2])
def test_a_classifier_is_the_official_one(model_class):
    case, model = official(model_class)
    images = pixels("pairs", 3, 2) if model_class is ALBEFNLVR2 else pixels("images", 3)
    batch = images, *text_of(case), case["labels"]
    assert_close(model.logits(*batch[:3]), case["logits"])
    out = model(*batch)
    assert_close(out.logits, case["logits"])
    assert_close(out.loss, case["loss"])
    out.loss.backward()
    assert_official_gradients(model, case)
    _, plain = official(model_class, distill=False)
    assert_close(plain(*batch).loss, case["loss_plain"])


@torch.no_grad()
def fill_queue_(queue):
    for name in ("image", "text"):
        features = torch.nn.functional.normalize(matrix(6, 8, f"{name}_queue"), dim=0)
        getattr(queue, name).copy_(features)
    queue.ids.copy_(torch.tensor([9, 1, 4, NO_IMAGE, 5, 6, 7, 2]))
    queue.pointer.fill_(4)


def test_retrieval_is_the_official_one():
    case, model = official(ALBEFRetrieval)
    fill_queue_(model.queue)
    batch = pixels("shown", 4), *text_of(case), case["image_ids"]
    drawn = Negatives(case["negative_images"], case["negative_texts"])
    out = model(*batch, drawn=drawn)
    for name in ("loss", "loss_itc", "loss_itm"):
        assert_close(getattr(out, name), case[name])
    out.loss.backward()
    assert_official_gradients(model, case)
    for name in ("image", "text"):
        assert_close(getattr(model.queue, name), case[f"after/{name}_queue"])
    assert torch.equal(model.queue.ids, case["after/idx_queue"][0])
    assert torch.equal(model.queue.pointer, case["after/queue_ptr"])
    _, plain = official(ALBEFRetrieval, distill=False)
    fill_queue_(plain.queue)
    assert_close(plain(*batch, drawn=drawn).loss_itc, case["loss_itc_plain"])
