"""Data of the downstream tasks: built-in examples, files, and a baseline without images."""
