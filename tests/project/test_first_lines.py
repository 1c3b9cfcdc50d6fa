"""Lines that a new user types first: each works, or an error names the way out.

The models have a name and a class that users know, with few layers and random weights.
"""

import io
from inspect import signature

import accelerate
import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import elip_kernels
import elip_models
from elip_models import reduce_, reduction_summary
from tests.helpers.models import (
    HF,
    hf_clip,
    hf_vision,
)
from tests.helpers.towers import WIDTH, images, plain_vit
from tests.vlm.models import build


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


def reduce_with_replaced_forward():
    model = plain_vit()
    accelerate.hooks.add_hook_to_module(model.blocks[0], accelerate.hooks.ModelHook())
    reduce_(model, "tome")


OF_OTHER_LIBRARIES = {
    "keep_rate": (0.7, r"got keep_rate=0\.7; pass keep=0\.7, the share of the tokens that stay$"),
    "ratio": (0.5, r"pass keep=0\.5, the share"),
    "keep_ratio": (0.5, "Pass strategy='evit', or keep in its place$"),
    "prune_rate": (0.3, r"got prune_rate=0\.3; pass keep=0\.7, the share"),
    "sparsity": (0.25, r"pass keep=0\.75, the share"),
    "num_keep": (98, r"pass keep, the share of the tokens that stay, such as keep=0\.5$"),
    "r": (8, "Pass strategy='tome', or keep in its place$"),
    "method": ("evit", "pass strategy='evit'$"),
}


@pytest.mark.parametrize("name", OF_OTHER_LIBRARIES)
def test_a_name_of_other_libraries_leads_to_the_argument(name):
    value, message = OF_OTHER_LIBRARIES[name]
    with pytest.raises(ValueError, match=rf"^{name}: .*{message}"):
        reduce_(plain_vit(), **{name: value})


def test_an_option_of_the_strategy_comes_before_a_name_of_other_libraries():
    with pytest.raises(ValueError, match="did you mean 'keep_ratio'"):
        reduce_(plain_vit(), "evit", keep_rate=0.7)
    with pytest.raises(ValueError, match=r"which takes r, .*got 0\.7; pass keep=0\.7"):
        reduce_(plain_vit(), "tome", keep_rate=0.7)


def test_a_public_name_without_its_underscore():
    with pytest.raises(AttributeError, match="no attribute 'reduce'; did you mean 'reduce_'"):
        elip_models.reduce  # noqa: B018


