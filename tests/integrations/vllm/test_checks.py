"""What the plugin refuses when vLLM reads its configuration."""

import pytest
import transformers as hf

pytest.importorskip("vllm", reason="needs vLLM: pip install 'elip-kernels[vllm-test]'")

from tests.integrations.vllm.checkpoints import MODELS
from tests.integrations.vllm.engines import configure

pytestmark = pytest.mark.slow
DEDUP = {"strategy": "dedup"}


def save_config(family, folder):
    config, processor = MODELS[family]()
    config.architectures = [
        f"{type(config).__name__.removesuffix('Config')}ForConditionalGeneration"
    ]
    config.save_pretrained(folder)
    processor.save_pretrained(folder)


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({"keep": 0}, {}, "elip: keep: expected a float"),
        ({"strategy": "fastv"}, {}, "got 'fastv': it acts inside the language model"),
        (
            {"keep": 0.5},
            {"pipeline_parallel_size": 2},
            "--pipeline-parallel-size: expected it unset",
        ),
        ({"keep": 0.5}, {"video_pruning_rate": 0.5}, "--video-pruning-rate: expected it unset"),
        (
            {"keep": 0.5},
            {"enable_lora": True, "enable_tower_connector_lora": True},
            "--enable-tower-connector-lora: expected it unset",
        ),
        (
            {"keep": 0.5},
            {"compilation_config": {"cudagraph_mm_encoder": True}},
            "cudagraph_mm_encoder: expected it unset",
        ),
        (DEDUP, {"enable_mm_embeds": True}, "--enable-mm-embeds: expected it unset"),
        (DEDUP, {"mm_encoder_tp_mode": "data"}, "--mm-encoder-tp-mode: expected it unset"),
        (
            DEDUP,
            {"mm_encoder_attn_backend": "FLASHINFER"},
            "--mm-encoder-attn-backend: expected it unset",
        ),
    ],
)
def test_settings_and_options_that_do_not_fit_are_refused(tmp_path, settings, options, message):
    save_config("qwen2_5_vl", tmp_path)
    with pytest.raises(ValueError, match=message):
        configure(tmp_path, settings, **options)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
def test_a_draft_model_is_refused_where_positions_travel_with_features(tmp_path, family):
    save_config(family, tmp_path)
    draft = {"method": "draft_model", "model": str(tmp_path), "num_speculative_tokens": 2}
    ngram = {"method": "ngram", "prompt_lookup_max": 2, "num_speculative_tokens": 2}
    assert configure(tmp_path, {"keep": 0.5}, speculative_config=ngram)
    assert configure(tmp_path, None, speculative_config=draft)
    if family == "llava":
        assert configure(tmp_path, {"keep": 0.5}, speculative_config=draft)
        return
    message = "--speculative-config: expected it unset .* a method without one: ngram"
    with pytest.raises(ValueError, match=message):
        configure(tmp_path, {"keep": 0.5}, speculative_config=draft)


def test_dedup_is_refused_where_the_image_tower_needs_every_patch(tmp_path):
    save_config("llava", tmp_path)
    with pytest.raises(ValueError, match=r"strategy: expected one that reduces Llava.* got dedup"):
        configure(tmp_path, DEDUP)


SMALL = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            hf.PaliGemmaConfig(
                text_config=hf.GemmaConfig(**SMALL, num_key_value_heads=1, head_dim=32),
                vision_config=hf.SiglipVisionConfig(**SMALL),
                architectures=["PaliGemmaForConditionalGeneration"],
            ),
            "got PaliGemmaForConditionalGeneration; pass",
        ),
        (
            hf.LlavaConfig(
                text_config=hf.LlamaConfig(**SMALL),
                vision_config=hf.PixtralVisionConfig(**SMALL),
                architectures=["LlavaForConditionalGeneration"],
            ),
            "got pixtral, with a token between rows",
        ),
    ],
    ids=["without an entry", "another tower"],
)
def test_settings_of_models_that_are_not_reduced_are_refused(tmp_path, config, message):
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        configure(tmp_path, {"keep": 0.5}, skip_tokenizer_init=True)
    assert configure(tmp_path, None, skip_tokenizer_init=True)
