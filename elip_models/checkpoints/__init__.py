"""Weights from and to other code."""

from elip_models.validation import needs

needs("elip_models.checkpoints", "timm", "transformers")