REFUSED = {
    'timm.create_model("swin_tiny_patch4_window7_224")': (
        lambda: reduce_(on_meta(lambda: timm.create_model("swin_tiny_patch4_window7_224"))),
        r"attends in windows.*take a plain ViT, such as timm.create_model\('vit_base",
    ),
    'strategy="ToMe"': (
        lambda: reduce_(plain_vit(), strategy="ToMe"),
        "got 'ToMe'; did you mean 'tome'",
    ),
    "reduce_(model, 0.5)": (
        lambda: reduce_(plain_vit(), 0.5),
        r"got 0\.5; pass keep=0\.5, the share of the tokens that stay$",
    ),
    "reduce_(model, 8)": (
        lambda: reduce_(plain_vit(), 8),
        r"got 8; pass keep, the share of the tokens that stay, such as keep=0\.5$",
    ),
    "reduce_(model, ToMe)": (
        lambda: reduce_(plain_vit(), elip_models.ToMe),
        r"got <class '.*ToMe'>; pass an instance, ToMe\(\)$",
    ),
    "reduce_(model, [])": (lambda: reduce_(plain_vit(), []), r"or a Strategy, got \[\]$"),
    'reduce_(model, "tome:0.5")': (
        lambda: reduce_(plain_vit(), "tome:0.5"),
        r"got '0\.5'; pass keep=0\.5",
    ),
    'reduce_(model, "tome:keep=0.5")': (
        lambda: reduce_(plain_vit(), "tome:keep=0.5"),
        r"got 'keep'; pass keep=0\.5",
    ),
    'reduce_(model, "diverse")': (
        lambda: reduce_(plain_vit(), "diverse"),
        "language model, in which 'diverse' acts, .* strategy of image towers, such as 'merge'$",
    ),
    "keep=1": (lambda: reduce_(plain_vit(), keep=1), r"got the integer 1; pass 1\.0 for all"),
    "keep=50": (lambda: reduce_(plain_vit(), keep=50), "pass 0.5 for 50% of the tokens"),
    'keep="0.7"': (lambda: reduce_(plain_vit(), keep="0.7"), "got '0.7'; pass 0.7 for 70%"),
    'keep="70%"': (lambda: reduce_(plain_vit(), keep="70%"), "got '70%'; pass 0.7 for 70%"),
    "keep=70.0": (lambda: reduce_(plain_vit(), keep=70.0), r"got 70\.0; pass 0.7 for 70%"),
    "keep=-1.0": (lambda: reduce_(plain_vit(), keep=-1.0), "pass 0.5 for half of the tokens"),
    'reduce_(llava, keep="0.7")': (
        lambda: reduce_(build("llava")[0], keep="0.7"),
        "^keep: .*got '0.7'; pass 0.7 for 70%",
    ),
    'reduce_("tome", model)': (
        lambda: reduce_("tome", plain_vit()),
        r"^model: .*got str; pass the model first: reduce_\(model",
    ),
    'reduce_(model, 0.5, "tome")': (
        lambda: reduce_(plain_vit(), 0.5, "tome"),
        "^strategy: .*got 0.5, with keep='tome'; pass keep as the third argument",
    ),
    "encode_image(images, model)": (
        lambda: elip_models.encode_image(images(), plain_vit()),
        r"got Tensor; pass the model first: encode_image\(model",
    ),
    "reduction_summary(images)": (
        lambda: reduction_summary(images()),
        "^model: .*got Tensor; pass the model that reads it",
    ),
    "kernels.reduce(attn, tokens, keep)": (
        lambda: elip_kernels.reduce(torch.rand(2, 8), torch.rand(2, 9, 4), 0.5),
        r"^tokens: .*order reduce\(tokens, attn, keep\)$",
    ),
    "kernels.reduce(rows, tokens, keep)": (
        lambda: elip_kernels.reduce(torch.rand(2, 3, 9), torch.rand(2, 9, 4), 0.5),
        r"^attn: .*order reduce\(tokens, attn, keep\)$",
    ),
    "kernels.reduce(tokens, keep, attn)": (
        lambda: elip_kernels.reduce(torch.rand(2, 9, 4), 0.5, torch.rand(2, 8)),
        r"^attn: .*order reduce\(tokens, attn, keep\)$",
    ),
    "kernels.reduce(.., 70)": (
        lambda: elip_kernels.reduce(torch.rand(2, 9, 4), torch.rand(2, 8), 70),
        "^keep: .*there are 8 candidates; pass 0.7 for 70%",
    ),
    "reduce_(torch.compile(model))": (
        lambda: reduce_(torch.compile(plain_vit())),
        "got a compiled one; call reduce_ on the original module, then compile it",
    ),
    "torch.onnx.export(model, dynamo=False)": (export_by_torchscript, "pass dynamo=True"),
    'reduce_("vit_base_patch16_224")': (
        lambda: reduce_("vit_base_patch16_224"),
        "got str; open a model by its name with elip_models.open_model, and pass that$",
    ),
    "reduce_(timm.models.VisionTransformer)": (
        lambda: reduce_(timm.models.VisionTransformer),
        "got the class VisionTransformer; pass an instance$",
    ),
    "reduce_(open_clip.create_model_and_transforms(..))": (
        lambda: reduce_((plain_vit(), None, None)),
        "got tuple; pass one model of it, such as its first item$",
    ),
    "reduce_(nn.Sequential(model))": (
        lambda: reduce_(nn.Sequential(plain_vit())),
        r"got Sequential: .* a wrapper; pass model\[0\]$",
    ),
    "reduce_(nn.DataParallel(model))": (
        lambda: reduce_(nn.DataParallel(plain_vit())),
        r"got DataParallel: .* a wrapper; pass model\.module$",
    ),
    "reduce_(SentenceTransformer(..))": (
        lambda: reduce_(nn.Sequential(nn.ModuleDict({"model": hf_clip()}))),
        r"a wrapper; pass model\[0\]\.model$",
    ),
    'from_pretrained(.., device_map={.. "disk"})': (
        reduce_with_replaced_forward,
        "whose forward was replaced, which 'tome' would bypass; take 'elip', .* device_map",
    ),
    "guidance(model, text_features)": (
        guide_by_the_output_of_another_model,
        rf"expected \(B, {WIDTH}\), the tower's width.*project it to the tower's width first",
    ),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of the export that is refused
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.onnx")
@pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based ONNX export")
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


def classifier():
    return reduce_(
        hf_vision("ViTForImageClassification", "ViTConfig", num_labels=5).eval(), "tome", 0.6
    )


def classification_pipeline():
    model = classifier()
    processor = transformers.ViTImageProcessor(size={"height": 48, "width": 48})
    pipe = transformers.pipeline("image-classification", model=model, image_processor=processor)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 48, 3), np.uint8))
    logits = model(**processor(picture, return_tensors="pt")).logits
    scores = {row["label"]: row["score"] for row in pipe(picture, top_k=5)}
    expected = {f"LABEL_{i}": score for i, score in enumerate(logits.softmax(1)[0].tolist())}
    assert scores == pytest.approx(expected)


