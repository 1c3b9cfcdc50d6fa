"""Which commit of this project is measured."""

import os
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = "benchmarks/results"  # a run writes there: that changes nothing of what it measures


@cache
def commit() -> dict[str, Any]:
    """Find the commit that is measured: id and dirty; empty where nobody knows.

    $COMMIT says it where the tree came without .git: a hash, and '-dirty' if there were changes.
    """
    said = os.environ.get("COMMIT")
    if said:
        return {"id": said.removesuffix("-dirty"), "dirty": said.endswith("-dirty")}
    try:
        _git("ls-files", "--error-unmatch", "elip_kernels")  # not a checkout around an installation
        changes = _git("status", "--porcelain", "--untracked-files=no", "--", f":!{RESULTS}")
        return {"id": _git("rev-parse", "HEAD"), "dirty": bool(changes)}
    except (OSError, subprocess.CalledProcessError):
        return {}


def _git(*words: str) -> str:
    command = ("git", "-C", str(ROOT), *words)
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
