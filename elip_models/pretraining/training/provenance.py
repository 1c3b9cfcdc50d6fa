"""Provenance of a run: versions, commit, command and data that produced a model."""

import hashlib
import math
import os
import platform
import socket
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from elip_models.pretraining.data import ExampleSource, Source, StreamSource
from elip_models.pretraining.data.streams import redacted
from elip_models.profiling.commit import commit
from elip_models.profiling.measure import installed_versions

PACKAGES = ("elip-kernels", "timm", "transformers", "accelerate", "datasets", "peft")
MAX_READ_SAMPLES = 1_000


def run_provenance(
    source: Source | ExampleSource | StreamSource, checkpoint: Path | None
) -> dict[str, Any]:
    """Return time, machine, command, versions, commit and data of a run that starts or resumes."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "resumed": None if checkpoint is None else checkpoint.name,
        "host": socket.gethostname(),
        "process": os.getpid(),
        "command": redacted(sys.argv),
        "python": platform.python_version(),
        # torch names its build, such as 2.13.0+cpu, which its package does not
        "versions": {"torch": torch.__version__, **installed_versions(PACKAGES)},
        "commit": commit(),
        "data": {"samples": len(source), "sha256": fingerprint(source)},
    }


def fingerprint(source: Source | ExampleSource | StreamSource) -> str:
    """Return a SHA-256 of the length and at most 1,000 texts, or of the URLs of a stream."""
    if isinstance(source, StreamSource):
        return hashlib.sha256(repr(source.shards).encode()).hexdigest()
    digest, has_captions = hashlib.sha256(str(len(source)).encode()), hasattr(source, "captions")
    for index in range(0, len(source), math.ceil(len(source) / MAX_READ_SAMPLES)):
        text = source.captions(index) if has_captions else source.text_alone(index)
        digest.update(repr(text).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()
