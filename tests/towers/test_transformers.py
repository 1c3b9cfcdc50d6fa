"""Each class of layers of transformers that a tower reads, in a small model of random weights."""

import importlib
import inspect
from functools import partial

import pytest
import torch
import transformers

import elip_models
from elip_models.towers import as_tower
from elip_models.towers.hf_layers import LAYERS
from elip_models.towers.tower_parts import part
from tests.helpers.models import HF, HF_TEXT, enlarged
from tests.helpers.tiers import slow_except
from tests.helpers.towers import assert_equal_gradients, images

AUDIO = {"max_length": 80, "num_mel_bins": 32, "frequency_stride": 6, "time_stride": 6}
VIDEO = {"num_frames": 4, "tubelet_size": [2, 8, 8]}
VJEPA2 = {"frames_per_clip": 4, "crop_size": 48, "mlp_ratio": 2.0, "pred_hidden_size": 24}
VJEPA2 |= {"pred_num_attention_heads": 2, "pred_num_hidden_layers": 1, "num_pooler_layers": 1}
PLAIN = "CLIP CLIPSeg MetaClip2 AltCLIP MLCD OwlViT Owlv2 Siglip Blip Blip2 InstructBlip Aimv2"
MODELS = {
    **{f"{name}EncoderLayer": (f"{name}VisionModel", {}) for name in PLAIN.split()},
    **{
        f"{name}EncoderLayer": (f"{name}VisionTransformer", {})
        for name in ("Idefics2", "Idefics3", "SmolVLM")
    },
    **{f"{name}Layer": (f"{name}Model", {}) for name in ("ViT", "DeiT", "IJepa", "ViTMSN")},
    "ChineseCLIPVisionLayer": ("ChineseCLIPVisionModel", {}),
    "GitVisionEncoderLayer": ("GitVisionModel", {}),
    "BeitLayer": (
        "BeitModel",
        {"use_relative_position_bias": True, "use_mean_pooling": False, "drop_path_rate": 0.0},
    ),
    "Data2VecVisionLayer": (
        "Data2VecVisionModel",
        {"use_relative_position_bias": True, "use_mean_pooling": False, "drop_path_rate": 0.0},
    ),
    "PixioLayer": ("PixioModel", {"n_cls_tokens": 3}),
    "Tipsv2VisionLayer": ("Tipsv2VisionModel", {"num_register_tokens": 1, "layerscale_value": 0.3}),
    "JanusVisionEncoderLayer": ("JanusVisionModel", {}),
    "ASTLayer": ("ASTModel", AUDIO),
    "VivitLayer": ("VivitModel", VIDEO),
    "VideoMAELayer": ("VideoMAEModel", {"num_frames": 4, "use_mean_pooling": False}),
    "DPTViTLayer": ("DPTModel", {"is_hybrid": False}),
    "VJEPA2Layer": ("VJEPA2Model", VJEPA2),
    "Dinov2Layer": ("Dinov2Model", {"layerscale_value": 0.3}),
    "Dinov2WithRegistersLayer": ("Dinov2WithRegistersModel", {"layerscale_value": 0.3}),
    "DINOv3ViTLayer": (
        "DINOv3ViTModel",
        {"num_register_tokens": 4, "layerscale_value": 0.3, "use_gated_mlp": True},
    ),
    "InternVLVisionLayer": (
        "InternVLVisionModel",
        {"layer_scale_init_value": 0.3, "use_mean_pooling": False},
    ),
}
INPUTS = {"ASTLayer": (2, 80, 32), "VivitLayer": (2, 4, 3, 48, 48)}
INPUTS["VideoMAELayer"] = INPUTS["VJEPA2Layer"] = INPUTS["VivitLayer"]
ABSENT = {"ASTLayer": ("image_size",), "VivitLayer": ("patch_size",)}  # in their configs
ABSENT["VJEPA2Layer"] = ("image_size", "intermediate_size")
IN_FP32 = ("GitVisionEncoderLayer", "MLCDEncoderLayer")  # softmax, or rotations
layers = pytest.mark.parametrize("layer", slow_except(list(MODELS)[::3], MODELS))


def kosmos2():
    text = {"embed_dim": 32, "layers": 1, "ffn_dim": 32, "attention_heads": 4, "vocab_size": 99}
    config = transformers.Kosmos2Config(vision_config=HF, text_config=text, latent_query_num=4)
    return transformers.Kosmos2Model(config).vision_model


def model_of(layer):
    name, options = MODELS[layer]
    config = name.replace("Transformer", "Config").replace("Model", "Config")
    module = importlib.import_module(getattr(transformers, config).__module__)
    model = getattr(
        importlib.import_module(module.__name__.replace("configuration", "modeling")), name
    )
    sizes = {name: n for name, n in HF.items() if name not in ABSENT.get(layer, ())}
    return enlarged(model(getattr(transformers, config)(**(sizes | options)))).eval()


