"""Write the tables of vlm.md from the committed results of `benchmarks/bench_vlm.py`.

python docs/vlm.py             # rewrite the block between the two markers
python docs/vlm.py --check     # exit status 1 if the block is stale
"""

import argparse
from pathlib import Path

from benchmarks.marked_block import rewrite
from benchmarks.measured import read_results
from benchmarks.tables import language_model_table

DOCS = Path(__file__).resolve().parent
RESULTS = DOCS.parent / "benchmarks" / "results" / "vlm"
BEGIN, END = "<!-- times:begin -->", "<!-- times:end -->"


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 1 if the page has no markers, or is stale under --check."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--page", type=Path, default=DOCS / "vlm.md")
    options = parser.parse_args(arguments)
    parts = []
    for each in read_results(RESULTS):
        versions = each.machine["versions"].items()
        parts.append(
            f"Measured on {each.machine['device']} on {each.date} at commit {each.commit}, "
            f"{each.machine['threads']} threads; {', '.join(map(' '.join, versions))}."
        )
        parts += language_model_table(each.entries)
    text, command = "\n\n".join(parts), "python docs/vlm.py"
    return rewrite(options.page, BEGIN, END, text, command=command, check=options.check)


if __name__ == "__main__":
    raise SystemExit(main())
