"""Import and export of weights: checkpoints of other libraries and of official implementations."""

from elip_models.validation import require_packages

require_packages("elip_models.pretraining.checkpoints", "timm", "transformers")
