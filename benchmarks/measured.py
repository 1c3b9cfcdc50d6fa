"""Committed benchmark results: reading, and the checks that refuse invalid ones."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LEAST_ROUNDS = 10


class Refused(Exception):
    """Results that fail a check, or a page without markers for them."""


@dataclass(frozen=True)
class Results:
    """Results of one device; entries are the `extra_info` of its benchmarks."""

    slug: str
    machine: dict[str, Any]
    commit: str
    date: str
    entries: list[dict[str, Any]]


def read_results(folder: Path) -> list[Results]:
    """Return the results of every device, each from its own folder.

    Raises:
        Refused: a check failed; the message has file, benchmark and reason.
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
    """Return why a file is refused, or None."""
    if not content["commit_info"].get("id"):
        return "expected the measured commit, got none; set COMMIT if there is no .git"
    run = content.get("run")
    if run is None:
        return "expected 'run', the list of planned benchmarks, got none"
    for what in ("failed", "missing"):
        if run[what]:
            names = ", ".join(run[what][:3])
            return f"{len(run[what])} of {run['planned']} benchmarks {what}: {names}"
    return None


def refusal(entry: dict[str, Any]) -> str | None:
    """Return why an entry is refused, or None."""
    parity = entry.get("parity")
    if parity is None:
        return "its parity was not checked"
    checks = [parity, parity["coarser"]] if "coarser" in parity else [parity]
    for check in checks:
        if check.get("passed") is not True or not check["max_abs"] <= check["bound"]:
            error, bound = check["max_abs"], check["bound"]
            return f"parity failed: expected an error of at most {bound}, got {error}"
    if entry.get("rounds", 0) < LEAST_ROUNDS:
        return f"expected {LEAST_ROUNDS} rounds or more, got {entry.get('rounds', 0)}"
    return None
