"""Multimodal language models of random weights with processor and tokenizer, in folders.

python -m benchmarks.random_models FOLDER writes a LLaVA of 576 image tokens.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers

END, IMAGE, VIDEO = "<|im_end|>", "<|image_pad|>", "<|video_pad|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
SPECIAL = (END, IMAGE, VIDEO, VISION_START, VISION_END)
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for c in m['content'] %}{% if c['type'] in ('image', 'image_url') %}PLACEHOLDER"
    "{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}\n{% endfor %}"
)
LARGE_TEXT = dict(
    hidden_size=512,
    intermediate_size=2048,
    num_hidden_layers=16,
    num_attention_heads=8,
    num_key_value_heads=8,
    vocab_size=1024,
    max_position_embeddings=4096,
)
LARGE_VISION = dict(
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=8,
    num_attention_heads=8,
    projection_dim=256,
)
"""A tower with a twentieth of the arithmetic of `LARGE_TEXT`, as in a LLaVA of 7B."""
LARGE_QWEN = dict(
    hidden_size=256,
    intermediate_size=512,
    depth=8,
    num_heads=8,
    out_hidden_size=512,
    patch_size=14,
    window_size=112,
    fullatt_block_indexes=[3, 7],
)
"""A tower with a third of the arithmetic of `LARGE_TEXT`, as in a Qwen2.5-VL of 7B."""
OLD_TOWERS = ("clip_vision_model", "siglip_vision_model")
"""The image towers whose weights have other names in the checkpoints that vLLM reads."""


def byte_tokenizer(placeholder: str, **names: str) -> Any:
    """Return a tokenizer of bytes; its chat template writes `placeholder` for an image.

    `names` are attributes for special tokens.
    """
    vocab = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {token: len(vocab) + i for i, token in enumerate(SPECIAL)}
    tokenizer = transformers.Qwen2Tokenizer(
        vocab=vocab, merges=[], eos_token=END, pad_token=END, extra_special_tokens=names
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    tokenizer.chat_template = TEMPLATE.replace("PLACEHOLDER", placeholder)
    return tokenizer


def llava(
    text: dict[str, Any] = LARGE_TEXT, vision: dict[str, Any] = LARGE_VISION, pixels: int = 336
) -> tuple[Any, Any]:
    """Return the config and the processor of a LLaVA for images of `pixels` x `pixels`."""
    tokenizer = byte_tokenizer(IMAGE)
    end, image = tokenizer.convert_tokens_to_ids([END, IMAGE])
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**text, bos_token_id=end, eos_token_id=end),
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=pixels, patch_size=14),
        image_token_index=image,
        vision_feature_layer=-1,
    )
    images = transformers.CLIPImageProcessor(
        size={"shortest_edge": pixels}, crop_size={"height": pixels, "width": pixels}
    )
    return config, transformers.LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=tokenizer.chat_template,
    )


def qwen2_5_vl(
    text: dict[str, Any] = LARGE_TEXT, vision: dict[str, Any] = LARGE_QWEN, units: int = 1280
) -> tuple[Any, Any]:
    """Return the config and the processor of a Qwen2.5-VL for images of at most `units` tokens."""
    return qwen_vl(
        transformers.Qwen2_5_VLConfig,
        transformers.Qwen2_5_VLProcessor,
        transformers.Qwen2VLVideoProcessor,
        text=text,
        vision=vision,
        units=units,
    )


def qwen_vl(
    config: type,
    processor: type,
    videos: type,
    *,
    text: dict[str, Any],
    vision: dict[str, Any],
    units: int,
) -> tuple[Any, Any]:
    """Return the config and the processor of a model of the Qwen-VL series.

    Args:
        config: its class.
        processor: its class.
        videos: the class of its processor of clips.
        text: the settings of the language model.
        vision: those of the image tower.
        units: the most tokens of an image.
    """
    tokenizer = byte_tokenizer(VISION_START + IMAGE + VISION_END)
    end, image, video, start, stop = tokenizer.convert_tokens_to_ids(
        [END, IMAGE, VIDEO, VISION_START, VISION_END]
    )
    eighth = text["hidden_size"] // text["num_attention_heads"] // 16
    rope = {"rope_type": "default", "rope_theta": 1e4}
    rope["mrope_section"] = [2 * eighth, 3 * eighth, 3 * eighth]
    if config is transformers.Qwen3VLConfig:
        rope["mrope_interleaved"] = True
    ends = {"bos_token_id": end, "eos_token_id": end}
    settings = config(
        text_config=text | ends | {"rope_parameters": rope},
        vision_config=vision,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=stop,
        tie_word_embeddings=False,
        **ends,
    )
    images = transformers.Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=28 * 28 * units)
    return settings, processor(
        image_processor=images,
        tokenizer=tokenizer,
        video_processor=videos(),
        chat_template=tokenizer.chat_template,
    )


def save_model(config: Any, processor: Any, folder: Path) -> Path:
    """Write a model of random weights and its processor; return the folder."""
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():  # larger than in training, so that image and position count
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(4.0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if config.vision_config.model_type in OLD_TOWERS:
        file, prefix = folder / "model.safetensors", "vision_tower."
        weights = {
            name.replace(prefix, f"{prefix}vision_model."): weight
            for name, weight in load_file(file).items()
        }
        save_file(weights, file, metadata={"format": "pt"})
    return folder


if __name__ == "__main__":
    save_model(*llava(), Path(sys.argv[1]))
