"""Provenance of a run: versions, commit and command that produced a model."""

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from elip_models.pretraining.data.streams import redacted
from elip_models.profiling.commit import commit
from elip_models.profiling.measure import installed_versions

PACKAGES = ("elip-kernels", "timm", "transformers", "accelerate", "datasets", "peft")


def run_provenance(num_samples: int, checkpoint: Path | None) -> dict[str, Any]:
    """Return time, command, versions, commit and samples of a run that starts or resumes."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "resumed": None if checkpoint is None else checkpoint.name,
        "command": redacted(sys.argv),
        # torch names its build, such as 2.13.0+cpu, which its package does not
        "versions": {"torch": torch.__version__, **installed_versions(PACKAGES)},
        "commit": commit(),
        "samples": num_samples,
    }
