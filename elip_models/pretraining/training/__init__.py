"""Training: a recipe becomes a trained model."""