def inputs(layer):
    return torch.randn(INPUTS[layer]) if layer in INPUTS else images()


def features(model, x):
    out = model(x)
    pooled = getattr(out, "pooler_output", None)
    if pooled is not None:
        return pooled
    is_grid = "predictor_output" in out
    return out.last_hidden_state.mean(1) if is_grid else out.last_hidden_state[:, 0]


def test_every_row_has_a_model():
    """Those of SigLIP 2 and VitPose are in `test_padding.py` and `test_dense_models.py`."""
    others = {"Kosmos2VisionEncoderLayer", "Siglip2EncoderLayer", "VitPoseBackboneLayer"}
    assert set(MODELS) | others == set(LAYERS)
    found = {type(each).__name__ for each in kosmos2().modules()}
    assert "Kosmos2VisionEncoderLayer" in found


@layers
@torch.no_grad()
def test_parts_add_up_to_the_layer(layer):
    model, x = model_of(layer), inputs(layer)
    entered = []
    tower = as_tower(model)
    tower.blocks[0].register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    model(x)
    tower, (tokens,) = tower.resized_for(x), entered
    assert tokens.shape[1] == tower.size.num_tokens
    for i in range(tower.depth):
        whole = tower.block(i, tokens)
        apart = tower.mlp(i, tower.attend(i, tokens))
        torch.testing.assert_close(apart, whole, atol=2e-5, rtol=2e-5)
        tokens = whole


@layers
@torch.no_grad()
def test_no_merges_is_the_model_and_merges_are_undone(layer):
    model, x = model_of(layer), inputs(layer)
    dense = features(model, x)
    elip_models.reduce_(model, strategy="tome:r=0")
    assert torch.equal(features(model, x), dense)
    with elip_models.record_stages(elip_models.reduce_(model)) as infos:
        merged = features(model, x)
    assert infos[-1].sizes.shape[1] < as_tower(model).size.num_tokens
    assert infos[-1].sizes.sum(1).eq(as_tower(model).size.num_tokens).all()
    assert merged.isfinite().all() and not torch.equal(merged, dense)
    assert torch.equal(features(elip_models.unreduce_(model), x), dense)


def bias_at(table, places, *args, **kwargs):
    """The bias of patches that stand in pairs, each pair at one position."""
    return table(*args, **kwargs)[:, :, places][..., places]


