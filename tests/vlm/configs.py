"""A tiny config of each family of multimodal language models, and pixels of a batch for it."""

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

import torch
import transformers as hf

PAD, IMAGE, VIDEO, VOCABULARY = 0, 100, 101, 120

SIZES = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4)
TEXT = SIZES | dict(
    num_hidden_layers=3,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=VOCABULARY,
    max_position_embeddings=512,
    pad_token_id=PAD,
    bos_token_id=1,
    eos_token_id=2,
)
VISION = SIZES | dict(num_hidden_layers=2, image_size=32, patch_size=8)
QWEN_VISION = dict(
    depth=2, hidden_size=32, intermediate_size=48, num_heads=4, patch_size=4, out_hidden_size=32
)
INDEX, ID = dict(image_token_index=IMAGE), dict(image_token_id=IMAGE)
BOTH = INDEX | dict(video_token_index=VIDEO)
TILES = dict(image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]])
MIXED = dict(
    sliding_window=256, layer_types=["sliding_attention", "sliding_attention", "full_attention"]
)
MISTRAL = hf.MistralConfig(**TEXT, sliding_window=None)

clip = partial(hf.CLIPVisionConfig, **VISION, projection_dim=32)
siglip = partial(hf.SiglipVisionConfig, **VISION, vision_use_head=False)
pixtral = partial(hf.PixtralVisionConfig, **VISION, head_dim=8)
llama = partial(hf.LlamaConfig, **TEXT)
qwen2 = partial(hf.Qwen2Config, **TEXT)
cohere2 = partial(hf.Cohere2Config, **TEXT, **MIXED)


def fast_vlm() -> Any:
    sizes = dict(layers=(2, 2), embed_dims=(16, 32), mlp_ratios=(4, 4))
    sizes |= dict(se_downsamples=(False, False), downsamples=(False, True), pos_embs=(None, None))
    blocks = dict(token_mixers=("repmixer", "attention"), lkc_use_act=True)
    tower = hf.TimmWrapperConfig(
        architecture="fastvit_mci3",
        model_args=sizes | blocks | dict(inference_mode=True, stem_use_scale_branch=False),
        hidden_size=64,
    )
    return hf.FastVlmConfig(vision_config=tower, text_config=qwen2(), **ID)


def got_ocr2() -> Any:
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
    return hf.GotOcr2Config(vision_config=tower, text_config=qwen2(), **ID)


def idefics2() -> Any:
    perceiver = dict(hidden_size=32, num_key_value_heads=2, resampler_depth=2)
    perceiver |= dict(resampler_n_latents=9, resampler_n_heads=4, resampler_head_dim=8)
    return hf.Idefics2Config(
        vision_config=VISION, perceiver_config=perceiver, text_config=MISTRAL, **ID
    )


def internvl() -> Any:
    tower = hf.InternVLVisionConfig(**VISION)
    tower.image_size, tower.patch_size = (32, 32), (8, 8)
    return hf.InternVLConfig(vision_config=tower, text_config=qwen2(), **ID)


def perception_lm() -> Any:
    sizes = dict(embed_dim=32, img_size=(32, 32), patch_size=8, depth=2, num_heads=4)
    head = dict(global_pool="", use_post_transformer_norm=False, init_values=0.1)
    tower = hf.TimmWrapperConfig(
        architecture="vit_pe_core_large_patch14_336",
        model_args=sizes | head | dict(ref_feat_shape=(4, 4)),
    )
    return hf.PerceptionLMConfig(
        vision_config=tower,
        text_config=llama(),
        **ID,
        video_token_id=VIDEO,
        projector_pooling_ratio=2,
    )


def qwen(config: Any, vision: dict) -> Any:
    rope = dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=1e4)
    return config(
        vision_config=vision | {"in_channels": 3},
        text_config=TEXT | {"rope_parameters": rope},
        **ID,
        video_token_id=VIDEO,
        vision_start_token_id=102,
        vision_end_token_id=103,
    )


def images(*shape: int) -> dict:
    """Return random images."""
    return {"pixel_values": torch.randn(*shape, 3, 32, 32)}


def padded_images() -> dict:
    """Return two images for each row, of which the second of the first row is padding."""
    pixels = images(2, 2)
    pixels["pixel_values"][0, 1] = 0
    return pixels


def images_of_sizes() -> dict:
    return images(3) | {"image_sizes": torch.tensor([[32, 32], [16, 32], [32, 16]])}


def tiles() -> dict:
    return images(3, 5) | {"image_sizes": torch.tensor([[30, 60], [60, 60], [50, 32]])}


def with_video(pixels: Callable[[], dict]) -> dict:
    """Return the first two images and a clip of four frames."""
    first = {name: value[:2] for name, value in pixels().items()}
    return first | {"pixel_values_videos": images(1, 4)["pixel_values"]}


def patches(*grids: list[int], name: str = "image") -> dict:
    """Return random patches of images or clips of Qwen-VL with these grids."""
    count = sum(time * rows * columns for time, rows, columns in grids)
    main = {"image": "pixel_values", "video": "pixel_values_videos"}[name]
    return {main: torch.randn(count, 3 * 2 * 4 * 4), f"{name}_grid_thw": torch.tensor(grids)}


def qwen_video() -> dict:
    return patches([1, 4, 8], [1, 8, 8]) | patches([3, 4, 8], name="video")


