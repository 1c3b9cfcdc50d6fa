"""METER's downstream models against the official ones, and what they promise beside.

The weights of the recorded runs are drawn by a rule from their official names, `drawn_weight`.
"""

import zlib

import numpy as np
import pytest
import torch

from elip_models.pretraining.checkpoints.names import KINDS
from elip_models.pretraining.checkpoints.renaming import rename_tensors, reversed_names
from elip_models.pretraining.models.meter.model import METER, METERDraw
from elip_models.pretraining.models.meter.tasks import (
    METERNLVR2,
    METERVQA,
    METEREntailment,
    METERRetrieval,
)
from elip_models.pretraining.training.optim import parameter_groups
from elip_models.pretraining.training.recipe import FINETUNE, recipe_settings
from elip_models.saving.weights import load_weights
from tests.helpers.golden_weights import recorded
from tests.helpers.own_warnings import SLOW_SCORER
from tests.helpers.towers import gradients

MODELS = {model.task: model for model in (METERVQA, METEREntailment, METERNLVR2, METERRetrieval)}
HEADS = {
    "vqa": {"vqa_classifier.*": "classifier.*"},
    "entailment": {"snli_classifier.*": "classifier.*"},
    "nlvr2": {"nlvr2_classifier.*": "classifier.*"},
    "retrieval": {"rank_output.*": "rank_head.*"},
}
TINY = {
    "image_size": 16,
    "patch_size": 4,
    "vision_width": 8,
    "vision_depth": 3,
    "vision_heads": 2,
    "text_width": 8,
    "text_depth": 2,
    "text_heads": 2,
    "text_hidden": 16,
    "cross_width": 12,
    "cross_depth": 2,
    "cross_heads": 3,
    "cross_hidden": 24,
    "dropout": 0.0,
    "vocab_size": 24,
    "max_positions": 10,
    "context_length": 6,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "mask_token_id": 3,
}
OWN = {"vqa": {"num_classes": 7}, "retrieval": {"false_texts": 2}}
REDUCED = {"schedule": "1(100%) 1(75%) 1(50%)", "scorer": "official"}
TOLERANCE = 2e-6  # of the largest entry
task_of = pytest.mark.parametrize("task", MODELS)


def made(task, **options):
    model = MODELS[task]
    return model(model.config_class(**TINY | OWN.get(task, {}) | options))


def pretrained():
    return METER(METER.config_class(**TINY))


def names_of(task):
    """Return our names of official names."""
    return KINDS["meter"].names | HEADS.get(task, {})


def in_our_order(task, weights):
    """Return weights by our names; the official entailment classes have the opposite order."""
    last = ("classifier.3.weight", "classifier.3.bias") if task == "entailment" else ()
    return {n: w.flip(0) if n in last else w for n, w in weights.items()}


def filled(model, task="pretraining"):
    """Fill the model with the weights of the recorded runs."""
    theirs = rename_tensors(dict(model.named_parameters()), reversed_names(names_of(task)))
    weights = {name: drawn_weight(name, weight.shape) for name, weight in theirs.items()}
    load_weights(model, in_our_order(task, rename_tensors(weights, names_of(task))))
    return model


def drawn_weight(name, shape):
    """Return normal numbers seeded by the name's checksum, to three digits; norms around 1."""
    drawn = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape))
    is_norm = len(shape) == 1 and name.endswith("weight")
    return torch.from_numpy((1 + 0.1 * drawn if is_norm else 0.3 * drawn).round(3)).float()


def official(task, suffix=""):
    """Return the outputs of the official code in our order of classes."""
    case = recorded(f"meter_{task}{suffix}")
    if task == "entailment":
        case |= {"labels": 2 - case["labels"], "logits": case["logits"].flip(1)}
    return case


def batch_of(task, case):
    names = ["images", "input_ids", "attention_mask"]
    names += {"vqa": ["answer_scores"], "retrieval": ["false_ids", "false_mask"]}.get(
        task, ["labels"]
    )
    batch = {name: case[name] for name in names}
    return batch | ({"image_ids": torch.arange(3)} if task == "retrieval" else {})


def outputs_of(model, task, case):
    """Return the losses and logits of a step by their recorded names.

    The official run of retrieval added ITM, which the official settings leave out.
    """
    batch = batch_of(task, case)
    out = model(**batch)
    if task != "retrieval":
        return vars(out)
    drawn = METERDraw(None, None, case["itm_labels"], case["false_images"])
    loss, logits = model.match(case["images"], case["input_ids"], case["attention_mask"], drawn)
    ranks = {"loss": out.loss + loss, "loss_rank": out.loss, "rank_logits": out.logits}
    return ranks | {"loss_itm": loss, "itm_logits": logits}


def random_batch(model, B=3):
    """Return a batch of three with texts of different lengths, one of them padded."""
    batch = model.random_inputs(torch.randn(B, 3, 16, 16))
    batch["attention_mask"][-1, -2:] = 0
    return batch


