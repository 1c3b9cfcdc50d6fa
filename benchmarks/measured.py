"""What the committed results say, and which of them are refused."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LEAST_ROUNDS = 10


class Refused(Exception):
    """Results that no table may show, or a page that has no place for them."""


@dataclass(frozen=True)
class Results:
    """What one device measured: entries are the benchmarks' `extra_info`."""

    slug: str
    machine: dict[str, Any]
    commit: str
    date: str
    entries: list[dict[str, Any]]


def read_results(folder: Path) -> list[Results]:
    """The results of every device, each in a folder of its own.

    Raises:
        Refused: naming the file, the benchmark and the reason.
    """
    devices = sorted({path.parent for path in folder.glob("*/bench*.json")})
    return [_read_device(device) for device in devices]


def _read_device(folder: Path) -> Results:
    entries: list[dict[str, Any]] = []
    sources = []
    for path in sorted(folder.glob("bench*.json")):
        try:
            content = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise Refused(f"{path}: expected JSON: {error}") from None
        reason = unfinished(content)
        if reason is not None:
            raise Refused(f"{path}: {reason}")
        date = content["datetime"][:10]
        sources.append((content["machine_info"], content["commit_info"]))
        for benchmark in content["benchmarks"]:
            reason = refusal(benchmark["extra_info"])
            if reason is not None:
                raise Refused(f"{path}: {benchmark['name']}: {reason}")
            entries.append(benchmark["extra_info"])
    if any(source != sources[0] for source in sources):
        raise Refused(f"{folder}: expected one device, its versions and one commit, got several")
    machine, commit = sources[0]
    changed = " and local changes" if commit.get("dirty") else ""
    return Results(folder.name, machine, f"{commit['id'][:7]}{changed}", date, entries)


def unfinished(content: dict[str, Any]) -> str | None:
    """Why a file may not be shown, or None."""
    if not content["commit_info"].get("id"):
        return "expected the commit that was measured, got none: set COMMIT where there is no .git"
    run = content.get("run")
    if run is None:
        return "expected 'run', which says what was to be measured, got none"
    for what in ("failed", "missing"):
        if run[what]:
            names = ", ".join(run[what][:3])
            return f"{len(run[what])} of {run['planned']} benchmarks {what}: {names}"
    return None


def refusal(entry: dict[str, Any]) -> str | None:
    """Why an entry may not be shown, or None."""
    parity = entry.get("parity")
    if parity is None:
        return "its parity was not checked"
    for held in (parity, *([parity["coarser"]] if "coarser" in parity else [])):
        if held.get("passed") is not True or not held["max_abs"] <= held["bound"]:
            return f"parity failed: an error of {held['max_abs']}, {held['bound']} is allowed"
    if entry.get("rounds", 0) < LEAST_ROUNDS:
        return f"expected {LEAST_ROUNDS} rounds or more, got {entry.get('rounds', 0)}"
    return None
