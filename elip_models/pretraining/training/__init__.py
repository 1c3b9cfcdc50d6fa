"""Training: a recipe becomes a trained model."""

from elip_models.validation import require_packages

require_packages("elip_models.pretraining.training", "accelerate", "pydantic", "rich")
