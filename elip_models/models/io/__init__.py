"""Saving and loading of models: files, the hub, models by one line of text."""
