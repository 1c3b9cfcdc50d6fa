"""Write tables and charts of docs/benchmarks.md from the committed results.

    python -m benchmarks.plot [--results DIR] [--page PAGE] [--check]

Reads DIR/<device>/bench*.json, which `pytest benchmarks/ --benchmark-only --benchmark-json=FILE`
writes. Raises an error and writes nothing if parity failed or was not checked, if a run failed or
stopped early, or if the commit is unknown or there are fewer than ten rounds.
"""

import argparse
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.charts import draw
from benchmarks.measured import Refused, Results, read_results
from benchmarks.tables import device_tables, op_page
from elip_models.saving.files import write_file

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"


def page_with(page: str, results: list[Results]) -> str:
    """Return `page` with the tables between its two markers."""
    block = "\n\n".join(device_tables(device) for device in results)
    block = block or "No results are committed yet."
    pattern = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    if pattern.search(page) is None:
        raise Refused(f"the page: expected {BEGIN} and {END}, got neither or only one")
    return pattern.sub(lambda _: f"{BEGIN}\n\n{block}\n\n{END}", page, count=1)


def write(device: Results, docs: Path) -> list[Path]:
    """Write the charts of a device and the page of its ops; return their paths."""
    page = op_page(device)
    if page is None:
        return draw(device, docs)
    path = docs / f"{device.slug}-ops.md"
    path.parent.mkdir(exist_ok=True)
    write_file(path, page.encode())
    return [*draw(device, docs), path]


def stale_files(results: list[Results], docs: Path) -> list[Path]:
    """Return the files of `write` that are missing in `docs` or differ."""
    with TemporaryDirectory() as folder:
        drawn = [path for device in results for path in write(device, Path(folder))]
        return [docs / path.name for path in drawn if not _same(path, docs / path.name)]


def _same(drawn: Path, kept: Path) -> bool:
    return kept.is_file() and kept.read_bytes() == drawn.read_bytes()


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 1 if results are refused or, with --check, if a file is stale."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "benchmarks.md")
    parser.add_argument("--check", action="store_true", help="only report stale files")
    options = parser.parse_args(arguments)
    try:
        results = read_results(options.results)
        current = options.page.read_text(encoding="utf-8")
        wanted = page_with(current, results)
    except Refused as reason:
        sys.stderr.write(f"refused: {reason}\n")
        return 1
    docs = options.page.parent
    if options.check:
        stale = stale_files(results, docs)
        if wanted != current:
            stale.append(options.page)
        for path in stale:
            sys.stderr.write(f"{path}: missing or stale; run python -m benchmarks.plot\n")
        return 1 if stale else 0
    for device in results:
        write(device, docs)
    write_file(options.page, wanted.encode())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
