"""What every result says of where it comes from: device, versions, commit."""

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import cpuinfo

from benchmarks.cases import DEVICE, ON_GPU
from elip_models.profiling.measure import measured_on

ROOT = Path(__file__).resolve().parents[1]
RESULTS = "benchmarks/results"  # a run writes there: that changes nothing of what it measures


@cache
def machine() -> dict[str, Any]:
    """Name device and versions: all that is said of the machine."""
    measured = measured_on(DEVICE)
    brand = cpuinfo.get_cpu_info().get("brand_raw", platform.machine())
    return {
        "device": measured["device"] if ON_GPU else f"{brand}, {os.cpu_count()} cores",
        "threads": measured["threads"],
        "versions": {name: _version(name) for name in ("torch", "triton", "timm")},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


@cache
def commit() -> dict[str, Any]:
    """Find the commit that is measured: id and dirty; empty where nobody knows.

    $COMMIT says it where the tree came without .git: a hash, and '-dirty' if there were changes.
    """
    said = os.environ.get("COMMIT")
    if said:
        return {"id": said.removesuffix("-dirty"), "dirty": said.endswith("-dirty")}
    try:
        changes = _git("status", "--porcelain", "--untracked-files=no", "--", f":!{RESULTS}")
        return {"id": _git("rev-parse", "HEAD"), "dirty": bool(changes)}
    except (OSError, subprocess.CalledProcessError):
        return {}


def _git(*words: str) -> str:
    command = ("git", "-C", str(ROOT), *words)
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
