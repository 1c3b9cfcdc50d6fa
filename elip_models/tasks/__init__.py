"""Downstream tasks: how a trained model is scored."""
