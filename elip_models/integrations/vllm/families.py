"""The models of vLLM whose image tokens can be reduced, as a table."""

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
        refused_towers: the image towers, by their `model_type`, with a token between rows.
        tower: the name of the image tower if it takes the positions of its patches as an argument.
    """

    file: str
    model: str
    prompts: str
    dummy_inputs: str
    has_mrope: bool = False
    has_videos: bool = False
    refused_towers: tuple[str, ...] = ()
    tower: str | None = None

    @property
    def seams(self) -> tuple[str, ...]:
        """Return the classes of vLLM that are subclassed or called."""
        names = (
            self.model,
            f"{self.prompts}ProcessingInfo",
            f"{self.prompts}MultiModalProcessor",
            f"{self.dummy_inputs}DummyInputsBuilder",
        )
        return self._named(*names)

    @property
    def patch_seams(self) -> tuple[str, ...]:
        """Return what is called if patches are removed before the image tower."""
        return self._named(
            f"{self.model}.get_input_modality", f"{self.tower}.prepare_encoder_metadata"
        )

    def _named(self, *names: str) -> tuple[str, ...]:
        return tuple(f"vllm.model_executor.models.{self.file}:{name}" for name in names)


FAMILIES = {
    "InternVLForConditionalGeneration": Family(
        "interns1", "InternS1ForConditionalGeneration", "InternS1", "InternS1"
    ),
    "LlavaForConditionalGeneration": Family(
        "llava",
        "LlavaForConditionalGeneration",
        "Llava",
        "Llava",
        refused_towers=("pixtral",),
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
        tower="Qwen2VisionTransformer",
    ),
    "Qwen2_5_VLForConditionalGeneration": Family(
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VL",
        "Qwen2_5_VL",
        has_mrope=True,
        has_videos=True,
        tower="Qwen2_5_VisionTransformer",
    ),
    "Qwen3VLForConditionalGeneration": Family(
        "qwen3_vl",
        "Qwen3VLForConditionalGeneration",
        "Qwen3VL",
        "Qwen3VL",
        has_mrope=True,
        tower="Qwen3_VisionTransformer",
    ),
}
"""The models by their architecture, as the config of a model names it."""


REDUCED = "Reduced"
"""What the name of a model with fewer image tokens has before that of its architecture."""
DEDUPLICATED = "Deduplicated"
"""The same for a model whose image tower reads fewer patches."""
