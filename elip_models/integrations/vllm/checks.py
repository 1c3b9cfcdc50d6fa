"""What vLLM checks when it has read its configuration: settings are used or refused, never ignored.

vLLM has one such class for an architecture, in a table. `install_checks` replaces the table by one
with the same entries, each of which looks for settings first.
"""

from collections import UserDict
from typing import Any

from elip_models.integrations.vllm.placement import KEY, check_placement
from elip_models.validation import require_extra

with require_extra("elip_models.integrations.vllm"):
    from vllm import ModelRegistry
    from vllm.model_executor.models import config as model_configs
    from vllm.model_executor.models.config import VerifyAndUpdateConfig


class CheckedSettings(VerifyAndUpdateConfig):
    """The checks of an architecture. What they need is imported with the first settings."""

    @classmethod
    def verify_and_update_model_config(cls, model_config: Any) -> None:
        """Give a model with settings the class that obeys them, or raise an error."""
        super().verify_and_update_model_config(model_config)
        if not callable(model_config.hf_overrides):
            check_placement(model_config.hf_overrides or {})
        if _has_settings(model_config):
            from elip_models.integrations.vllm.reduced_config import reduce_config

            reduce_config(model_config)

    @classmethod
    def verify_and_update_config(cls, vllm_config: Any) -> None:
        """Raise an error for options that do not fit fewer image tokens, and log the strategy."""
        super().verify_and_update_config(vllm_config)
        if _has_settings(vllm_config.model_config):
            from elip_models.integrations.vllm.reduced_config import check_options

            check_options(vllm_config)


def _has_settings(model_config: Any) -> bool:
    return getattr(model_config.hf_config, KEY, None) is not None


class CheckedConfigs(UserDict[str, type[VerifyAndUpdateConfig]]):
    """vLLM's table of checks by architecture, which vLLM reads by `get`."""

    def __init__(self, stock: dict[str, type[VerifyAndUpdateConfig]]) -> None:
        self.data = stock  # later entries of others go into it

    def get(self, architecture: str, default: Any = None) -> Any:
        """Return the checks of an architecture, with those of settings; of any that vLLM has."""
        if architecture not in self and architecture not in ModelRegistry.get_supported_archs():
            return default
        stock = self.data.get(architecture, VerifyAndUpdateConfig)
        return type(stock.__name__, (CheckedSettings, stock), {})


def install_checks() -> None:
    """Replace vLLM's table of checks, once."""
    if not isinstance(model_configs.MODELS_CONFIG_MAP, CheckedConfigs):
        model_configs.MODELS_CONFIG_MAP = CheckedConfigs(model_configs.MODELS_CONFIG_MAP)
