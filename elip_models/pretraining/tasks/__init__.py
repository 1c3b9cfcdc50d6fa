"""Downstream tasks: training samples and evaluation of models."""
