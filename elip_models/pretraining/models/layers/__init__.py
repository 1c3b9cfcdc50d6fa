"""Layers and losses of the language-image models."""