def video_llava_images() -> dict:
    arguments = signature(hf.VideoLlavaModel.forward).parameters
    name = "pixel_values" if "pixel_values" in arguments else "pixel_values_images"
    return {name: images(3)["pixel_values"]}  # the second before transformers 5.23


CONFIGS: dict[str, Callable[[], Any]] = {
    "aya_vision": lambda: hf.AyaVisionConfig(
        vision_config=siglip(), text_config=cohere2(), **INDEX
    ),
    "cohere2_vision": lambda: hf.Cohere2VisionConfig(
        vision_config=siglip(), text_config=cohere2(), **ID, alignment_intermediate_size=32
    ),
    "fast_vlm": fast_vlm,
    "gemma3": lambda: hf.Gemma3Config(
        text_config=hf.Gemma3TextConfig(**TEXT, **MIXED),
        vision_config=siglip(),
        mm_tokens_per_image=16,
        **INDEX,
    ),
    "got_ocr2": got_ocr2,
    "idefics2": idefics2,
    "idefics3": lambda: hf.Idefics3Config(vision_config=VISION, text_config=llama(), **ID),
    "internvl": internvl,
    "llava": lambda: hf.LlavaConfig(vision_config=clip(), text_config=llama(), **INDEX),
    "llava_next": lambda: hf.LlavaNextConfig(
        vision_config=clip(), text_config=llama(), **TILES, **INDEX
    ),
    "llava_next_video": lambda: hf.LlavaNextVideoConfig(
        vision_config=clip(), text_config=llama(), **TILES, **BOTH
    ),
    "llava_onevision": lambda: hf.LlavaOnevisionConfig(
        vision_config=siglip(), text_config=qwen2(), **TILES, **BOTH
    ),
    "llava_pixtral": lambda: hf.LlavaConfig(
        vision_config=pixtral(),
        text_config=llama(),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        **INDEX,
    ),
    "mistral3": lambda: hf.Mistral3Config(
        vision_config=pixtral(), text_config=MISTRAL, spatial_merge_size=2, **INDEX
    ),
    "paligemma": lambda: hf.PaliGemmaConfig(
        vision_config=siglip(), text_config=hf.GemmaConfig(**TEXT), projection_dim=32, **INDEX
    ),
    "paligemma2": lambda: hf.PaliGemmaConfig(
        vision_config=siglip(),
        text_config=hf.Gemma2Config(**TEXT, sliding_window=256, query_pre_attn_scalar=8),
        projection_dim=32,
        **INDEX,
    ),
    "perception_lm": perception_lm,
    "qwen2_5_vl": lambda: qwen(
        hf.Qwen2_5_VLConfig, QWEN_VISION | dict(window_size=16, fullatt_block_indexes=[1])
    ),
    "qwen2_vl": lambda: qwen(
        hf.Qwen2VLConfig,
        dict(depth=2, embed_dim=32, hidden_size=32, num_heads=4, mlp_ratio=2, patch_size=4),
    ),
    "qwen3_vl": lambda: qwen(
        hf.Qwen3VLConfig,
        QWEN_VISION | dict(num_position_embeddings=64, deepstack_visual_indexes=[0, 1]),
    ),
    "smolvlm": lambda: hf.SmolVLMConfig(vision_config=VISION, text_config=llama(), **ID),
    "video_llava": lambda: hf.VideoLlavaConfig(vision_config=clip(), text_config=llama(), **BOTH),
    "vipllava": lambda: hf.VipLlavaConfig(
        vision_config=clip(), text_config=llama(), vision_feature_layers=[-1, -2], **INDEX
    ),
}
PIXELS: dict[str, Callable[[], dict]] = {
    "got_ocr2": lambda: {"pixel_values": torch.randn(3, 3, 128, 128)},
    **dict.fromkeys(("idefics2", "idefics3", "smolvlm"), padded_images),
    **dict.fromkeys(("llava_pixtral", "mistral3"), images_of_sizes),
    **dict.fromkeys(("llava_next", "llava_next_video", "llava_onevision"), tiles),
    "perception_lm": lambda: images(3, 2),
    "video_llava": video_llava_images,
    **dict.fromkeys(
        ("qwen2_5_vl", "qwen2_vl", "qwen3_vl"), lambda: patches([1, 8, 8], [1, 4, 8], [1, 8, 4])
    ),
}
"""Pixels of a batch; of the other families three images."""
VIDEOS: dict[str, Callable[[], dict]] = {
    **dict.fromkeys(("llava_next_video", "llava_onevision"), partial(with_video, tiles)),
    "perception_lm": partial(with_video, lambda: images(2, 1)),
    "video_llava": partial(with_video, video_llava_images),
    **dict.fromkeys(("qwen2_5_vl", "qwen2_vl", "qwen3_vl"), qwen_video),
}
"""Pixels of a batch with a clip."""


def case(name: str, pixels: Callable[[], dict]) -> tuple[Any, dict]:
    return CONFIGS[name](), pixels()


CASES: dict[str, Callable[[], tuple[Any, dict]]] = {
    **{name: partial(case, name, PIXELS.get(name, partial(images, 3))) for name in CONFIGS},
    **{f"{name}_video": partial(case, name, pixels) for name, pixels in VIDEOS.items()},
}
"""A config and the pixels of a batch, by name."""
EAGER_TOWER = {"got_ocr2", "fast_vlm", "perception_lm", "perception_lm_video"}
EAGER = {"paligemma2"}
"""The cases whose image tower, and whose language model, has eager attention alone."""
