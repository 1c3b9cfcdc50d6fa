"""The language-image models of the paper, and any other by its name."""

from elip_models.validation import needs

needs("elip_models.models", "timm", "transformers", "einops", "safetensors", "huggingface_hub")
