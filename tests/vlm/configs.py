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
WINDOWED = QWEN_VISION | dict(window_size=16, fullatt_block_indexes=[1])
MROPE = dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=1e4)
INDEX, ID = dict(image_token_index=IMAGE), dict(image_token_id=IMAGE)
BOTH = INDEX | dict(video_token_index=VIDEO)
TILES = dict(image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]])
MIXED = dict(
    sliding_window=256, layer_types=["sliding_attention", "sliding_attention", "full_attention"]
)
EXPERTS = dict(num_experts_per_tok=2, num_local_experts=4, moe_intermediate_size=16)
SHARED = dict(
    num_kv_shared_layers=1, layer_types=["sliding_attention", "full_attention", "full_attention"]
)
LINEAR = dict(
    layer_types=["linear_attention", "full_attention", "linear_attention"],
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
)
MISTRAL = hf.MistralConfig(**TEXT, sliding_window=None)

clip = partial(hf.CLIPVisionConfig, **VISION, projection_dim=32)
siglip = partial(hf.SiglipVisionConfig, **VISION, vision_use_head=False)
pixtral = partial(hf.PixtralVisionConfig, **VISION, head_dim=8)
llama = partial(hf.LlamaConfig, **TEXT)
qwen2 = partial(hf.Qwen2Config, **TEXT)
cohere2 = partial(hf.Cohere2Config, **TEXT, **MIXED)


def aria() -> Any:
    experts = dict(moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1)
    return hf.AriaConfig(
        vision_config=hf.Idefics3VisionConfig(**VISION),
        text_config=hf.AriaTextConfig(**TEXT, **experts),
        projector_patch_to_query_dict={16: 9},
        **INDEX,
    )


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


def got_ocr2(config: Any, tower: Any) -> Any:
    tower = tower(
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
    return config(vision_config=tower, text_config=qwen2(), **ID)


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


def gemma3(config: Any) -> Any:
    text = hf.Gemma3TextConfig(**TEXT, **MIXED)
    return config(text_config=text, vision_config=siglip(), mm_tokens_per_image=16, **INDEX)


def gemma3n() -> Any:
    """Return a config whose vision and audio tokens follow the text in the vocabulary."""
    tower = hf.Gemma3nVisionConfig(
        architecture="test_convnext", hidden_size=64, vocab_offset=96, vocab_size=8
    )
    audio = hf.Gemma3nAudioConfig(
        hidden_size=32, conf_num_hidden_layers=1, vocab_offset=104, vocab_size=16
    )
    per_layer = dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=96)
    text = hf.Gemma3nTextConfig(
        **TEXT, **per_layer, **SHARED, sliding_window=256, laurel_rank=4, altup_num_inputs=2
    )
    return hf.Gemma3nConfig(
        text_config=text,
        vision_config=tower,
        audio_config=audio,
        vision_soft_tokens_per_image=16,
        audio_token_id=105,
        **ID,
    )


def gemma4(**text: Any) -> Any:
    sizes = TEXT | dict(hidden_size=16)  # a square, whose root scales embeddings without rounding
    sizes |= dict(sliding_window=256, global_head_dim=8, vocab_size_per_layer_input=VOCABULARY)
    return hf.Gemma4Config(
        text_config=hf.Gemma4TextConfig(**sizes | text),
        vision_config=hf.Gemma4VisionConfig(
            **SIZES,
            num_key_value_heads=4,
            head_dim=8,
            num_hidden_layers=2,
            patch_size=4,
            pooling_kernel_size=2,
            position_embedding_size=64,
        ),
        **ID,
        video_token_id=VIDEO,
        audio_token_id=105,
    )


def glm(config: Any, **text: Any) -> Any:
    rope = MROPE | {"partial_rotary_factor": 1.0}
    return config(
        vision_config=QWEN_VISION | dict(image_size=32),
        text_config=TEXT | text | {"rope_parameters": rope},
        **ID,
        video_token_id=VIDEO,
        image_start_token_id=102,
        image_end_token_id=103,
    )


