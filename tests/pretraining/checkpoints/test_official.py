"""Official checkpoints as our models and back, missing parts, and errors."""

from dataclasses import replace

import pytest
import torch

from elip_models.pretraining.checkpoints.load import convert_checkpoint
from elip_models.pretraining.checkpoints.names import KINDS
from elip_models.pretraining.checkpoints.renaming import rename_tensors, reversed_names
from elip_models.pretraining.models.meter.config import ROBERTA
from elip_models.pretraining.models.registry import create_model
from elip_models.saving.weights import first_names
from tests.helpers.tiers import first_quick
from tests.helpers.weights import assert_equal_weights
from tests.pretraining.models import test_albef, test_blip, test_meter

SHARED = ("vision_heads", "text_heads", "cls_token_id", "sep_token_id", "context_length")
WITHOUT_TENSOR = {  # fields that do not follow from tensors
    "albef": (*SHARED, "text_dropout", "schedule", "mask_token_id"),
    "blip": (*SHARED, "text_dropout", "schedule", "decoder_token_id", "encoder_token_id"),
    "meter": (*SHARED, "cross_heads", "dropout", "schedule", "mask_token_id"),
}
OFFICIAL = {"albef": test_albef, "blip": test_blip, "meter": test_meter}


def official(case, family):
    """Return the weights of a recorded step as the official code saves them, tied ones twice."""
    weights = case.under("sd/")
    weights |= {alias: weights[name] for alias, name in case.meta.get("aliases", {}).items()}
    text = {"albef": "text_encoder.bert", "blip": "text_encoder", "meter": "text_transformer"}
    return weights | {f"{text[family]}.embeddings.position_ids": torch.arange(16)[None]}


def saved(weights, folder, *, key="model"):
    path = folder / "checkpoint.pth"
    torch.save({key: weights, "epoch": 3, "config": {"lr": 1e-4}} if key else weights, path)
    return path


def without_tensor(config, family):
    return {name: getattr(config, name) for name in WITHOUT_TENSOR[family]}


@pytest.mark.parametrize(
    ("name", "family", "key"),
    [
        ("albef_pretrain", "albef", "model"),
        ("blip_pretrain", "blip", "model"),
        ("meter_mlm_itm", "meter", "state_dict"),
    ],
)
def test_an_official_checkpoint_becomes_ours_and_back(golden, tmp_path, name, family, key):
    """The models of `OFFICIAL` have the recorded losses, as their own tests show."""
    case = golden(name)
    expected, weights = OFFICIAL[family].loaded(case), official(case, family)
    if family == "meter":  # which ours does not have
        weights |= {"text_transformer.pooler.dense.bias": torch.zeros(16)}
        weights |= {"vit_model.positional_embedding": torch.zeros(77, 16)}
    path = saved(weights, tmp_path, key=key)
    model = convert_checkpoint(path, **without_tensor(expected.config, family))
    assert model.config == expected.config
    assert_equal_weights(model, expected)
    names = KINDS[family].names
    theirs = rename_tensors(rename_tensors(case.under("sd/"), names), reversed_names(names))
    assert theirs.keys() == case.under("sd/").keys()
    assert all(torch.equal(theirs[n].squeeze(), w.squeeze()) for n, w in case.under("sd/").items())


@pytest.mark.parametrize("kind", ["albef", "blip", "meter"])
def test_a_table_names_every_tensor_of_the_model(kind):
    model = create_model(f"{kind}_tiny")
    first = first_names(model)
    state = {name: w for name, w in model.state_dict().items() if first[name] == name}
    theirs = rename_tensors(state, reversed_names(KINDS[kind].names))
    assert all(name.startswith("itm_head.") for name in theirs.keys() & state.keys())