def assert_close(got, expected, **options):
    """Compare with `TOLERANCE`, relative to the largest entry."""
    torch.testing.assert_close(
        got, expected, atol=TOLERANCE * expected.abs().max().item(), rtol=0, **options
    )


@pytest.mark.parametrize(("suffix", "options"), [("", {}), ("_reduced", REDUCED)])
@task_of
def test_the_official_step_is_reproduced(task, suffix, options):
    """Compare in fp64: the difference is the rounding of the recorded run."""
    case = official(task, suffix)
    model = filled(made(task, **options), task).double()
    out = outputs_of(model, task, case)
    assert out.keys() <= case.keys()
    for name, value in out.items():
        assert_close(value.double(), case[name], msg=name)
    out["loss"].backward()
    expected = rename_tensors(
        {n[5:]: g for n, g in case.items() if n.startswith("grad/")}, names_of(task)
    )
    expected, got = in_our_order(task, expected), gradients(model)
    assert suffix or got.keys() == expected.keys()
    assert_close_gradients(got, expected)


def assert_close_gradients(got, expected):
    """Compare with `TOLERANCE` of the largest gradient, and 2e-5 of each tensor's largest one.

    The second bound has a minimum for tensors whose terms cancel, such as queries and keys:
    there the recorded gradients differ by up to 1.2e-5 from those in fp64.
    """
    largest = max(grad.abs().max() for grad in expected.values())
    for name, grad in expected.items():
        error = (got[name].view(grad.shape) - grad).abs().max()
        assert error <= TOLERANCE * largest, name
        assert error <= max(2e-5 * grad.abs().max(), 4 * torch.finfo().eps * largest), name


@task_of
def test_initial_weights_are_the_official_ones(task):
    case, before = official(task), filled(pretrained())
    model = made(task)
    weights = model.from_pretraining(before.state_dict(), model.config)
    load_weights(model, weights, allow_missing=["classifier.*"])
    begun = case["begin/token_type_embeddings.weight"].float()
    assert torch.equal(model.token_types.weight, begun)
    if task == "retrieval":
        for part in ("weight", "bias"):
            begun = case[f"begin/rank_output.{part}"].float()
            assert torch.equal(getattr(model.rank_head, part), begun)
    shared = model.state_dict().keys() & before.state_dict().keys() - {"token_types.weight"}
    assert {n.split(".")[0] for n in before.state_dict().keys() - shared} <= {
        *("language_head", "token_types"),
        *(("itm_head",) if task != "retrieval" else ()),
    }
    after, before = model.state_dict(), before.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in shared)


@SLOW_SCORER
@pytest.mark.parametrize("options", [{}, REDUCED])
def test_matching_one_text_equals_ranking_several(options):
    """Check that each text has its own image tokens if texts guide."""
    model = filled(made("retrieval", **options), "retrieval").eval()
    batch = random_batch(model)
    images, ids, mask = batch["images"], batch["false_ids"], batch["false_mask"]
    ranks = model.rank_logits(images, ids, mask)
    for text in range(2):
        one = ids[:, text], mask[:, text]
        tokens, _ = model.encode_image(images, model.text_cls(*one))
        assert tokens.shape[1] == 17 or options
        assert_close(model.matching_logits(tokens, *one), ranks[:, text])


def test_the_pre_trained_model_matches_by_its_logit_of_a_pair():
    model = filled(pretrained()).eval()
    batch = random_batch(made("vqa"))
    images, ids, mask = batch["images"], batch["input_ids"], batch["attention_mask"]
    logits = model.matching_logits(model.encode_image(images)[0], ids, mask)
    pairs = METERDraw(None, None, torch.ones(len(ids), dtype=torch.long), images)
    assert_close(logits, model.match(images, ids, mask, pairs)[1][:, 1])


@task_of
def test_a_recipe_decays_and_scales_what_the_original_does(task):
    values = {each.key: each.value for each in recipe_settings(f"{FINETUNE}/{task}_meter")}
    scales, no_decay, model = values["optim.lr_scale"], values["optim.no_decay"], made(task)
    groups = parameter_groups(model, 0.1, scales, no_decay=no_decay)
    options = {p: (g["lr_scale"], g["weight_decay"] > 0) for g in groups for p in g["params"]}
    head = {"vqa": 50, "entailment": 10, "nlvr2": 10, "retrieval": 1}[task]
    theirs = rename_tensors(dict(model.named_parameters()), reversed_names(names_of(task)))
    for name, parameter in theirs.items():
        scale = head if "classifier" in name else 5 if "cross_modal" in name else 1
        decays = not ("bias" in name or "LayerNorm" in name)
        if parameter.requires_grad:
            assert options[parameter] == (scale, decays), name
    assert values["model.overrides"].keys() <= vars(model.config).keys()
    defaults = type(model.config)()
    for name, value in values["model.overrides"].items():
        assert getattr(defaults, name) == value, name
