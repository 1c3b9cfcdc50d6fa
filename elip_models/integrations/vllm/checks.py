"""What vLLM checks when it has read its configuration: settings are used or refused, never ignored.

vLLM has one such class for an architecture, in a table. `install_checks` puts these checks before
the class that an architecture has there.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from elip_models.integrations.vllm.families import FAMILIES
from elip_models.integrations.vllm.settings import serving_strategy
from elip_models.validation import require_extra

with require_extra("elip_models.integrations.vllm"):
    from vllm.logger import init_logger
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

EXAMPLE = 576
"""The tokens of the image in the log: a square, as `pool` needs."""
logger = init_logger(f"vllm.{__name__}")  # vLLM prints messages of its child loggers


class CheckedSettings(VerifyAndUpdateConfig):
    """The checks of an architecture."""

    @classmethod
    def verify_and_update_model_config(cls, model_config: Any) -> None:
        """Raise an error for wrong settings, and for a model that has no entry in the table."""
        super().verify_and_update_model_config(model_config)
        config, architecture = model_config.hf_config, model_config.architecture
        if serving_strategy(config) is None:
            return
        remedy = """pass --hf-overrides '{"elip": null}' to serve it with every token"""
        if architecture not in FAMILIES:
            raise ValueError(
                f"model: expected one of {', '.join(FAMILIES)} for fewer image tokens, got "
                f"{architecture}; {remedy}"
            )
        tower = config.vision_config.model_type
        if tower in FAMILIES[architecture].other_towers:
            raise ValueError(
                f"model: expected an image tower whose tokens are adjacent in the prompt, got "
                f"{tower}, with a token between rows; {remedy}"
            )

    @classmethod
    def verify_and_update_config(cls, vllm_config: Any) -> None:
        """Raise an error for options that do not fit fewer image tokens, and log the strategy."""
        super().verify_and_update_config(vllm_config)
        model_config = vllm_config.model_config
        strategy = serving_strategy(model_config.hf_config)
        if strategy is None:
            return
        for option, reason in _refused(vllm_config, FAMILIES[model_config.architecture].has_mrope):
            raise ValueError(f"{option}: expected it unset with fewer image tokens, {reason}")
        logger.info(
            "elip-kernels: %s keeps %d tokens of an image of %d",
            strategy,
            strategy.count(EXAMPLE),
            EXAMPLE,
        )


def _refused(vllm_config: Any, has_mrope: bool) -> Iterator[tuple[str, str]]:
    """Yield the options that are set but do not fit, and why."""
    parallel, lora = vllm_config.parallel_config, vllm_config.lora_config
    if vllm_config.model_config.multimodal_config.video_pruning_rate:
        yield "--video-pruning-rate", "since both select tokens of a clip; leave out one of them"
    if lora is not None and lora.enable_tower_connector_lora:
        yield (
            "--enable-tower-connector-lora",
            "since vLLM computes the tokens of the tower from the kept ones; leave it out",
        )
    if vllm_config.compilation_config.cudagraph_mm_encoder:
        yield "cudagraph_mm_encoder", "since the graph leaves out the selection; set it to false"
    if has_mrope and parallel.pipeline_parallel_size > 1:
        yield (
            "--pipeline-parallel-size",
            "since later stages do not receive positions of image tokens; use "
            "--tensor-parallel-size",
        )
    if has_mrope and parallel.use_ubatching:
        yield "--enable-dbo", "since a step has one buffer for positions; leave it out"


def install_checks(architectures: Iterable[str]) -> None:
    """Put the checks before what vLLM itself checks for these architectures."""
    for architecture in architectures:
        present = MODELS_CONFIG_MAP.get(architecture, VerifyAndUpdateConfig)
        if not issubclass(present, CheckedSettings):
            MODELS_CONFIG_MAP[architecture] = type(present.__name__, (CheckedSettings, present), {})
