"""Embedding of image collections: sources, encoders, output files and the check before a run."""
