"""The image-text models of the paper by name."""

from importlib import import_module
from typing import Any

from elip_models.validation import require_packages

LAZY = {
    "create_model": "registry",
    "list_models": "registry",
    "load_model": "registry",
}
"""Public name -> its module, imported on first use, since that module imports this package."""

require_packages(
    "elip_models.pretraining.models",
    *("timm", "transformers", "einops", "safetensors", "huggingface_hub"),
)


def __getattr__(name: str) -> Any:
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{LAZY[name]}"), name)


def __dir__() -> list[str]:
    return [*LAZY]
