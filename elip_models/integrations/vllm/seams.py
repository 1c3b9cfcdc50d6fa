"""The names of vLLM that the plugin needs. They decide whether a version fits, not its number."""

from collections.abc import Iterable
from pkgutil import resolve_name

from elip_models.integrations.vllm.families import FAMILIES

TESTED = "0.32"
"""The version of vLLM that the tests run."""
HOOKS = (
    "vllm:ModelRegistry.get_supported_archs",
    "vllm:ModelRegistry.register_model",
    "vllm.model_executor.models.config:MODELS_CONFIG_MAP",
    "vllm.model_executor.models.config:VerifyAndUpdateConfig.verify_and_update_config",
    "vllm.model_executor.models.config:VerifyAndUpdateConfig.verify_and_update_model_config",
)
"""Those by which settings are noticed."""
SEAMS = (
    "vllm.config:ModelConfig.get_inputs_embeds_size",
    "vllm.config:ModelConfig.get_model_arch_config",
    "vllm.model_executor.models.interfaces:SupportsMRoPE.get_mrope_input_positions",
    "vllm.model_executor.models.interfaces:SupportsMultiModal.embed_input_ids",
    "vllm.model_executor.models.interfaces:SupportsMultiModal.embed_multimodal",
    "vllm.multimodal:MULTIMODAL_REGISTRY.register_processor",
    "vllm.multimodal.processing:BaseMultiModalProcessor._get_prompt_updates",
    "vllm.multimodal.processing:BaseMultiModalProcessor.apply",
    "vllm.multimodal.processing:BaseProcessingInfo.allowed_mm_limits",
    "vllm.multimodal.processing:BaseProcessingInfo.get_hf_config",
    "vllm.multimodal.processing:BaseProcessingInfo.get_mm_max_tokens_per_item",
    "vllm.multimodal.processing:BaseProcessingInfo.get_supported_mm_limits",
    "vllm.multimodal.processing:BaseProcessingInfo.model_id",
    "vllm.multimodal.processing:ProcessorInputs",
    "vllm.multimodal.processing:PromptReplacement",
    "vllm.multimodal.processing:PromptUpdateDetails.from_seq",
    "vllm.multimodal.processing:TimingContext",
)
"""Those that every reduced model overrides or calls."""

PATCH_SEAMS = (
    "vllm.multimodal.inputs:MultiModalFieldConfig.flat_from_sizes",
    "vllm.multimodal.processing:BaseDummyInputsBuilder.get_dummy_mm_data",
    "vllm.multimodal.processing:BaseMultiModalProcessor._get_mm_fields_config",
    "vllm.multimodal.processing:BaseMultiModalProcessor._postprocess_hf_mm_data",
)
"""Those that a model overrides or calls, too, whose image tower reads fewer patches."""


def missing_seams(architecture: str, *, removes_patches: bool = False) -> list[str]:
    """Return the names that a model of this architecture needs and that vLLM does not have."""
    family = FAMILIES[architecture]
    of_patches = (*PATCH_SEAMS, *family.patch_seams) if removes_patches else ()
    return missing_names((*SEAMS, *family.seams, *of_patches))


def missing_names(names: Iterable[str]) -> list[str]:
    """Return the names, each "module:attribute", that cannot be imported."""
    return [name for name in names if not _exists(name)]


def _exists(name: str) -> bool:
    try:
        resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True
