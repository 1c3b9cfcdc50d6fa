"""Embedding of image collections: sources, encoders, output files and the check before a run."""

from elip_models.validation import require_packages

require_packages("elip_models.embedding", "pyarrow", "datasets", "filelock", "timm", "PIL")
