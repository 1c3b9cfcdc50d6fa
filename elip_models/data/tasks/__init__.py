"""Data of the downstream tasks: built-in examples, files, and a baseline that reads only the text."""
