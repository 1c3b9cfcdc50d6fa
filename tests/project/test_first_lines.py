"""Lines that a new user types first: each works, or an error names the way out.

The models have a name and a class that users know, with few layers and random weights.
"""

import io

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image

import elip_models
from elip_models import reduce_, reduction_summary
from elip_models.reduction.user_warnings import warn_once
from tests.helpers.models import (
    HF,
    coca,
    hf_blip,
    hf_clip,
    hf_siglip,
    hf_vision,
    ids,
    open_clip_pair,
    output,
    output_of_pair,
)
from tests.helpers.towers import WIDTH, images, plain_vit
from tests.towers.test_hf_readers import llava, logits_of


def timm_model(name, **options):
    return timm.create_model(name, depth=3, img_size=56, num_classes=5, **options).eval()


def captioner():
    config = hf_blip().config
    return transformers.BlipForConditionalGeneration(config).eval()


def caption_logits(model, x):
    return model(pixel_values=x, input_ids=ids()).logits


def of_small_images(model, x):
    return model(torch.randn(2, 3, 56, 56))


def pair_output(model, x):
    return output_of_pair(model, x, ids())


MODELS = {
    'timm.create_model("vit_tiny_patch16_224")': (
        lambda: timm_model("vit_tiny_patch16_224", patch_size=8),
        of_small_images,
    ),
    'timm.create_model("eva02_tiny_patch14_224")': (
        lambda: timm_model("eva02_tiny_patch14_224"),
        of_small_images,
    ),
    'timm.create_model("vit_small_patch14_reg4_dinov2")': (
        lambda: timm_model("vit_small_patch14_reg4_dinov2"),
        of_small_images,
    ),
    "ViTForImageClassification(config)": (
        lambda: hf_vision("ViTForImageClassification", "ViTConfig", num_labels=5).eval(),
        output,
    ),
    "Dinov2Model(config)": (lambda: hf_vision("Dinov2Model", "Dinov2Config").eval(), output),
    "CLIPModel(config)": (lambda: hf_clip().eval(), pair_output),
    "SiglipModel(config)": (lambda: hf_siglip().eval(), pair_output),
    "BlipForConditionalGeneration(config)": (captioner, caption_logits),
    "LlavaForConditionalGeneration(config)": (lambda: llava("CLIP"), logits_of),
    'open_clip.create_model("ViT-B-32")': (lambda: open_clip_pair().eval(), pair_output),
    'open_clip.create_model("coca_ViT-B-32")': (
        lambda: coca().eval(),
        lambda model, x: model.encode_image(x),
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("line", MODELS)
def test_a_model_is_reduced_with_no_further_argument(line, recwarn):
    warn_once.cache_clear()
    make, call = MODELS[line]
    model, x = make(), images()
    dense = call(model, x)
    found = call(reduce_(model), x)
    assert found.shape == dense.shape and found.isfinite().all()
    assert not torch.equal(found, dense)
    assert reduction_summary(model).keep < 0.9
    default = "diverse" if line.startswith("Llava") else "merge"
    assert reduction_summary(model).strategy.name == default
    assert not [each for each in recwarn if "default strategy" in str(each.message)]


def on_meta(make):
    with torch.device("meta"):
        return make()


def export_by_torchscript():
    model = reduce_(plain_vit().eval())
    with torch.no_grad():
        torch.onnx.export(model, (images(),), io.BytesIO(), dynamo=False)


def guide_by_the_output_of_another_model():
    with elip_models.guidance(reduce_(plain_vit(), strategy="elip"), torch.randn(2, 2 * WIDTH)):
        pass


REFUSED = {
    'timm.create_model("swin_tiny_patch4_window7_224")': (
        lambda: reduce_(on_meta(lambda: timm.create_model("swin_tiny_patch4_window7_224"))),
        r"attends in windows.*take a plain ViT, such as timm.create_model\('vit_base",
    ),
    'strategy="ToMe"': (
        lambda: reduce_(plain_vit(), strategy="ToMe"),
        "got 'ToMe'; did you mean 'tome'",
    ),
    "keep=50": (lambda: reduce_(plain_vit(), keep=50), "pass 0.5 for half of the tokens"),
    "reduce_(torch.compile(model))": (
        lambda: reduce_(torch.compile(plain_vit())),
        "got a compiled one; call reduce_ on the original module, then compile it",
    ),
    "torch.onnx.export(model, dynamo=False)": (export_by_torchscript, "pass dynamo=True"),
    "guidance(model, text_features)": (
        guide_by_the_output_of_another_model,
        rf"expected \(B, {WIDTH}\), the tower's width.*project it to the tower's width first",
    ),
}


@pytest.mark.parametrize("line", REFUSED)
def test_an_error_names_the_way_out(line, capsys):
    call, message = REFUSED[line]
    with pytest.raises((TypeError, ValueError), match=message) as raised:
        call()
    assert "\n" not in str(raised.value) and capsys.readouterr().out == ""


def feature_extractor():
    """A pipeline returns the tokens that are left; the summary names the setting for all."""
    model = reduce_(transformers.AutoModel.from_config(transformers.ViTConfig(**HF)).eval())
    size = {"height": 48, "width": 48}
    processor = transformers.ViTImageProcessor(size=size)
    pipe = transformers.pipeline("image-feature-extraction", model=model, image_processor=processor)
    picture = Image.fromarray(np.zeros((48, 48, 3), dtype=np.uint8))
    left = reduction_summary(model).tokens[-1].mlp
    assert len(pipe(picture)[0]) == left < 37
    assert f"{left} of 37 tokens" in str(reduction_summary(model))
    assert "output_hidden_states=True" in str(reduction_summary(model))
    model.config.output_hidden_states = True
    assert len(pipe(picture)[0]) == 37


def loaded_after_it():
    model, x = reduce_(plain_vit().eval()), images()
    other = reduce_(plain_vit().eval())
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


def in_half_precision():
    x = images()
    for dtype in (torch.float16, torch.bfloat16):
        model = reduce_(plain_vit().eval()).to(dtype)
        assert model(x.to(dtype)).dtype == dtype


WORK = {
    'pipeline("image-feature-extraction", model=model)': feature_extractor,
    "model.load_state_dict(state)": loaded_after_it,
    "model.half()": in_half_precision,
}


@torch.no_grad()
@pytest.mark.parametrize("line", WORK)
def test_a_line_works(line):
    WORK[line]()
