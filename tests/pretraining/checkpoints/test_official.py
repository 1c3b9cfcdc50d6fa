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


@pytest.mark.parametrize("family", first_quick(["albef", "blip"]))
def test_a_pre_trained_model_may_lack_the_parts_for_training(golden, tmp_path, family):
    case = golden(f"{family}_pretrain")
    options = without_tensor(OFFICIAL[family].loaded(case).config, family) | {"queue_size": 10}
    weights = {n: w for n, w in official(case, family).items() if "_m." not in n}
    weights = {n: w for n, w in weights.items() if "queue" not in n}
    model = convert_checkpoint(saved(weights, tmp_path), **options)
    assert_equal_weights(model.encoders_m, model.encoders)
    weights["vision_proj_m.bias"] = torch.zeros(16)
    with pytest.raises(ValueError, match=r"missing: .*encoders_m\.visual\.cls_token"):
        convert_checkpoint(saved(weights, tmp_path), **options)


@pytest.mark.slow
def test_a_decoder_with_different_weights_is_not_tied(golden, tmp_path):
    case = golden("blip_pretrain")
    options = without_tensor(test_blip.loaded(case).config, "blip")
    weights = official(case, "blip")
    name = "text_decoder.bert.encoder.layer.0.crossattention.self.key.weight"
    weights[name] = weights[name] + 1
    model = convert_checkpoint(saved(weights, tmp_path), **options)
    assert not model.config.tie_decoder
    with pytest.raises(ValueError, match=r"expected the same values .* decoder\.layers\.0\.cross"):
        convert_checkpoint(saved(weights, tmp_path), **options, tie_decoder=True)


def test_an_albef_fine_tuned_for_retrieval_keeps_its_momentum_embeddings(golden, tmp_path):
    case = golden("albef_pretrain")
    weights = {
        name.replace(".bert.", "."): weight
        for name, weight in official(case, "albef").items()
        if ".cls." not in name
    }
    weights["idx_queue"] = torch.zeros(1, 10)
    config = test_albef.loaded(case).config
    model = convert_checkpoint(saved(weights, tmp_path), **without_tensor(config, "albef"))
    name = "text_encoder_m.embeddings.word_embeddings.weight"
    assert torch.equal(model.encoders_m.text.embeddings.word_embeddings.weight, weights[name])
    assert_equal_weights(
        model.encoders_m.language_head.predictions.transform,
        model.encoders.language_head.predictions.transform,
    )


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


def test_position_embeddings_are_interpolated_as_the_official_code_does(golden, tmp_path):
    case = golden("albef_pretrain")
    options = without_tensor(test_albef.loaded(case).config, "albef")
    path = saved(official(case, "albef"), tmp_path)
    theirs = case["sd/visual_encoder.pos_embed"]
    same = convert_checkpoint(path, image_size=48, **options)
    assert torch.equal(same.encoders.visual.pos_embed, theirs)
    larger = convert_checkpoint(path, image_size=64, **options)
    grid = theirs[:, 1:].mT.unflatten(2, (6, 6))
    grid = torch.nn.functional.interpolate(grid, (8, 8), mode="bicubic", align_corners=False)
    expected = torch.cat([theirs[:, :1], grid.flatten(2).mT], dim=1)
    torch.testing.assert_close(larger.encoders.visual.pos_embed, expected)
    assert larger.encoders_m.visual.pos_embed.shape == (1, 65, 16)


def test_ours_convert_to_another_image_size(tmp_path):
    model = create_model("meter_tiny")
    model.save_pretrained(tmp_path)
    larger = convert_checkpoint(tmp_path, image_size=128)
    assert larger.config == replace(model.config, image_size=128)
    assert torch.equal(larger.text_pooler.dense.weight, model.text_pooler.dense.weight)


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
