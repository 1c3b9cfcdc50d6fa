"""A tiny config of each family of multimodal language models, and pixels of a batch for it."""

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
import transformers as hf
from torch import Tensor

PAD, IMAGE, VIDEO, VOCABULARY = 0, 100, 101, 120

TEXT = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=VOCABULARY,
    max_position_embeddings=512,
    pad_token_id=PAD,
    bos_token_id=1,
    eos_token_id=2,
)
VISION = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=32,
    patch_size=8,
)
QWEN_VISION = dict(
    depth=2, hidden_size=32, intermediate_size=48, num_heads=4, patch_size=4, out_hidden_size=32
)
TOKENS = dict(image_token_index=IMAGE)
BOTH = dict(image_token_index=IMAGE, video_token_index=VIDEO)
TILES = dict(image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]])


def images(count: int, *shape: int) -> Tensor:
    """Return random images."""
    return torch.randn(count, *shape, 3, 32, 32)


def clip() -> Any:
    return hf.CLIPVisionConfig(**VISION, projection_dim=32)


def siglip() -> Any:
    return hf.SiglipVisionConfig(**VISION, vision_use_head=False)


def pixtral() -> Any:
    return hf.PixtralVisionConfig(**VISION, head_dim=8)


def llama() -> Any:
    return hf.LlamaConfig(**TEXT)


def qwen2() -> Any:
    return hf.Qwen2Config(**TEXT)


def cohere2() -> Any:
    return hf.Cohere2Config(**TEXT, sliding_window=256, layer_types=_mixed())


def _mixed() -> list[str]:
    return ["sliding_attention", "sliding_attention", "full_attention"]


def aya_vision() -> tuple[Any, dict]:
    return hf.AyaVisionConfig(vision_config=siglip(), text_config=cohere2(), **TOKENS), {
        "pixel_values": images(3)
    }


def cohere2_vision() -> tuple[Any, dict]:
    config = hf.Cohere2VisionConfig(
        vision_config=siglip(),
        text_config=cohere2(),
        image_token_id=IMAGE,
        alignment_intermediate_size=32,
    )
    return config, {"pixel_values": images(3)}


def fast_vlm() -> tuple[Any, dict]:
    tower = hf.TimmWrapperConfig(
        architecture="fastvit_mci3",
        model_args=dict(
            inference_mode=True,
            layers=(2, 2),
            embed_dims=(16, 32),
            mlp_ratios=(4, 4),
            se_downsamples=(False, False),
            downsamples=(False, True),
            pos_embs=(None, None),
            token_mixers=("repmixer", "attention"),
            lkc_use_act=True,
            stem_use_scale_branch=False,
        ),
        hidden_size=64,
    )
    config = hf.FastVlmConfig(vision_config=tower, text_config=qwen2(), image_token_id=IMAGE)
    return config, {"pixel_values": images(3)}


def gemma3() -> tuple[Any, dict]:
    text = hf.Gemma3TextConfig(**TEXT, sliding_window=256, layer_types=_mixed())
    config = hf.Gemma3Config(
        text_config=text, vision_config=siglip(), mm_tokens_per_image=16, **TOKENS
    )
    return config, {"pixel_values": images(3)}


def got_ocr2() -> tuple[Any, dict]:
    tower = hf.GotOcr2VisionConfig(
        hidden_size=32,
        output_channels=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=128,
        patch_size=8,
        window_size=4,
        global_attn_indexes=[1],
        mlp_dim=48,
    )
    config = hf.GotOcr2Config(vision_config=tower, text_config=qwen2(), image_token_id=IMAGE)
    return config, {"pixel_values": torch.randn(3, 3, 128, 128)}


def idefics2() -> tuple[Any, dict]:
    perceiver = dict(
        hidden_size=32,
        resampler_n_latents=9,
        resampler_depth=2,
        resampler_n_heads=4,
        resampler_head_dim=8,
        num_key_value_heads=2,
    )
    config = hf.Idefics2Config(
        vision_config=VISION,
        perceiver_config=perceiver,
        text_config=hf.MistralConfig(**TEXT, sliding_window=None),
        image_token_id=IMAGE,
    )
    return config, {"pixel_values": _padded_images()}


