"""Write docs/study.md and its charts from the committed results of `elip study`.

python docs/study.py             # write them
python docs/study.py --check     # exit status 1 where something is missing or stale
"""

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from elip_models.study.chart import draw
from elip_models.study.page import INTERVALS, page
from elip_models.study.results import read_results

FOLDER = Path(__file__).parent
RESULTS = FOLDER.parent / "benchmarks" / "results" / "studies"
INTRO = f"""# Study: what a reduction keeps, at equal cost

Written by `python docs/study.py` from `benchmarks/results/studies`, results of `elip study NAME`
([how](training.md#studies)). Images are encoded without text wherever something is measured:
`dense`, with all patches, and `reduced`, by the arm's strategy and the image alone.

{INTERVALS}
"""


def write(results: Path, docs: Path) -> list[Path]:
    """The page, and a chart a study, in `docs`."""
    sections, written = [INTRO], []
    for path in sorted(results.glob("*.json")):
        document = read_results(path)
        written.append(draw(document, docs / f"study-{document['study']}.svg"))
        sections.append(page(document, written[-1].name))
    if not written:
        sections.append("No results are committed yet.\n")
    (docs / "study.md").write_text("\n".join(sections), encoding="utf-8")
    return [*written, docs / "study.md"]


def main(arguments: list[str] | None = None) -> int:
    """Exit status 1 where a file is missing or stale under --check."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=FOLDER)
    options = parser.parse_args(arguments)
    if not options.check:
        write(options.results, options.docs)
        return 0
    with TemporaryDirectory() as folder:
        wanted = {path.name: path.read_bytes() for path in write(options.results, Path(folder))}
    kept = {name: options.docs / name for name in wanted}
    stale = [n for n, path in kept.items() if not path.is_file() or path.read_bytes() != wanted[n]]
    for name in stale:
        sys.stderr.write(f"{options.docs / name}: missing or stale; run python docs/study.py\n")
    return int(bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
