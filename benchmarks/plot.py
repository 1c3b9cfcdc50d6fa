"""Write the README's tables and the charts in docs/ from the committed results.

    python -m benchmarks.plot [--results DIR] [--readme README.md] [--check]

Reads DIR/<device>/bench*.json as `pytest benchmarks/ --benchmark-only --benchmark-json=FILE` wrote
them. Results whose parity failed or was not checked, or of fewer than ten rounds, are refused, and
nothing is written.
"""

import argparse
import re
import sys
from pathlib import Path

from benchmarks.measured import Refused, Results, read_results
from benchmarks.tables import device_tables

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"


def readme_with(readme: str, results: list[Results]) -> str:
    """`readme` with the tables between its two markers."""
    block = "\n\n".join(device_tables(device) for device in results)
    block = block or "No results are committed yet."
    pattern = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    if pattern.search(readme) is None:
        raise Refused(f"README: expected {BEGIN} and {END}, got neither or only one")
    return pattern.sub(lambda _: f"{BEGIN}\n\n{block}\n\n{END}", readme, count=1)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 1 where results are refused or, with --check, the README is stale."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    options = parser.parse_args(arguments)
    try:
        results = read_results(options.results)
        current = options.readme.read_text(encoding="utf-8")
        wanted = readme_with(current, results)
    except Refused as reason:
        sys.stderr.write(f"refused: {reason}\n")
        return 1
    if options.check:
        if wanted != current:
            sys.stderr.write(f"{options.readme}: stale; run python -m benchmarks.plot\n")
        return int(wanted != current)
    from benchmarks.charts import draw

    for device in results:
        draw(device, options.readme.parent / "docs")
    options.readme.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