def idefics3() -> tuple[Any, dict]:
    config = hf.Idefics3Config(vision_config=VISION, text_config=llama(), image_token_id=IMAGE)
    return config, {"pixel_values": _padded_images()}


def smolvlm() -> tuple[Any, dict]:
    config = hf.SmolVLMConfig(vision_config=VISION, text_config=llama(), image_token_id=IMAGE)
    return config, {"pixel_values": _padded_images()}


def _padded_images() -> Tensor:
    """Return two images for each row, of which the second of the first row is padding."""
    pixels = images(2, 2)
    pixels[0, 1] = 0
    return pixels


def internvl() -> tuple[Any, dict]:
    tower = hf.InternVLVisionConfig(**VISION)
    tower.image_size, tower.patch_size = (32, 32), (8, 8)
    config = hf.InternVLConfig(vision_config=tower, text_config=qwen2(), image_token_id=IMAGE)
    return config, {"pixel_values": images(3)}


def llava() -> tuple[Any, dict]:
    return hf.LlavaConfig(vision_config=clip(), text_config=llama(), **TOKENS), {
        "pixel_values": images(3)
    }


def llava_pixtral() -> tuple[Any, dict]:
    config = hf.LlavaConfig(
        vision_config=pixtral(),
        text_config=llama(),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        **TOKENS,
    )
    return config, _images_of_sizes()


def _images_of_sizes() -> dict:
    return {"pixel_values": images(3), "image_sizes": torch.tensor([[32, 32], [16, 32], [32, 16]])}


def vipllava() -> tuple[Any, dict]:
    config = hf.VipLlavaConfig(
        vision_config=clip(), text_config=llama(), vision_feature_layers=[-1, -2], **TOKENS
    )
    return config, {"pixel_values": images(3)}


def llava_next() -> tuple[Any, dict]:
    return hf.LlavaNextConfig(
        vision_config=clip(), text_config=llama(), **TILES, **TOKENS
    ), _tiles()


def _tiles() -> dict:
    sizes = torch.tensor([[30, 60], [60, 60], [50, 32]])
    return {"pixel_values": images(3, 5), "image_sizes": sizes}


def llava_next_video() -> tuple[Any, dict]:
    return hf.LlavaNextVideoConfig(
        vision_config=clip(), text_config=llama(), **TILES, **BOTH
    ), _tiles()


def llava_next_video_video() -> tuple[Any, dict]:
    config, inputs = llava_next_video()
    return config, _with_video(inputs)


def llava_onevision() -> tuple[Any, dict]:
    return hf.LlavaOnevisionConfig(
        vision_config=siglip(), text_config=qwen2(), **TILES, **BOTH
    ), _tiles()


def llava_onevision_video() -> tuple[Any, dict]:
    config, inputs = llava_onevision()
    return config, _with_video(inputs)


def _with_video(inputs: dict) -> dict:
    first = {name: value[:2] for name, value in inputs.items()}
    return first | {"pixel_values_videos": images(1, 4)}


def mistral3() -> tuple[Any, dict]:
    text = hf.MistralConfig(**TEXT, sliding_window=None)
    return hf.Mistral3Config(
        vision_config=pixtral(), text_config=text, spatial_merge_size=2, **TOKENS
    ), _images_of_sizes()


def paligemma() -> tuple[Any, dict]:
    config = hf.PaliGemmaConfig(
        vision_config=siglip(), text_config=hf.GemmaConfig(**TEXT), projection_dim=32, **TOKENS
    )
    return config, {"pixel_values": images(3)}


def paligemma2() -> tuple[Any, dict]:
    text = hf.Gemma2Config(**TEXT, sliding_window=256, query_pre_attn_scalar=8)
    config = hf.PaliGemmaConfig(
        vision_config=siglip(), text_config=text, projection_dim=32, **TOKENS
    )
    return config, {"pixel_values": images(3)}


