"""Print which time ratios changed between a new run and the committed one.

    python -m benchmarks.compare NEW.json [OLD.json] [--threshold 0.05]

A ratio compares two forms that ran side by side in one process, so it can be compared between
runs; the milliseconds of two runs cannot. Without OLD.json, the committed results of the same
device are the old ones.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).resolve().parent / "results"


class Change(NamedTuple):
    """One ratio in two runs."""

    benchmark: str
    against: str
    old: float
    new: float

    @property
    def relative(self) -> float:
        """Return the change as a share of the old ratio."""
        return self.new / self.old - 1


def ratios(content: dict[str, Any]) -> dict[tuple[str, str], float]:
    """Return the ratios in a file by benchmark and reference."""
    return {
        (benchmark["name"], against): ratio
        for benchmark in content["benchmarks"]
        for against, ratio in benchmark["extra_info"]["ratios"].items()
    }


def changes(old: dict[str, Any], new: dict[str, Any], threshold: float) -> list[Change]:
    """Return the ratios that changed by more than `threshold`, the largest change first."""
    before, after = ratios(old), ratios(new)
    both = [Change(*key, before[key], after[key]) for key in after if key in before]
    changed = [each for each in both if abs(each.relative) > threshold]
    return sorted(changed, key=lambda each: -abs(each.relative))


def committed(device: str) -> Path | None:
    """Return the committed results of a device, or None."""
    paths = sorted(RESULTS.glob("*/bench.json"))
    return next((p for p in paths if _read(p)["machine_info"]["device"] == device), None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the table; return the exit status: 1 if there are no results to compare with."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("new", type=Path, metavar="NEW.json")
    parser.add_argument("old", type=Path, metavar="OLD.json", nargs="?")
    parser.add_argument("--threshold", type=float, default=0.05, help="least relative change")
    options = parser.parse_args(arguments)
    new = _read(options.new)
    device = new["machine_info"]["device"]
    path = options.old or committed(device)
    if path is None:
        sys.stderr.write(f"no committed results of {device!r}; name the old file as OLD.json\n")
        return 1
    old = _read(path)
    found = changes(old, new, options.threshold)
    before, after = ratios(old), ratios(new)
    share = f"{100 * options.threshold:g}%"
    sys.stdout.write(
        f"{len(found)} of {len(before.keys() & after.keys())} ratios changed by more than {share}; "
        f"{len(after.keys() - before.keys())} are new, {len(before.keys() - after.keys())} gone\n"
    )
    for each in found:
        row = f"{each.old:8.3f} -> {each.new:.3f} {100 * each.relative:+6.1f}%"
        sys.stdout.write(f"{row}  {each.benchmark}, against {each.against}\n")
    return 0


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
