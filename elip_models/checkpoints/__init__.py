"""Weights from and to other code."""

from elip_models.validation import require_packages

require_packages("elip_models.checkpoints", "timm", "transformers")
