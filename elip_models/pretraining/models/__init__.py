"""The image-text models of the paper by name."""

from elip_models.validation import require_packages

require_packages(
    "elip_models.pretraining.models",
    *("timm", "transformers", "einops", "safetensors", "huggingface_hub"),
)