def janus() -> Any:
    tower = hf.JanusVisionConfig(**VISION, projection_dim=32)
    codes = dict(embed_dim=8, num_embeddings=16, latent_channels=8, base_channels=32)
    codes |= dict(channel_multiplier=[1, 1], num_res_blocks=1, projection_dim=32, num_patches=4)
    return hf.JanusConfig(
        vision_config=tower, vq_config=hf.JanusVQVAEConfig(**codes), text_config=llama(), **ID
    )


def llama4() -> Any:
    tower = SIZES | dict(num_hidden_layers=2, image_size=32, patch_size=4)
    tower |= dict(vision_output_dim=32, projector_input_dim=32, projector_output_dim=32)
    experts = dict(num_local_experts=4, intermediate_size_mlp=48, no_rope_layer_interval=3)
    return hf.Llama4Config(
        vision_config=hf.Llama4VisionConfig(**tower | {"intermediate_size": 128}),
        text_config=hf.Llama4TextConfig(**TEXT, **experts, attention_chunk_size=256),
        **INDEX,
    )


def molmo2() -> Any:
    heads = SIZES | dict(num_key_value_heads=4, head_dim=8)
    return hf.Molmo2Config(
        vision_config=heads | dict(num_hidden_layers=2, image_size=[32, 32], patch_size=4),
        adapter_config=heads | dict(vision_feature_layer=[1, 0], text_hidden_size=32),
        text_config=TEXT | dict(vocab_size=96, additional_vocab_size=24),
        image_patch_id=IMAGE,
    )


def omni(config: Any, vision: dict, **text: Any) -> Any:
    audio = dict(encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=32, d_model=32)
    return config(
        audio_config=audio | {"output_dim": 32},
        vision_config=vision,
        text_config=TEXT | text | {"rope_parameters": MROPE},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=105,
        audio_start_token_id=106,
        vision_start_token_id=102,
        vision_end_token_id=103,
    )


