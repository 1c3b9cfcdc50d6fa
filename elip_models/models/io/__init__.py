"""Saving and loading of models: files, the hub, models by a text such as 'timm:NAME'."""
