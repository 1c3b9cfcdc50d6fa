"""The plugin that vLLM loads in each of its processes, by the entry point of this package.

It replaces the models of `families.FAMILIES` by subclasses. Without settings in the config of a
model, these do what vLLM's own models do.
"""

from pkgutil import resolve_name

from elip_models.integrations.vllm.families import FAMILIES
from elip_models.validation import require_extra

with require_extra("elip_models.integrations.vllm"):
    import vllm
    from vllm import ModelRegistry
    from vllm.logger import init_logger

TESTED = "0.32"
"""The version of vLLM that the tests run."""
SEAMS = (
    "vllm.config:ModelConfig.get_inputs_embeds_size",
    "vllm.model_executor.models.config:MODELS_CONFIG_MAP",
    "vllm.model_executor.models.config:VerifyAndUpdateConfig.verify_and_update_config",
    "vllm.model_executor.models.config:VerifyAndUpdateConfig.verify_and_update_model_config",
    "vllm.model_executor.models.interfaces:SupportsMRoPE.get_mrope_input_positions",
    "vllm.model_executor.models.interfaces:SupportsMultiModal.embed_input_ids",
    "vllm.model_executor.models.interfaces:SupportsMultiModal.embed_multimodal",
    "vllm.multimodal:MULTIMODAL_REGISTRY.register_processor",
    "vllm.multimodal.processing:BaseMultiModalProcessor._get_prompt_updates",
    "vllm.multimodal.processing:BaseProcessingInfo.allowed_mm_limits",
    "vllm.multimodal.processing:BaseProcessingInfo.get_hf_config",
    "vllm.multimodal.processing:BaseProcessingInfo.get_mm_max_tokens_per_item",
    "vllm.multimodal.processing:BaseProcessingInfo.get_supported_mm_limits",
    "vllm.multimodal.processing:BaseProcessingInfo.model_id",
    "vllm.multimodal.processing:PromptReplacement",
    "vllm.multimodal.processing:PromptUpdateDetails.from_seq",
)
"""What the subclasses override or call."""
logger = init_logger(f"vllm.{__name__}")  # vLLM prints messages of its child loggers


def register() -> None:
    """Replace models of vLLM, and check settings of all of them."""
    if not vllm.__version__.startswith(f"{TESTED}."):
        logger.warning("elip-kernels is tested with vLLM %s, got %s", TESTED, vllm.__version__)
    if missing := [seam for seam in SEAMS if not _exists(seam)]:
        logger.error(
            "elip-kernels does not reduce image tokens: vLLM %s has no %s; install vLLM %s",
            vllm.__version__,
            ", ".join(missing),
            TESTED,
        )
        return
    from elip_models.integrations.vllm.checks import install_checks

    for architecture in FAMILIES:
        ModelRegistry.register_model(
            architecture, f"elip_models.integrations.vllm.models:{architecture}"
        )
    install_checks(ModelRegistry.get_supported_archs())


def _exists(seam: str) -> bool:
    try:
        resolve_name(seam)
    except (ImportError, AttributeError):
        return False
    return True