def ids_in_pairs(own, x, masks=None):
    """The indices of patches that stand in pairs, each pair at one position."""
    places = torch.arange(x.shape[1])[None] if masks is None else masks
    return own(x, masks=places // 2 * 2)


@layers
def test_equal_patches_merge_to_the_dense_result_in_training(layer):
    """Each pair of neighbours is equal, so that merging every pair changes nothing."""
    model, x = model_of(layer).double(), inputs(layer).double()
    tower = as_tower(model)
    p, n = tower.num_prefix_tokens, tower.num_patches

    def double_patches(module, args):
        patches = args[0][:, p:][:, : n // 2 * 2 : 2].repeat_interleave(2, dim=1)
        return torch.cat([args[0][:, :p], patches], dim=1), *args[1:]

    if tower.rotates_itself:
        for block in tower.blocks:
            own = block.attention.get_position_ids
            block.attention.get_position_ids = partial(ids_in_pairs, own)
    elif tower.is_rotary:
        rope = getattr(model, "vision_rotary_embedding", None) or model.rope_embeddings
        table = rope.forward

        def double_positions(*args):
            return tuple(t[: n // 2 * 2 : 2].repeat_interleave(2, dim=0) for t in table(*args))

        rope.forward = double_positions
    if tower.adds_bias:
        even = torch.arange(p, p + n // 2 * 2, 2).repeat_interleave(2)
        places = torch.cat([torch.arange(p), even])
        for block in tower.blocks:
            own = part(block, tower.names.bias)
            own.forward = partial(bias_at, own.forward, places)
    tower.blocks[0].register_forward_pre_hook(double_patches)
    dense = features(model, x)
    strategy = elip_models.ToMe((n // 2,) + (0,) * (tower.depth - 1), compare="tokens")
    elip_models.reduce_(model, strategy=strategy)
    merged = features(model, x)
    close = 1e-5 if layer in IN_FP32 else 1e-9
    torch.testing.assert_close(merged, dense, atol=close, rtol=close)
    merged.square().sum().backward()
    assert all(w.grad is None or w.grad.isfinite().all() for w in model.parameters())


VISION = {"vision_config": HF, "projection_dim": 32}
TEXT = HF_TEXT | {"max_position_embeddings": 16, "eos_token_id": 49}
DETECTOR = VISION | {"text_config": TEXT}
TINY = {name: n for name, n in HF.items() if name not in ABSENT["VJEPA2Layer"]}
SEGMENTER = DETECTOR | {"extract_layers": [0, 2, 4], "reduce_dim": 8}
SEGMENTER |= {"decoder_num_attention_heads": 2, "decoder_intermediate_size": 16}
DPT = HF | {"is_hybrid": False, "backbone_out_indices": [1, 2, 3, 5], "fusion_hidden_size": 8}
DPT |= {"neck_hidden_sizes": [8] * 4}
WHOLE = {
    "DPTForDepthEstimation": ("DPTConfig", DPT),
    "DPTForSemanticSegmentation": ("DPTConfig", DPT),
    "OwlViTForObjectDetection": ("OwlViTConfig", DETECTOR),
    "Owlv2ForObjectDetection": ("Owlv2Config", DETECTOR),
    "CLIPSegForImageSegmentation": ("CLIPSegConfig", SEGMENTER),
    "MetaClip2Model": ("MetaClip2Config", DETECTOR),
    "DINOv3ViTBackbone": ("DINOv3ViTConfig", HF | {"out_features": ["stage2", "stage6"]}),
    "Data2VecVisionForImageClassification": ("Data2VecVisionConfig", HF),
    "Data2VecVisionForSemanticSegmentation": (
        "Data2VecVisionConfig",
        HF | {"use_relative_position_bias": True, "out_indices": [1, 2, 3, 4]},
    ),
    "IJepaForImageClassification": ("IJepaConfig", HF),
    "MetaClip2ForImageClassification": ("MetaClip2Config", DETECTOR),
    "VJEPA2Model": ("VJEPA2Config", TINY | VJEPA2),
    "VJEPA2ForVideoClassification": ("VJEPA2Config", TINY | VJEPA2),
    "ViTMSNForImageClassification": ("ViTMSNConfig", HF),
    "DeiTForMaskedImageModeling": ("DeiTConfig", HF | {"encoder_stride": 8}),
    "ViTForMaskedImageModeling": ("ViTConfig", HF | {"encoder_stride": 8}),
}


def tensors(model, x):
    text = {"input_ids": torch.full((2, 6), 7), "attention_mask": torch.ones(2, 6).long()}
    has_text = "input_ids" in inspect.signature(model.forward).parameters
    name = "pixel_values_videos" if x.dim() == 5 else "pixel_values"
    out = model(**{name: x}, **(text if has_text else {}))
    found = []
    for value in out.values():
        found += value if isinstance(value, tuple) else [value]
    return [each for each in found if isinstance(each, torch.Tensor)]


@pytest.mark.parametrize("name", WHOLE)
@torch.no_grad()
def test_dense_heads_get_a_token_for_each_patch(name):
    config, options = WHOLE[name]
    made = getattr(transformers, config)(**options)
    model = getattr(transformers, name)(made).eval()
    x = torch.randn(INPUTS["VJEPA2Layer"]) if config == "VJEPA2Config" else images()
    dense = tensors(model, x)
    elip_models.reduce_(model, strategy="tome:r=0")
    for each, expected in zip(tensors(model, x), dense, strict=True):
        assert torch.equal(each, expected)
    reduced = tensors(elip_models.reduce_(model), x)
    assert [each.shape for each in reduced] == [each.shape for each in dense]
    assert all(each.isfinite().all() for each in reduced)
    assert not all(torch.equal(a, b) for a, b in zip(reduced, dense, strict=True))


@pytest.mark.parametrize(
    "layer",
    slow_except([], ["Data2VecVisionLayer", "MLCDEncoderLayer"]),
)
def test_checkpointing_and_compiling_repeat_layers_that_read_their_own_positions(layer):
    model, x = elip_models.reduce_(model_of(layer).train()), inputs(layer)
    found = []
    for checkpoint in (False, True):
        model.zero_grad()
        if checkpoint:
            model.gradient_checkpointing_enable()
        torch.manual_seed(0)
        features(model, x).square().sum().backward()
        found.append({n: w.grad for n, w in model.named_parameters() if w.grad is not None})
    assert_equal_gradients(*found, atol=1e-5, rtol=1e-4)
    model.gradient_checkpointing_disable()
    model.eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(features(compiled, x), features(model, x))


BEIT = HF | {"use_relative_position_bias": True}


def beit(name, **options):
    return enlarged(getattr(transformers, name)(transformers.BeitConfig(**(BEIT | options)))).eval()


@pytest.mark.parametrize("name", ["BeitModel", "BeitForImageClassification"])
@torch.no_grad()
def test_a_pooler_that_averages_counts_tokens_by_their_size(name):
    model, x = beit(name), images()
    tower = as_tower(model)
    assert tower.pools
    seen = []
    tower.blocks[-1].register_forward_hook(lambda module, args, out: seen.append(out))
    model(x)
    elip_models.reduce_(model)(x)
    assert seen[0].shape == seen[1].shape and not torch.equal(*seen)
