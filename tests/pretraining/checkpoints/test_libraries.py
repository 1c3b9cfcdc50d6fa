"""Models of transformers and open_clip as ours and back: same outputs, same weights."""

import json

import open_clip
import pytest
import torch
import transformers
from safetensors.torch import save_file

from elip_models.engine.encode import encode_image
from elip_models.pretraining.checkpoints.export import save_as, to_hf
from elip_models.pretraining.checkpoints.load import convert_checkpoint
from elip_models.pretraining.models.registry import create_model, load_model
from tests.helpers.own_warnings import SLOW_SCORER
from tests.helpers.tiers import first_quick
from tests.helpers.tiny_run import elip
from tests.helpers.weights import assert_equal_weights
from tests.pretraining.checkpoints.test_checkpoint_files import HEADS, small_open_clip
from tests.pretraining.checkpoints.test_official import saved
from tests.pretraining.models.test_saving import CONFIG

WIDTH, IDS = 32, 50
VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": IDS,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
}
EOS = IDS - 1
TOLERANCE = {"atol": 1e-5, "rtol": 0}


def filled(model):
    """Set every parameter to random values; returns the model in eval mode."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def clip(**options):
    """Return a small CLIP of transformers."""
    text = TEXT | {"eos_token_id": EOS, "bos_token_id": None}
    config = transformers.CLIPConfig(
        vision_config=VISION | options, text_config=text | options, projection_dim=16
    )
    return filled(transformers.CLIPModel(config))


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@torch.no_grad()
def test_clip_of_transformers(tmp_path, activation):
    theirs = clip(hidden_act=activation, layer_norm_eps=1e-3)
    theirs.save_pretrained(tmp_path)
    model = convert_checkpoint(tmp_path)
    assert model.config.activation == activation
    assert model.config.vision_norm_eps == model.config.text_norm_eps == 1e-3
    x, ids = torch.randn(3, 3, 32, 32), torch.randint(6, EOS, (3, 8))
    ids[:, 5], mask = EOS, torch.ones_like(ids)
    mask[:, 6:] = 0
    expected = theirs(pixel_values=x, input_ids=ids, attention_mask=mask)
    image, text = model.encode_image(x), model.encode_text(ids, mask)
    torch.testing.assert_close(image, expected.image_embeds, **TOLERANCE)
    torch.testing.assert_close(text, expected.text_embeds, **TOLERANCE)
    logits = model.logit_scale.exp() * image @ text.T
    torch.testing.assert_close(logits, expected.logits_per_image, **TOLERANCE)
    again = to_hf(model)
    assert again.state_dict().keys() == theirs.state_dict().keys()
    assert_equal_weights(again, theirs)


@SLOW_SCORER
@pytest.mark.parametrize("form", ["state_dict", "module", "custom text", "safetensors"])
@torch.no_grad()
def test_an_open_clip_checkpoint_gives_the_recorded_features(golden, tmp_path, form):
    """Use the recorded image tower, and any text tower of open_clip."""
    case, weights = golden("elip_openclip"), small_open_clip(embed_dim=32)
    weights |= {f"visual.{name}": weight for name, weight in case.under("sd/").items()}
    if form == "safetensors":
        path = tmp_path / "open_clip_model.safetensors"
        save_file(weights, path)
    else:
        prefix = "module." if form == "module" else ""
        if form == "custom text":
            others = ("visual.", "logit_scale")
            weights = {n if n.startswith(others) else f"text.{n}": w for n, w in weights.items()}
        path = saved({prefix + n: w for n, w in weights.items()}, tmp_path, key="state_dict")
    schedule = "2(100%) 2(90%) 6(65%) 2(40%)"
    model = convert_checkpoint(path, **HEADS, schedule=schedule, count_cls=True, scorer="official")
    assert model.config.vision_mlp_ratio == 1
    assert model.config.eos_token_id == CONFIG["text_cfg"]["vocab_size"] - 1
    assert model.config.activation == "gelu"
    text_cls = model.guidance(case["text_cls"])
    tokens = encode_image(model.visual, case["image"], text_cls, strategy=model.reduction)
    torch.testing.assert_close(tokens[:, 1:], case["out_tokens"], atol=1e-5, rtol=0)
    pooled = model.image_projection(tokens[:, 0])
    torch.testing.assert_close(pooled, case["out_pooled"], atol=1e-5, rtol=0)


def our_clip(**options):
    sizes = {"eos_token_id": 7, "text_mlp_ratio": 3.0, "vision_mlp_ratio": 2.5}
    return filled(create_model("clip_tiny", **sizes | options))


@pytest.mark.parametrize(
    "options", first_quick([{}, {"activation": "quick_gelu", "text_norm_eps": 1e-4}])
)
@pytest.mark.parametrize("to", ["open_clip", "hf"])
@torch.no_grad()
def test_our_clip_is_exported_and_imported(tmp_path, to, options):
    model = our_clip(**options)
    save_as(model, tmp_path / to, to)
    again = convert_checkpoint(tmp_path / to)
    assert again.config == model.config
    x, ids = torch.randn(2, 3, 64, 64), torch.randint(8, 1024, (2, 32))
    ids[:, 9] = 7
    image, text = model.encode_image(x), model.encode_text(ids)
    assert_equal_weights(again, model)
    if to == "open_clip":
        theirs = open_clip.create_model(f"local-dir:{tmp_path / to}").eval()
        image_, text_ = theirs.encode_image(x, True), theirs.encode_text(ids, True)
    else:
        theirs = transformers.CLIPModel.from_pretrained(tmp_path / to).eval()
        out = theirs(pixel_values=x, input_ids=ids)
        image_, text_ = out.image_embeds, out.text_embeds
    torch.testing.assert_close(image, image_, **TOLERANCE)
    torch.testing.assert_close(text, text_, **TOLERANCE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_cfg": {"pool_type": "avg"}}, "pool_type = 'tok', got 'avg'"),
        ({"text_cfg": {"pool_type": "last"}}, "pool_type = 'argmax' or 'eos'"),
        ({"text_cfg": {"no_causal_mask": True}}, "no_causal_mask = False"),
        ({"text_cfg": 3}, "expected a config of open_clip"),
        ({"text_cfg": {"pad_id": "a"}}, "pad_token_id: expected .*got 'a'"),
    ],
)
def test_a_setting_of_open_clip_that_ours_lacks_is_refused(tmp_path, change, message):
    save_as(our_clip(), tmp_path / "saved", "open_clip")
    path = tmp_path / "saved" / "open_clip_config.json"
    config = json.loads(path.read_text())
    for part, values in change.items():
        config["model_cfg"][part] = values if values == 3 else config["model_cfg"][part] | values
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tmp_path / "saved")


def test_the_command_converts_there_and_back(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    source = tmp_path / "source"
    rows = len(tokenizer)
    model = filled(create_model("clip_tiny", vocab_size=rows, text_heads=1, vision_heads=1))
    torch.save({"state_dict": open_clip_state(model, tmp_path)}, tmp_path / "clip.pt")
    options = "--image-size", 96, "--tokenizer", tmp_path / "tokenizer"
    assert elip("convert", tmp_path / "clip.pt", source, "activation=quick_gelu", *options) == 0
    ours = load_model(source)
    assert ours.config.image_size == 96
    assert ours.config.activation == "quick_gelu"
    assert ours.config.eos_token_id == tokenizer.eos_token_id
    assert len(transformers.AutoTokenizer.from_pretrained(source)) == rows
    assert elip("convert", source, tmp_path / "open_clip", "--to", "open_clip", *options[2:]) == 0
    place = f"local-dir:{tmp_path / 'open_clip'}"
    theirs = open_clip.create_model(place)
    weight = theirs.visual.conv1.weight
    assert torch.equal(weight, model.visual.patch_embed.proj.weight)
    assert open_clip.get_tokenizer(place)(["a dog"])[0, 0] == tokenizer.bos_token_id
    assert elip("convert", source, tmp_path / "smaller", "--image-size", 64) == 0
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "smaller")) == rows


def open_clip_state(model, folder):
    save_as(model, folder / "state", "open_clip")
    return open_clip.create_model(f"local-dir:{folder / 'state'}").state_dict()
