"""Data of the downstream tasks: built-in worlds, standard files, and what texts alone say."""
