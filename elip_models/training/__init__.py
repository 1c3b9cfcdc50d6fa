"""A recipe becomes a trained model."""
