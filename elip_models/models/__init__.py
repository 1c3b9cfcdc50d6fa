"""The language-image models of the paper, and any other by its name."""

from elip_models.validation import require_packages

require_packages(
    "elip_models.models", "timm", "transformers", "einops", "safetensors", "huggingface_hub"
)
