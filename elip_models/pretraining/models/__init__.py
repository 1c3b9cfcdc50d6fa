"""The image-text models of the paper by name."""

from importlib import import_module
from typing import Any

from elip_models.validation import require_packages

PUBLIC = ("create_model", "list_models", "load_model")
"""Names of `registry`, which is imported on first use, since it imports this package."""

require_packages(
    "elip_models.pretraining.models",
    *("timm", "transformers", "einops", "safetensors", "huggingface_hub"),
)


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.registry"), name)


def __dir__() -> list[str]:
    return [*PUBLIC]