def keep_is_the_third_argument():
    model = reduce_(plain_vit(), "tome", 0.5)
    assert reduction_summary(model).keep == pytest.approx(0.5, abs=0.05)


def loaded_with_other_labels(folder):
    classifier().save_pretrained(folder)
    model = transformers.AutoModelForImageClassification.from_pretrained(
        folder, num_labels=7, ignore_mismatched_sizes=True
    )
    assert reduce_(model)(images()).logits.shape == (2, 7)
    assert reduction_summary(model).strategy == reduction_summary(classifier()).strategy


def loaded_quantised(folder):
    model, x, int8 = classifier(), images(), Int8WeightOnlyConfig()
    model.save_pretrained(folder)
    loaded = transformers.AutoModelForImageClassification.from_pretrained(
        folder, quantization_config=transformers.TorchAoConfig(int8)
    )
    quantize_(model.vit, int8)
    torch.testing.assert_close(reduce_(loaded.eval()).vit(x)[0], model.vit(x)[0])


def features_of_timm():
    model = timm.create_model("test_vit", features_only=True, img_size=64).eval()
    x = torch.randn(1, 3, 64, 64)
    dense = model(x)
    grids = reduce_(model, "evit", 0.6)(x)
    assert [grid.shape for grid in grids] == [grid.shape for grid in dense]
    assert not torch.allclose(grids[-1], dense[-1])


def another_head_and_size():
    model = reduce_(plain_vit().eval())
    model.reset_classifier(7)
    model.set_input_size((96, 96))
    assert model(torch.randn(2, 3, 96, 96)).shape == (2, 7)
    assert reduction_summary(model).dense_tokens == 145


def more_words():
    model, inputs = build("llava")
    reduce_(model).resize_token_embeddings(200)
    assert model(**inputs).logits.shape[-1] == 200


WORK = {
    'pipeline("image-feature-extraction", model=model)': feature_extractor,
    'reduce_(model, "tome", 0.5)': keep_is_the_third_argument,
    'pipeline("image-classification", model=model)': classification_pipeline,
    "from_pretrained(folder, num_labels=7)": loaded_with_other_labels,
    "from_pretrained(folder, quantization_config=TorchAoConfig(..))": loaded_quantised,
    "timm.create_model(.., features_only=True)": features_of_timm,
    "model.set_input_size((96, 96))": another_head_and_size,
    "llava.resize_token_embeddings(200)": more_words,
}


@torch.no_grad()
@pytest.mark.parametrize("line", WORK)
def test_a_line_works(line, tmp_path):
    WORK[line](*[str(tmp_path)] * len(signature(WORK[line]).parameters))