@pytest.mark.parametrize("part", first_quick(["retrieval", "vqa", "caption"]))
def test_missing_parts_of_a_fine_tuned_blip_are_copied_or_new(golden, tmp_path, part):
    case = golden("blip_pretrain")
    config = test_blip.loaded(case).config
    weights = official(case, "blip")
    if part == "retrieval":
        weights = {n: w for n, w in weights.items() if not n.startswith("text_decoder.")}
        weights["ptr_queue"] = weights.pop("queue_ptr")
        weights["idx_queue"] = torch.full((1, 10), -100)
    else:
        texts = ("text_decoder.",) if part == "caption" else ("text_decoder.", "text_encoder.")
        weights = {n: w for n, w in weights.items() if n.startswith(("visual_encoder.", *texts))}
    options = without_tensor(config, "blip") | {"queue_size": 10}
    if part != "retrieval":  # whose checkpoint has the projections
        options["embed_dim"] = 16
    reports = []
    path = saved(weights, tmp_path)
    model = convert_checkpoint(path, report=reports.append, **options)
    assert model.config.tie_decoder
    copied = {
        "vqa": {"encoders_m.": "encoders."},
        "caption": {"encoders.text.": "decoder.", "encoders_m.": "encoders."},
        "retrieval": {"decoder.": "encoders.text."},
    }
    assert reports[0].copied == copied[part]
    new = "language_head.predictions.bias" if part == "retrieval" else "itm_head.weight"
    assert new in reports[0].new
    state = model.state_dict()
    attention = "layers.1.attention.self.query.weight"
    is_copy = torch.equal(state[f"decoder.{attention}"], state[f"encoders.text.{attention}"])
    assert is_copy == (part != "vqa")
    if part != "retrieval":
        assert_equal_weights(model.encoders_m, model.encoders)
    for name, weight in rename_tensors(weights, KINDS["blip"].names).items():
        if name in state:
            assert torch.equal(state[name].flatten(), weight.flatten()), name


def test_a_meter_with_roberta_is_recognised(tmp_path):
    sizes = {"vocab_size": 1024, "max_positions": 40, "mask_token_id": 1023}
    expected = create_model("meter_tiny", **ROBERTA | sizes)
    names = reversed_names(KINDS["meter"].names)
    weights = {n: w for n, w in expected.state_dict().items() if "decoder.bias" not in n}
    path = saved(rename_tensors(weights, names), tmp_path, key="state_dict")
    heads = {f"{part}_heads": 2 for part in ("vision", "text", "cross")}
    model = convert_checkpoint(path, **heads, mask_token_id=1023)
    others = ("context_length", "initializer_range", "dropout")  # do not follow from weights
    same = {name: getattr(model.config, name) for name in others}
    assert model.config == replace(expected.config, **same)
    assert model.config.text_encoder == "roberta"
    assert_equal_weights(model, expected)


def test_missing_and_unexpected_tensors_are_listed_unless_allowed(golden, tmp_path):
    case = golden("albef_pretrain")
    options = without_tensor(test_albef.loaded(case).config, "albef")
    weights = official(case, "albef")
    weights["text_proj.weight"] = torch.zeros(3, 16)
    del weights["itm_head.bias"], weights["vision_proj_m.weight"]
    weights["text_decoder.bert.pooler.bias"] = torch.zeros(3)
    path = saved(weights, tmp_path)
    with pytest.raises(ValueError) as error:
        convert_checkpoint(path, **options)
    for text in (
        *("encoders_m.image_projection.weight", "itm_head.bias", "text_decoder.bert.pooler"),
        "encoders.text_projection.weight (8, 16), got (3, 16)",
    ):
        assert text in str(error.value)
    unexpected = ["text_decoder.*", "encoders.text_projection.weight"]
    missing = ["*_m.*", "itm_head.*", "encoders.text_projection.weight"]
    convert_checkpoint(path, **options, allow_missing=missing, allow_unexpected=unexpected)
    with pytest.raises(ValueError, match="text_heads: expected a width that is a multiple of 64"):
        convert_checkpoint(path, vision_heads=4)
