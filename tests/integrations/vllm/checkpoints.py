"""Tiny random models with processor and tokenizer, in folders that vLLM serves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers as hf

from benchmarks.random_models import (
    END,
    IMAGE,
    VIDEO,
    VISION_END,
    VISION_START,
    byte_tokenizer,
    qwen_vl,
    save_model,
)
from benchmarks.random_models import llava as make_llava
from benchmarks.random_models import qwen2_5_vl as make_qwen2_5_vl

WIDTH = dict(hidden_size=128, intermediate_size=256, num_attention_heads=4)
TEXT = WIDTH | dict(
    vocab_size=512, num_hidden_layers=2, num_key_value_heads=2, max_position_embeddings=4096
)
QWEN = dict(depth=2, hidden_size=128, num_heads=4, out_hidden_size=128, patch_size=14)


def text_config(cls: type, token: Callable[[str], int], **settings: Any) -> Any:
    return cls(**TEXT, bos_token_id=token(END), eos_token_id=token(END), **settings)


def qwen2_5_vl() -> Any:
    vision = dict(intermediate_size=256, window_size=112, fullatt_block_indexes=[1])
    return make_qwen2_5_vl(TEXT, QWEN | vision, units=64)


def clip() -> Any:
    return hf.CLIPVisionConfig(
        **WIDTH, num_hidden_layers=2, image_size=112, patch_size=14, projection_dim=128
    )


def llava() -> Any:
    return make_llava(TEXT, WIDTH | dict(num_hidden_layers=2, projection_dim=128), pixels=112)


def llava_next() -> Any:
    tokenizer = byte_tokenizer(IMAGE)
    token = tokenizer.convert_tokens_to_ids
    tiles = [[112, 224], [224, 112], [224, 224]]
    settings = hf.LlavaNextConfig(
        text_config=text_config(hf.LlamaConfig, token),
        vision_config=clip(),
        image_token_index=token(IMAGE),
        vision_feature_layer=-1,
        image_grid_pinpoints=tiles,
    )
    side = dict(height=112, width=112)
    images = hf.LlavaNextImageProcessor(
        size={"shortest_edge": 112}, crop_size=side, image_grid_pinpoints=tiles
    )
    return settings, hf.LlavaNextProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=tokenizer.chat_template,
    )


def llava_onevision() -> Any:
    tokenizer = byte_tokenizer(IMAGE)
    token = tokenizer.convert_tokens_to_ids
    tiles = [[112, 224], [224, 112], [224, 224]]
    tower = hf.SiglipVisionConfig(
        **WIDTH, num_hidden_layers=2, image_size=112, patch_size=14, vision_use_head=False
    )
    settings = hf.LlavaOnevisionConfig(
        text_config=text_config(hf.Qwen2Config, token),
        vision_config=tower,
        image_token_index=token(IMAGE),
        video_token_index=token(VIDEO),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=tiles,
    )
    size = dict(height=112, width=112)
    return settings, hf.LlavaOnevisionProcessor(
        image_processor=hf.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=tiles),
        video_processor=hf.LlavaOnevisionVideoProcessor(size=size),
        tokenizer=tokenizer,
        num_image_tokens=64,
        vision_feature_select_strategy="full",
        image_token=IMAGE,
        video_token=VIDEO,
        chat_template=tokenizer.chat_template,
    )


def qwen2_vl() -> Any:
    vision = QWEN | dict(embed_dim=128, mlp_ratio=2)
    classes = hf.Qwen2VLConfig, hf.Qwen2VLProcessor, hf.Qwen2VLVideoProcessor
    return qwen_vl(*classes, text=TEXT, vision=vision, units=64)


def qwen3_vl() -> Any:
    vision = QWEN | dict(
        intermediate_size=256, num_position_embeddings=64, deepstack_visual_indexes=[0, 1]
    )
    classes = hf.Qwen3VLConfig, hf.Qwen3VLProcessor, hf.Qwen3VLVideoProcessor
    return qwen_vl(*classes, text=TEXT | dict(head_dim=32), vision=vision, units=64)


def internvl() -> Any:
    tokenizer = byte_tokenizer(
        IMAGE,
        start_image_token=VISION_START,
        end_image_token=VISION_END,
        context_image_token=IMAGE,
        video_token=VIDEO,
    )
    token = tokenizer.convert_tokens_to_ids
    tower = hf.InternVLVisionConfig(**WIDTH, num_hidden_layers=2, image_size=112, patch_size=14)
    settings = hf.InternVLConfig(
        text_config=text_config(hf.Qwen2Config, token),
        vision_config=tower,
        image_token_id=token(IMAGE),
        image_seq_length=16,
    )
    size = dict(height=112, width=112)
    return settings, hf.InternVLProcessor(
        image_processor=hf.GotOcr2ImageProcessor(size=size, crop_to_patches=True, max_patches=4),
        video_processor=hf.InternVLVideoProcessor(size=size),
        tokenizer=tokenizer,
        image_seq_length=16,
        chat_template=tokenizer.chat_template,
    )


MODELS: dict[str, Callable[[], Any]] = {
    model.__name__: model
    for model in (
        internvl,
        llava,
        llava_next,
        llava_onevision,
        qwen2_vl,
        qwen2_5_vl,
        qwen3_vl,
    )
}
"""The config and the processor of a family by `config.model_type`."""


def save_checkpoint(family: str, folder: Path) -> Path:
    """Write a model of a family, and return the folder."""
    return save_model(*MODELS[family](), folder)
