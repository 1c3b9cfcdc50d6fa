"""The plugin that vLLM loads in each of its processes, by the entry point of this package.

It adds models to vLLM's table under names of their own, and replaces none. Only `checks` sees the
settings of a model; it then gives the model such a name. Nothing else is imported before.
"""

from elip_models.integrations.vllm.families import DEDUPLICATED, FAMILIES, REDUCED
from elip_models.integrations.vllm.seams import HOOKS, TESTED, missing_names
from elip_models.validation import require_extra

with require_extra("elip_models.integrations.vllm"):
    import vllm
    from vllm.logger import init_logger

logger = init_logger(f"vllm.{__name__}")  # vLLM prints messages of its child loggers


def register() -> None:
    """Add the models with fewer image tokens, and have vLLM check settings of all models."""
    if missing := missing_names(HOOKS):
        logger.error(
            "elip-kernels cannot read settings: vLLM %s has no %s; a model with settings would "
            "keep every token. Install vLLM %s, or uninstall elip-kernels",
            vllm.__version__,
            ", ".join(missing),
            TESTED,
        )
        return
    from elip_models.integrations.vllm.checks import install_checks

    register_model, package = vllm.ModelRegistry.register_model, "elip_models.integrations.vllm"
    for architecture, family in FAMILIES.items():
        register_model(f"{REDUCED}{architecture}", f"{package}.models:{architecture}")
        if family.tower is not None:
            path = f"{package}.patch_models:{architecture}"
            register_model(f"{DEDUPLICATED}{architecture}", path)
    install_checks()