def perception_lm() -> tuple[Any, dict]:
    tower = hf.TimmWrapperConfig(
        architecture="vit_pe_core_large_patch14_336",
        model_args=dict(
            embed_dim=32,
            img_size=(32, 32),
            patch_size=8,
            depth=2,
            num_heads=4,
            global_pool="",
            use_post_transformer_norm=False,
            init_values=0.1,
            ref_feat_shape=(4, 4),
        ),
    )
    config = hf.PerceptionLMConfig(
        vision_config=tower,
        text_config=llama(),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        projector_pooling_ratio=2,
    )
    return config, {"pixel_values": images(3, 2)}


def perception_lm_video() -> tuple[Any, dict]:
    return perception_lm()[0], {"pixel_values": images(2, 1), "pixel_values_videos": images(1, 4)}


def video_llava() -> tuple[Any, dict]:
    config = hf.VideoLlavaConfig(vision_config=clip(), text_config=llama(), **BOTH)
    arguments = signature(hf.VideoLlavaModel.forward).parameters
    name = "pixel_values" if "pixel_values" in arguments else "pixel_values_images"
    return config, {name: images(3)}  # the second before transformers 5.23


def video_llava_video() -> tuple[Any, dict]:
    config, inputs = video_llava()
    inputs = {name: value[:2] for name, value in inputs.items()}
    return config, inputs | {"pixel_values_videos": images(1, 4)}


def qwen2_vl() -> tuple[Any, dict]:
    vision = dict(depth=2, embed_dim=32, hidden_size=32, num_heads=4, mlp_ratio=2, patch_size=4)
    return _qwen(hf.Qwen2VLConfig, vision), _patches()


def qwen2_5_vl() -> tuple[Any, dict]:
    vision = QWEN_VISION | dict(window_size=16, fullatt_block_indexes=[1])
    return _qwen(hf.Qwen2_5_VLConfig, vision), _patches()


def qwen3_vl() -> tuple[Any, dict]:
    vision = QWEN_VISION | dict(num_position_embeddings=64, deepstack_visual_indexes=[0, 1])
    return _qwen(hf.Qwen3VLConfig, vision), _patches()


def _qwen(config: Any, vision: dict) -> Any:
    rope = dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=1e4)
    return config(
        vision_config=vision | {"in_channels": 3},
        text_config=TEXT | {"rope_parameters": rope},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=102,
        vision_end_token_id=103,
    )


def _patches() -> dict:
    grids = torch.tensor([[1, 8, 8], [1, 4, 8], [1, 8, 4]])
    return {"pixel_values": _flat(grids), "image_grid_thw": grids}


def _flat(grids: Tensor) -> Tensor:
    return torch.randn(int(grids.prod(1).sum()), 3 * 2 * 4 * 4)


def _qwen_video(case: Callable) -> Callable:
    def video() -> tuple[Any, dict]:
        image, clip = torch.tensor([[1, 4, 8], [1, 8, 8]]), torch.tensor([[3, 4, 8]])
        return case()[0], {
            "pixel_values": _flat(image),
            "image_grid_thw": image,
            "pixel_values_videos": _flat(clip),
            "video_grid_thw": clip,
        }

    return video


CASES: dict[str, Callable] = {
    each.__name__: each
    for each in (
        aya_vision,
        cohere2_vision,
        fast_vlm,
        gemma3,
        got_ocr2,
        idefics2,
        idefics3,
        internvl,
        llava,
        llava_next,
        llava_next_video,
        llava_next_video_video,
        llava_onevision,
        llava_onevision_video,
        llava_pixtral,
        mistral3,
        paligemma,
        paligemma2,
        perception_lm,
        perception_lm_video,
        qwen2_5_vl,
        qwen2_vl,
        qwen3_vl,
        smolvlm,
        video_llava,
        video_llava_video,
        vipllava,
    )
} | {f"{case.__name__}_video": _qwen_video(case) for case in (qwen2_5_vl, qwen2_vl, qwen3_vl)}
"""A config and the pixels of a batch, by name."""
EAGER_TOWER = {"got_ocr2", "fast_vlm", "perception_lm", "perception_lm_video"}
EAGER = {"paligemma2"}
"""The cases whose image tower, and whose language model, has eager attention alone."""
