"""The image-text models of the paper, and any other model by its name."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from elip_models.validation import require_packages

require_packages(
    "elip_models.models", "timm", "transformers", "einops", "safetensors", "huggingface_hub"
)
LAZY = {
    "AdaptConfig": "peft.adaptable_model",
    "adapt_": "peft.adapt",
    "create_model": "registry",
    "list_models": "registry",
    "load_model": "registry",
    "open_model": "io.open_model",
}
__all__ = ["AdaptConfig", "adapt_", "create_model", "list_models", "load_model", "open_model"]

if TYPE_CHECKING:
    from elip_models.models.io.open_model import open_model
    from elip_models.models.peft.adapt import adapt_
    from elip_models.models.peft.adaptable_model import AdaptConfig
    from elip_models.models.registry import create_model, list_models, load_model
else:

    def __getattr__(name: str) -> Any:
        """Import a public name on first use: the models import each other's modules from here."""
        if name not in LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{LAZY[name]}"), name)

    def __dir__() -> list[str]:
        """Return the public names, including those that are not imported yet."""
        return __all__
