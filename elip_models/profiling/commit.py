"""The commit of this project that is measured."""

import os
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = "benchmarks/results"  # excluded, since a run writes its results there


@cache
def commit() -> dict[str, Any]:
    """Return the commit as `id` and `dirty`; an empty dict if it cannot be determined.

    The environment variable COMMIT overrides git, for a tree without .git: a hash, with the suffix
    '-dirty' if there were changes.
    """
    override = os.environ.get("COMMIT")
    if override:
        return {"id": override.removesuffix("-dirty"), "dirty": override.endswith("-dirty")}
    try:
        _git("ls-files", "--error-unmatch", "elip_kernels")  # fails in another project's checkout
        changes = _git("status", "--porcelain", "--untracked-files=no", "--", f":!{RESULTS}")
        return {"id": _git("rev-parse", "HEAD"), "dirty": bool(changes)}
    except (OSError, subprocess.CalledProcessError):
        return {}


def _git(*words: str) -> str:
    command = ("git", "-C", str(ROOT), *words)
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
