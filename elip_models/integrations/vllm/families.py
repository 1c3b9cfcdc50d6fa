"""The models of vLLM whose image tokens can be reduced, as a table."""

from collections.abc import Mapping
from typing import NamedTuple


class Family(NamedTuple):
    """Where vLLM has a model, and the classes that prepare its prompts.

    Attributes:
        file: the module below `vllm.model_executor.models`.
        model: the name of the model in it.
        prompts: how the names of its `..ProcessingInfo` and `..MultiModalProcessor` begin.
        dummy_inputs: how the name of its `..DummyInputsBuilder` begins.
        has_mrope: whether positions have a time, a row and a column.
        has_videos: whether clips can be reduced too.
        other_towers: `prompts` for the image towers, by their `model_type`, that keep every token.
    """

    file: str
    model: str
    prompts: str
    dummy_inputs: str
    has_mrope: bool = False
    has_videos: bool = False
    other_towers: Mapping[str, str] = {}


FAMILIES = {
    "InternVLForConditionalGeneration": Family(
        "interns1", "InternS1ForConditionalGeneration", "InternS1", "InternS1"
    ),
    "LlavaForConditionalGeneration": Family(
        "llava",
        "LlavaForConditionalGeneration",
        "Llava",
        "Llava",
        other_towers={"pixtral": "PixtralHF"},
    ),
    "LlavaNextForConditionalGeneration": Family(
        "llava_next", "LlavaNextForConditionalGeneration", "LlavaNext", "Llava"
    ),
    "LlavaOnevisionForConditionalGeneration": Family(
        "llava_onevision",
        "LlavaOnevisionForConditionalGeneration",
        "LlavaOnevision",
        "LlavaOnevision",
        has_videos=True,
    ),
    "Qwen2VLForConditionalGeneration": Family(
        "qwen2_vl",
        "Qwen2VLForConditionalGeneration",
        "Qwen2VL",
        "Qwen2VL",
        has_mrope=True,
        has_videos=True,
    ),
    "Qwen2_5_VLForConditionalGeneration": Family(
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VL",
        "Qwen2_5_VL",
        has_mrope=True,
        has_videos=True,
    ),
    "Qwen3VLForConditionalGeneration": Family(
        "qwen3_vl", "Qwen3VLForConditionalGeneration", "Qwen3VL", "Qwen3VL", has_mrope=True
    ),
}
"""The models by their architecture, as the config of a model names it."""