def qwen(config: Any, vision: dict, **text: Any) -> Any:
    return config(
        vision_config=vision | {"in_channels": 3},
        text_config=TEXT | text | {"rope_parameters": MROPE},
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


def merged_patches() -> dict:
    """Return random patches of images of VideoLLaMA 3, merged by different numbers."""
    pixels = patches([1, 8, 8], [1, 4, 8], [1, 4, 4])
    pixels["pixel_values"] = pixels["pixel_values"][:, : 3 * 4 * 4]
    return pixels | {"image_merge_sizes": torch.tensor([2, 2, 1])}


def flat_patches() -> dict:
    """Return random patches of images without a second frame."""
    pixels = patches([1, 8, 8], [1, 4, 8], [1, 8, 4])
    return pixels | {"pixel_values": pixels["pixel_values"][:, :48]}


def single_patches() -> dict:
    """Return the same with their colours, rows and columns."""
    pixels = flat_patches()
    return pixels | {"pixel_values": pixels["pixel_values"].view(-1, 3, 4, 4)}


def placed_patches() -> dict:
    """Return random patches of images of Gemma 4, padded to those of the largest."""
    places = torch.full((3, 64, 2), -1)
    for image, (width, height) in zip(places, ((8, 8), (4, 8), (8, 4)), strict=True):
        grid = torch.cartesian_prod(torch.arange(height), torch.arange(width)).flip(1)
        image[: width * height] = grid
    return {"pixel_values": torch.rand(3, 64, 48), "image_position_ids": places}


def shaped_patches() -> dict:
    """Return random patches of images of LFM2-VL, padded to those of the largest."""
    shapes = torch.tensor([[8, 8], [4, 8], [8, 4]])
    real = torch.arange(64) < shapes.prod(1, keepdim=True)
    pixels = {"pixel_values": torch.randn(3, 64, 48), "spatial_shapes": shapes}
    return pixels | {"pixel_attention_mask": real.long()}


def pooled_patches() -> dict:
    """Return random patches of images of Molmo 2, and which of them make a token."""
    patch = torch.arange(3 * 64).view(3, 4, 2, 4, 2).transpose(2, 3)
    pixels = {
        "pixel_values": torch.randn(3, 64, 48),
        "image_token_pooling": patch.reshape(-1, 4),
        "image_grids": torch.tensor([[4, 4, 0, 0]] * 3),
    }
    if "image_num_crops" in signature(hf.Molmo2Model.forward).parameters:  # transformers 5.25
        pixels["image_token_pooling"] %= 64  # among the patches of the image, not of the batch
        pixels["image_num_crops"] = torch.ones(3, dtype=torch.long)
    return pixels


def video_llava_images() -> dict:
    arguments = signature(hf.VideoLlavaModel.forward).parameters
    name = "pixel_values" if "pixel_values" in arguments else "pixel_values_images"
    return {name: images(3)["pixel_values"]}  # the second before transformers 5.23


CONFIGS: dict[str, Callable[[], Any]] = {
    "aria": aria,
    "aya_vision": lambda: hf.AyaVisionConfig(
        vision_config=siglip(), text_config=cohere2(), **INDEX
    ),
    "cohere2_vision": lambda: hf.Cohere2VisionConfig(
        vision_config=siglip(), text_config=cohere2(), **ID, alignment_intermediate_size=32
    ),
    "deepseek_vl": lambda: hf.DeepseekVLConfig(vision_config=siglip(), text_config=llama(), **ID),
    "ernie4_5_vl_moe": lambda: hf.Ernie4_5_VLMoeConfig(
        vision_config=SIZES | dict(depth=2, num_heads=4, patch_size=4),
        text_config=TEXT
        | dict(moe_intermediate_size=[16, 8], moe_k=2, moe_num_experts=4)
        | {"rope_parameters": MROPE},
        **ID,
        video_token_id=VIDEO,
        image_start_token_id=102,
        image_end_token_id=103,
    ),
    "exaone4_5": lambda: hf.Exaone4_5_Config(
        vision_config=WINDOWED | dict(num_key_value_heads=2),
        text_config=hf.Exaone4Config(**TEXT, **MIXED),
        **ID,
        video_token_id=VIDEO,
    ),
    "fast_vlm": fast_vlm,
    "gemma3": lambda: gemma3(hf.Gemma3Config),
    "gemma3n": gemma3n,
    "gemma4": lambda: gemma4(
        **SHARED, hidden_size_per_layer_input=8, use_bidirectional_attention="vision"
    ),
    "glm46v": lambda: glm(hf.Glm46VConfig),
    "glm4v": lambda: glm(hf.Glm4vConfig),
    "glm4v_moe": lambda: glm(hf.Glm4vMoeConfig, **EXPERTS),
    "glm_ocr": lambda: glm(hf.GlmOcrConfig),
    "glmga": lambda: glm(hf.GlmgaConfig),
    "got_ocr2": lambda: got_ocr2(hf.GotOcr2Config, hf.GotOcr2VisionConfig),
    "hyperclovax_vision_v2": lambda: hf.HyperCLOVAXVisionV2Config(
        vision_config=hf.Qwen2_5_VLVisionConfig(**WINDOWED),
        text_config=hf.HyperCLOVAXConfig(**TEXT),
        **ID,
        video_token_id=VIDEO,
    ),
    "idefics2": idefics2,
    "idefics3": lambda: hf.Idefics3Config(vision_config=VISION, text_config=llama(), **ID),
    "internvl": internvl,
    "janus": janus,
    "kimi_k25": lambda: hf.Kimi_K25Config(
        vision_config=SIZES | dict(num_hidden_layers=2, patch_size=4, pos_emb_height=8),
        text_config=hf.DeepseekV3Config(
            **TEXT | dict(num_key_value_heads=4, head_dim=4),
            **EXPERTS,
            **dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=4),
            **dict(v_head_dim=8, n_group=1, topk_group=1, first_k_dense_replace=1),
        ),
        projection_hidden_size=32,
        **ID,
        video_token_id=VIDEO,
        vision_start_token_id=102,
        vision_end_token_id=103,
    ),
    "lfm2_vl": lambda: hf.Lfm2VlConfig(
        vision_config=hf.Siglip2VisionConfig(
            **SIZES, num_hidden_layers=2, patch_size=4, num_patches=64
        ),
        text_config=hf.Lfm2Config(**TEXT, layer_types=["conv", "full_attention", "conv"]),
        projector_hidden_size=32,
        **ID,
    ),
    "lighton_ocr": lambda: hf.LightOnOcrConfig(
        vision_config=pixtral(), text_config=hf.Qwen3Config(**TEXT), spatial_merge_size=2, **ID
    ),
    "llama4": llama4,
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
    "molmo2": molmo2,
    "ovis2": lambda: hf.Ovis2Config(
        vision_config=hf.Ovis2VisionConfig(**VISION, vocab_size=24, num_visual_indicator_tokens=5),
        text_config=qwen2(),
        hidden_size=32,
        vocab_size=VOCABULARY,
        visual_indicator_token_ids=[104, 105, 106, 107, 108],
        **ID,
    ),
    "paddleocr_vl": lambda: hf.PaddleOCRVLConfig(
        vision_config=VISION | dict(patch_size=4),
        text_config=TEXT | {"rope_parameters": MROPE},
        **ID,
        video_token_id=VIDEO,
        vision_start_token_id=102,
        vision_end_token_id=103,
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
    "pp_chart2table": lambda: got_ocr2(hf.PPChart2TableConfig, hf.PPChart2TableVisionConfig),
    "qianfan_ocr": lambda: hf.QianfanOCRConfig(
        vision_config=VISION | dict(image_size=(32, 32), patch_size=(8, 8), drop_path_rate=0.0),
        text_config=hf.Qwen3Config(**TEXT),
        **ID,
    ),
    "qwen2_5_vl": lambda: qwen(hf.Qwen2_5_VLConfig, WINDOWED),
    "qwen2_vl": lambda: qwen(
        hf.Qwen2VLConfig,
        dict(depth=2, embed_dim=32, hidden_size=32, num_heads=4, mlp_ratio=2, patch_size=4),
    ),
    "qwen2_5_omni_thinker": lambda: omni(hf.Qwen2_5OmniThinkerConfig, WINDOWED),
    "qwen3_omni_moe_thinker": lambda: omni(
        hf.Qwen3OmniMoeThinkerConfig,
        QWEN_VISION | dict(num_position_embeddings=64, deepstack_visual_indexes=[0, 1]),
        **EXPERTS,
        num_experts=4,
    ),
    "qwen3_5": lambda: qwen(
        hf.Qwen3_5Config, QWEN_VISION | dict(num_position_embeddings=64), **LINEAR
    ),
    "qwen3_5_moe": lambda: qwen(
        hf.Qwen3_5MoeConfig,
        QWEN_VISION | dict(num_position_embeddings=64),
        **LINEAR,
        **EXPERTS,
        num_experts=4,
        shared_expert_intermediate_size=16,
    ),
    "qwen3_vl": lambda: qwen(
        hf.Qwen3VLConfig,
        QWEN_VISION | dict(num_position_embeddings=64, deepstack_visual_indexes=[0, 1]),
    ),
    "qwen3_vl_moe": lambda: qwen(
        hf.Qwen3VLMoeConfig,
        QWEN_VISION | dict(num_position_embeddings=64, deepstack_visual_indexes=[0, 1]),
        **EXPERTS,
    ),
    "shieldgemma2": lambda: gemma3(hf.ShieldGemma2Config),
    "smolvlm": lambda: hf.SmolVLMConfig(vision_config=VISION, text_config=llama(), **ID),
    "video_llama_3": lambda: hf.VideoLlama3Config(
        vision_config=SIZES | dict(num_hidden_layers=2, patch_size=4),
        text_config=qwen2(),
        **ID,
        video_token_id=VIDEO,
    ),
    "video_llava": lambda: hf.VideoLlavaConfig(vision_config=clip(), text_config=llama(), **BOTH),
    "vipllava": lambda: hf.VipLlavaConfig(
        vision_config=clip(), text_config=llama(), vision_feature_layers=[-1, -2], **INDEX
    ),
}
RETRIEVAL = {
    "colpali": (hf.ColPaliConfig, hf.ColPaliForRetrieval, "paligemma"),
    "colqwen2": (hf.ColQwen2Config, hf.ColQwen2ForRetrieval, "qwen2_vl"),
}
"""The config, the model and the language model of a retrieval model, by `config.model_type`."""


def retrieval_model(name: str) -> Any:
    config, model, inner = RETRIEVAL[name]
    return model(config(vlm_config=CONFIGS[inner](), embedding_dim=16))


OMNI = ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker")
GLM = ("glm46v", "glm4v", "glm4v_moe", "glm_ocr", "glmga")
QWEN = ("qwen3_5", "qwen3_5_moe", "qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe")
PIXELS: dict[str, Callable[[], dict]] = {
    **dict.fromkeys(
        ("gemma3n", "got_ocr2", "pp_chart2table"),
        lambda: {"pixel_values": torch.randn(3, 3, 128, 128)},
    ),
    "ernie4_5_vl_moe": flat_patches,
    **dict.fromkeys(("kimi_k25", "paddleocr_vl"), single_patches),
    "gemma4": placed_patches,
    "lfm2_vl": shaped_patches,
    "molmo2": pooled_patches,
    **dict.fromkeys(("idefics2", "idefics3", "smolvlm"), padded_images),
    **dict.fromkeys(("lighton_ocr", "llava_pixtral", "mistral3"), images_of_sizes),
    **dict.fromkeys(("llava_next", "llava_next_video", "llava_onevision"), tiles),
    "perception_lm": lambda: images(3, 2),
    "video_llama_3": merged_patches,
    "video_llava": video_llava_images,
    **dict.fromkeys(
        (*QWEN, *GLM, *OMNI, "exaone4_5", "hyperclovax_vision_v2"),
        lambda: patches([1, 8, 8], [1, 4, 8], [1, 8, 4]),
    ),
}
"""Pixels of a batch; of the other families three images."""
VIDEOS: dict[str, Callable[[], dict]] = {
    **dict.fromkeys(("llava_next_video", "llava_onevision"), partial(with_video, tiles)),
    "perception_lm": partial(with_video, lambda: images(2, 1)),
    "video_llava": partial(with_video, video_llava_images),
    **dict.fromkeys(QWEN, qwen_video),
}
"""Pixels of a batch with a clip."""


def case(name: str, pixels: Callable[[], dict]) -> tuple[Any, dict]:
    return CONFIGS[name](), pixels()


CASES: dict[str, Callable[[], tuple[Any, dict]]] = {
    **{name: partial(case, name, PIXELS.get(name, partial(images, 3))) for name in CONFIGS},
    **{f"{name}_video": partial(case, name, pixels) for name, pixels in VIDEOS.items()},
}
"""A config and the pixels of a batch, by name."""
EAGER_TOWER = {"got_ocr2", "pp_chart2table", "fast_vlm", "perception_lm", "perception_lm_video"}
EAGER = {"paligemma2"}
"""The cases whose image tower, and whose language model, has eager attention alone."""
IN_FP64 = {"gemma4", "qwen3_5", "qwen3_5_moe"}
"""The families whose rounding in fp32, which eager attention needs, is not below 1e-6."""


def attentions(name: str) -> tuple[str, ...]:
    """Return the implementations of attention with which a case is tested."""
    if name in EAGER:
        return ("eager",)
    return ("sdpa",) if name.removesuffix("_video") in IN_FP64 else ("sdpa", "eager")
