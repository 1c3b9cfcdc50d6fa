"""The configuration of a model with settings: the class that obeys them, and what does not fit."""

from collections.abc import Iterator
from typing import Any

from elip_models.integrations.vllm.families import DEDUPLICATED, FAMILIES, REDUCED, Family
from elip_models.integrations.vllm.seams import TESTED, missing_seams
from elip_models.integrations.vllm.settings import serving_strategy
from elip_models.validation import require_extra
from elip_models.vlm.strategies.dedup import Dedup

with require_extra("elip_models.integrations.vllm"):
    import vllm
    from vllm.logger import init_logger

EXAMPLE = 576
"""The tokens of the image in the log: a square, as `pool` needs."""
WHOLE = """pass --hf-overrides '{"elip": null}' to serve it with every token"""
DRAFTS_WITHOUT_A_MODEL = ("ngram", "ngram_gpu", "suffix")
"""The methods of speculative decoding that read tokens alone."""
logger = init_logger(f"vllm.{__name__}")  # vLLM prints messages of its child loggers


def reduce_config(model_config: Any) -> None:
    """Change the architecture of a model with settings to the one with fewer image tokens.

    Raises:
        ValueError: wrong settings, a model without an entry in the table, or a version of vLLM
            without the names that the model needs.
    """
    config, architecture = model_config.hf_config, model_config.architecture
    strategy = serving_strategy(config.elip)
    family, tower = _family_of(model_config), config.vision_config.model_type
    removes_patches = isinstance(strategy, Dedup)
    if removes_patches and family.tower is None:
        fitting = ", ".join(name for name, other in FAMILIES.items() if other.tower is not None)
        raise ValueError(
            f"strategy: expected one that reduces {architecture}, whose image tower needs every "
            f"patch, got {strategy}; take another one, such as 'diverse', or one of {fitting}"
        )
    if tower in family.refused_towers:
        raise ValueError(
            f"model: expected an image tower whose tokens are adjacent in the prompt, got "
            f"{tower}, with a token between rows; {WHOLE}"
        )
    version = vllm.__version__
    if missing := missing_seams(architecture, removes_patches=removes_patches):
        raise ValueError(
            f"vllm: expected a version with {', '.join(missing)} for fewer image tokens, got "
            f"{version}; install vLLM {TESTED}, or {WHOLE}"
        )
    if not version.startswith(f"{TESTED}."):
        logger.warning("elip-kernels is tested with vLLM %s, got %s", TESTED, version)
    config.architectures = [f"{DEDUPLICATED if removes_patches else REDUCED}{architecture}"]
    model_config.model_arch_config = model_config.get_model_arch_config()


def check_options(vllm_config: Any) -> None:
    """Raise ValueError for options that do not fit fewer image tokens, and log the strategy."""
    model_config = vllm_config.model_config
    strategy = serving_strategy(model_config.hf_config.elip)
    is_dedup = isinstance(strategy, Dedup)
    refused = (
        *_refused(vllm_config, _family_of(model_config).has_mrope),
        *(_refused_with_patches(model_config.multimodal_config) if is_dedup else ()),
    )
    for option, reason in refused:
        raise ValueError(f"{option}: expected it unset with fewer image tokens, {reason}")
    if is_dedup:
        logger.info("elip-kernels: %s %s", strategy, strategy.summary)
        return
    logger.info(
        "elip-kernels: %s keeps %d tokens of an image of %d",
        strategy,
        strategy.count(EXAMPLE),
        EXAMPLE,
    )


def _family_of(model_config: Any) -> Family:
    architecture = model_config.architecture
    if architecture not in FAMILIES:
        raise ValueError(
            f"model: expected one of {', '.join(FAMILIES)} for fewer image tokens, got "
            f"{architecture}; {WHOLE}"
        )
    return FAMILIES[architecture]


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
    drafts = vllm_config.speculative_config
    if has_mrope and drafts is not None and drafts.method not in DRAFTS_WITHOUT_A_MODEL:
        yield (
            "--speculative-config",
            "since a draft model would read positions of image tokens as embeddings; use a method "
            f"without one: {', '.join(DRAFTS_WITHOUT_A_MODEL)}",
        )
    if has_mrope and parallel.use_ubatching:
        yield "--enable-dbo", "since a step has one buffer for positions; leave it out"


def _refused_with_patches(options: Any) -> Iterator[tuple[str, str]]:
    """Yield the options of images that do not fit fewer patches, and why."""
    if options.enable_mm_embeds:
        yield "--enable-mm-embeds", "since 'dedup' needs the pixels of an image; leave it out"
    if options.mm_encoder_tp_mode == "data":
        yield (
            "--mm-encoder-tp-mode",
            "since vLLM distributes whole images over the ranks; leave it out",
        )
    backend = options.mm_encoder_attn_backend
    if backend is not None and backend.name == "FLASHINFER":
        yield (
            "--mm-encoder-attn-backend",
            "since FLASHINFER has another form of segments; leave it out",
        )
