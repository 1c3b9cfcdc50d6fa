"""Conversion of checkpoints to our models: equal outputs, missing parts, and errors."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from elip_models.pretraining.checkpoints.export import to_hf
from elip_models.pretraining.checkpoints.load import convert_checkpoint, resample_pos_embed
from elip_models.pretraining.checkpoints.names import KINDS, recognise_kind
from elip_models.pretraining.checkpoints.renaming import rename_tensors, reversed_names
from elip_models.pretraining.models.meter.config import ROBERTA
from elip_models.pretraining.models.registry import create_model
from elip_models.reduction.encode import encode_image
from elip_models.saving.weights import first_names
from tests.helpers.tiers import tiered
from tests.helpers.weights import assert_equal_weights
from tests.pretraining.models import test_albef, test_blip, test_meter
from tests.pretraining.models.test_saving import CONFIG

SHARED = ("vision_heads", "text_heads", "cls_token_id", "sep_token_id", "context_length")
WITHOUT_TENSOR = {  # fields that do not follow from tensors
    "albef": (*SHARED, "text_dropout", "schedule", "mask_token_id"),
    "blip": (*SHARED, "text_dropout", "schedule", "decoder_token_id", "encoder_token_id"),
    "meter": (*SHARED, "cross_heads", "dropout", "schedule", "mask_token_id"),
}
OFFICIAL = {"albef": test_albef, "blip": test_blip, "meter": test_meter}
HEADS = {"vision_heads": 2, "text_heads": 2}
LOSSES = {"ita": "loss_itc", "itm": "loss_itm", "mlm": "loss_mlm", "lm": "loss_lm"}


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


def small_open_clip():
    import open_clip

    return open_clip.CLIP(**CONFIG).state_dict()


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
def test_official_checkpoints_give_the_recorded_losses(golden, tmp_path, name, family, key):
    case, module = golden(name), OFFICIAL[family]
    expected = module.loaded(case)
    weights = official(case, family)
    if family == "meter":
        weights |= {"text_transformer.pooler.dense.bias": torch.zeros(16)}
        weights |= {"vit_model.positional_embedding": torch.zeros(77, 16)}
    path = saved(weights, tmp_path, key=key)
    model = convert_checkpoint(path, **without_tensor(expected.config, family))
    assert model.config == expected.config
    assert_equal_weights(model, expected)
    if family == "meter":
        model.reduction = expected.reduction
    inputs = case["image"], case["input_ids"].long(), case["attention_mask"]
    out = model.train()(*inputs, drawn=module.drawn(case))
    for loss in [loss for loss in case if loss.startswith("loss_")]:
        ours = LOSSES[loss.removeprefix("loss_")]
        torch.testing.assert_close(getattr(out, ours), case[loss], atol=2e-6, rtol=0, msg=loss)


def open_clip_weights(case):
    """Return the recorded image tower and a text tower of open_clip."""
    import open_clip

    sizes = CONFIG["text_cfg"]
    pair = open_clip.CLIP(embed_dim=32, vision_cfg=CONFIG["vision_cfg"], text_cfg=sizes)
    text = {n: w for n, w in pair.state_dict().items() if not n.startswith("visual.")}
    return text | {f"visual.{name}": weight for name, weight in case.under("sd/").items()}


@pytest.mark.parametrize("form", ["state_dict", "module", "bare", "safetensors"])
def test_an_open_clip_checkpoint_gives_the_recorded_features(golden, tmp_path, form):
    case = golden("elip_openclip")
    weights = open_clip_weights(case)
    if form == "safetensors":
        path = tmp_path / "open_clip_model.safetensors"
        save_file(weights, path)
    else:
        prefix = "module." if form == "module" else ""
        named = {prefix + name: weight for name, weight in weights.items()}
        path = saved(named, tmp_path, key=None if form == "bare" else "state_dict")
    schedule = "2(100%) 2(90%) 6(65%) 2(40%)"
    model = convert_checkpoint(
        path, vision_heads=2, text_heads=2, schedule=schedule, count_cls=True, scorer="official"
    )
    assert model.config.vision_mlp_ratio == 1
    assert model.config.eos_token_id == CONFIG["text_cfg"]["vocab_size"] - 1
    text_cls = model.guidance(case["text_cls"])
    tokens = encode_image(model.visual, case["image"], text_cls, strategy=model.reduction)
    torch.testing.assert_close(tokens[:, 1:], case["out_tokens"], atol=1e-5, rtol=0)
    pooled = model.image_projection(tokens[:, 0])
    torch.testing.assert_close(pooled, case["out_pooled"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("part", tiered(["vqa", "retrieval", "caption"], [], slow=["vqa"]))
def test_missing_parts_of_a_fine_tuned_blip_are_filled(golden, tmp_path, part):
    case = golden("blip_pretrain")
    config = test_blip.loaded(case).config
    weights = {n: w for n, w in official(case, "blip").items()}
    if part == "retrieval":
        weights = {n: w for n, w in weights.items() if not n.startswith("text_decoder.")}
        weights["ptr_queue"] = weights.pop("queue_ptr")
        weights["idx_queue"] = torch.full((1, 10), -100)
    else:
        texts = ("text_decoder.",) if part == "caption" else ("text_decoder.", "text_encoder.")
        weights = {n: w for n, w in weights.items() if n.startswith(("visual_encoder.", *texts))}
    assert recognise_kind(weights) == f"blip_{part}"
    options = without_tensor(config, "blip") | {"queue_size": 10, "embed_dim": 16}
    model = convert_checkpoint(saved(weights, tmp_path), **options)
    assert model.config.tie_decoder
    state = model.state_dict()
    attention = "layers.1.attention.self.query.weight"
    is_filled = torch.equal(state[f"decoder.{attention}"], state[f"encoders.text.{attention}"])
    assert is_filled == (part != "vqa")
    if part != "retrieval":
        assert_equal_weights(model.encoders_m, model.encoders)
    for name, weight in rename_tensors(weights, KINDS[f"blip_{part}"].names).items():
        if name in state:
            assert torch.equal(state[name].flatten(), weight.flatten()), name


@pytest.mark.parametrize("family", tiered(["albef", "blip"], ["albef"], slow=["blip"]))
def test_a_pre_trained_model_may_lack_the_parts_for_training(golden, tmp_path, family):
    case = golden(f"{family}_pretrain")
    options = without_tensor(OFFICIAL[family].loaded(case).config, family) | {"queue_size": 10}
    weights = {n: w for n, w in official(case, family).items() if "_m." not in n}
    weights = {n: w for n, w in weights.items() if "queue" not in n}
    model = convert_checkpoint(saved(weights, tmp_path), **options)
    online, momentum = (encoders.state_dict() for encoders in (model.encoders, model.encoders_m))
    assert all(torch.equal(momentum[name], weight) for name, weight in online.items())
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
    assert recognise_kind(weights) == "albef_retrieval"
    config = test_albef.loaded(case).config
    model = convert_checkpoint(saved(weights, tmp_path), **without_tensor(config, "albef"))
    name = "text_encoder_m.embeddings.word_embeddings.weight"
    assert torch.equal(model.encoders_m.text.embeddings.word_embeddings.weight, weights[name])
    bias = "language_head.predictions.transform.dense.bias"
    online, momentum = (e.state_dict() for e in (model.encoders, model.encoders_m))
    assert torch.equal(online[bias], momentum[bias])


def test_renaming_and_back_gives_the_official_names(golden):
    for name, family in (("albef_pretrain", "albef"), ("meter_mlm_itm", "meter")):
        case, names = golden(name), KINDS[family].names
        ours = rename_tensors(case.under("sd/"), names)
        assert rename_tensors(ours, reversed_names(names)).keys() == case.under("sd/").keys()
        state = OFFICIAL[family].loaded(case).state_dict()
        assert ours.keys() <= state.keys()


def test_position_embeddings_follow_the_image_size(golden, tmp_path):
    case = golden("albef_pretrain")
    options = without_tensor(test_albef.loaded(case).config, "albef")
    path = saved(official(case, "albef"), tmp_path)
    larger = convert_checkpoint(path, image_size=64, **options)
    for encoders in (larger.encoders, larger.encoders_m):
        assert encoders.visual.pos_embed.shape == (1, 65, 16)
    given = case["sd/visual_encoder.pos_embed"]
    assert torch.equal(larger.encoders.visual.pos_embed[:, :1], given[:, :1])
    same = convert_checkpoint(path, image_size=48, **options)
    assert torch.equal(same.encoders.visual.pos_embed, given)
    assert resample_pos_embed(given, same) is given
    flat = resample_pos_embed(torch.ones(1, 37, 4), larger)
    torch.testing.assert_close(flat, torch.ones(1, 65, 4))


def test_ours_convert_to_another_image_size(tmp_path):
    model = create_model("meter_tiny")
    model.save_pretrained(tmp_path)
    larger = convert_checkpoint(tmp_path, image_size=128)
    assert larger.config == replace(model.config, image_size=128)
    assert torch.equal(larger.text_pooler.dense.weight, model.text_pooler.dense.weight)


@pytest.fixture
def albef(golden, tmp_path):
    """Return the weights of an official ALBEF, and a function that converts them."""
    case = golden("albef_pretrain")
    options = without_tensor(test_albef.loaded(case).config, "albef")
    weights = official(case, "albef")
    return weights, lambda **more: convert_checkpoint(saved(weights, tmp_path), **options | more)


def test_missing_and_unexpected_tensors_are_listed_unless_allowed(albef):
    weights, convert = albef
    del weights["itm_head.bias"], weights["vision_proj_m.weight"]
    weights["text_decoder.bert.pooler.bias"] = torch.zeros(3)
    with pytest.raises(ValueError) as error:
        convert()
    for name in ("encoders_m.image_projection.weight", "itm_head.bias", "text_decoder.bert.pooler"):
        assert name in str(error.value)
    with pytest.raises(ValueError, match=r"missing: itm_head\.bias$"):
        convert(allow_missing=["*_m.*"], allow_unexpected=["text_decoder.*"])
    convert(allow_missing=["*_m.*", "itm_head.*"], allow_unexpected=["text_decoder.*"])


def test_wrong_shapes_are_listed(albef):
    weights, convert = albef
    weights["itm_head.weight"] = torch.zeros(3, 16)
    with pytest.raises(ValueError, match=r"itm_head\.weight \(2, 16\), got \(3, 16\)"):
        convert()


def test_heads_that_are_not_64_wide_need_an_override(albef, tmp_path):
    path = saved(albef[0], tmp_path)
    with pytest.raises(ValueError, match="text_heads: expected a width that is a multiple of 64"):
        convert_checkpoint(path, vision_heads=4)


def test_the_error_for_an_unknown_kind_lists_the_known_kinds(tmp_path):
    path = saved({"layer.weight": torch.zeros(2)}, tmp_path)
    with pytest.raises(ValueError, match=r"albef, .*hf_blip.*got names such as layer\.weight"):
        convert_checkpoint(path)
    with pytest.raises(ValueError, match=r"kind: expected one of albef, .*, got 'vilt'"):
        convert_checkpoint(path, kind="vilt")
    with pytest.raises(FileNotFoundError, match="source: expected a file or a folder"):
        convert_checkpoint(tmp_path / "none.pth")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"source: expected one of model\.safetensors"):
        convert_checkpoint(tmp_path / "empty")


def test_stacked_projections_are_split_and_stacked_again():
    names = {"a.*.{q,k,v}_proj.*": "b.*.qkv.*", "proj": "out.weight.T", "c.in_*": "d.{q,k,v}.*"}
    weights = {f"a.0.{c}_proj.weight": torch.randn(2, 2) for c in "kqv"}
    weights |= {"proj": torch.randn(3, 2), "c.in_bias": torch.randn(6)}
    ours = rename_tensors(weights, names)
    assert torch.equal(ours["b.0.qkv.weight"][:2], weights["a.0.q_proj.weight"])
    assert torch.equal(ours["out.weight"], weights["proj"].T)
    assert torch.equal(ours["d.v.bias"], weights["c.in_bias"][4:])
    again = rename_tensors(ours, reversed_names(names))
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    del weights["a.0.q_proj.weight"]
    assert {"a.0.k_proj.weight", "a.0.v_proj.weight"} <= rename_tensors(weights, names).keys()


def test_the_tables_name_every_tensor_of_the_models():
    """Check that the reversed table of pre-training has all of our names."""
    for kind in ("albef", "blip", "meter"):
        model = create_model(f"{KINDS[kind].family}_tiny")
        first = first_names(model)
        state = {name: w for name, w in model.state_dict().items() if first[name] == name}
        theirs = rename_tensors(state, reversed_names(KINDS[kind].names))
        kept = {name for name in theirs if name in state and not name.startswith("itm_head.")}
        assert not kept


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


@pytest.mark.parametrize("form", ["shards", "bin"])
def test_folders_of_transformers_in_other_forms(tmp_path, form):
    theirs = to_hf(create_model("clip_tiny", eos_token_id=7))
    theirs.save_pretrained(tmp_path, max_shard_size="200KB" if form == "shards" else "5GB")
    if form == "shards":
        assert (tmp_path / "model.safetensors.index.json").is_file()
    else:
        (tmp_path / "model.safetensors").unlink()
        torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    model = convert_checkpoint(tmp_path)
    assert_equal_weights(theirs, to_hf(model))


def test_a_checkpoint_that_matches_two_kinds_raises(albef):
    weights, convert = albef
    weights |= {"vit_model.visual.conv1.weight": torch.zeros(1)}
    weights |= {"text_transformer.embeddings.word_embeddings.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"got one that matches albef and meter; pass kind="):
        convert()
    convert(kind="albef", allow_unexpected=["vit_model.*", "text_transformer.*"])


def test_a_config_instead_of_its_folder_is_named(tmp_path):
    config = tmp_path / "config.json"
    config.write_text("{}")
    with pytest.raises(ValueError, match="source: expected weights, or the index of their shards"):
        convert_checkpoint(config)


@pytest.mark.parametrize("content", [b"abc\n", b"hello world this is", b""])
def test_a_file_of_something_else_is_named(tmp_path, content):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="source: expected only tensors, numbers and texts"):
        convert_checkpoint(path)


def test_position_embeddings_are_interpolated_as_the_official_code_does(tmp_path):
    model = create_model("albef_tiny")
    torch.nn.init.normal_(model.visual.pos_embed)
    larger = convert_checkpoint(model.save_pretrained(tmp_path), image_size=96)
    first, grid = model.visual.pos_embed.split([1, 64], dim=1)
    grid = grid.mT.unflatten(2, (8, 8))
    grid = torch.nn.functional.interpolate(grid, (12, 12), mode="bicubic", align_corners=False)
    expected = torch.cat([first, grid.flatten(2).mT], dim=1)
    torch.testing.assert_close(larger.visual.pos_embed, expected)
