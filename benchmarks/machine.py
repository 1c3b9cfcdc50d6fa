"""Device, versions, commit and date that results record."""

import datetime
import os
import platform
from collections.abc import Sequence
from functools import cache
from typing import Any

import cpuinfo

from benchmarks.cases import DEVICE, ON_GPU
from elip_models.profiling.commit import commit
from elip_models.profiling.measure import installed_versions, measured_on

PACKAGES = ("torch", "triton", "timm")


@cache
def machine() -> dict[str, Any]:
    """Return device, threads and versions; nothing else of the machine is recorded."""
    measured = measured_on(DEVICE)
    brand = cpuinfo.get_cpu_info().get("brand_raw", platform.machine())
    return {
        "device": measured["device"] if ON_GPU else f"{brand}, {os.cpu_count()} cores",
        "threads": measured["threads"],
        "versions": dict.fromkeys(PACKAGES, "absent") | installed_versions(PACKAGES),
    }


def provenance(packages: Sequence[str]) -> dict[str, Any]:
    """Return `machine`, with the versions of further packages, and the commit and the date."""
    versions = machine()["versions"] | installed_versions(packages)
    date = datetime.date.today().isoformat()
    return machine() | {"versions": versions, "commit": commit(), "date": date}
