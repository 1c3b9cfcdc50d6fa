"""A recipe becomes a trained model."""

from elip_models.extras import needs

needs("elip_models.training", "accelerate", "rich", "yaml")
