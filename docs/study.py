"""Write docs/study.md and its charts from the committed results of `elip study`.

python docs/study.py             # write them
python docs/study.py --check     # exit status 1 where something is missing or stale
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from benchmarks.studies.chart import draw
from benchmarks.studies.page import INTERVALS, is_loss, page, shown, title
from benchmarks.studies.results import Document, Interval, difference, read_results

FOLDER = Path(__file__).parent
RESULTS = FOLDER.parent / "benchmarks" / "results" / "studies"
INTRO = f"""# Study: what a reduction keeps, at equal cost

Written by `python docs/study.py` from `benchmarks/results/studies`, results of `elip study NAME`
([how](training.md#studies)). Images are encoded without text wherever features are measured:
`dense`, with all patches, and `reduced`, by the arm's strategy and the image alone, whatever guided
it in training. `objective` is the training objective on held-out batches, each image reduced as in
training.

{INTERVALS}
"""


ANSWERS = FOLDER / "answers.yaml"
MEASURED = ("reduced.top1", "reduced.contrastive_loss")


def answers(documents: dict[str, Document]) -> str:
    """Each question of `answers.yaml`, what the differences that bear on it tell, and these."""
    parts = [
        "## Answers",
        "Better and worse are said, and of which measure, where an interval leaves zero out, which "
        "one in twenty does by chance. Everything is of small models on drawn images.",
    ]
    for entry in yaml.safe_load(ANSWERS.read_text(encoding="utf-8")):
        measured = entry.get("measured", MEASURED)
        known = [each for each in entry["differences"] if _is_known(each, documents, measured)]
        pairs = Counter((each["arm"], each["against"]) for each in known)
        lines = [
            f"| arm | against | study | {' | '.join(map(title, measured))} |",
            f"| --- | --- | --- |{' --: |' * len(measured)}",
        ]
        said: dict[tuple[str, str], list[str]] = {}
        for each in known:
            study, arm, against = each["study"], each["arm"], each["against"]
            gaps = {name: difference(documents[study], arm, against, name) for name in measured}
            cells = [f"`{arm}`", f"`{against}`", study]
            cells += [shown(gap, name) for name, gap in gaps.items()]
            lines.append(f"| {' | '.join(cells)} |")
            where = f" in {study}" if pairs[arm, against] > 1 else ""
            said.setdefault((told(gaps), f"`{against}`{where}"), []).append(f"`{arm}`")
        parts += [f"### {entry['question']}", entry["about"], _sentence(said), "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _sentence(said: dict[tuple[str, str], list[str]]) -> str:
    """Which arms are better or worse than what, and which are told from nothing."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for (word, against), arms in said.items():
        grouped.setdefault((word, _listed(arms)), []).append(against)
    clear = [
        f"{arms} {'are' if ' and ' in arms else 'is'} {word} than {_listed(against)}"
        for (word, arms), against in grouped.items()
        if word
    ]
    alike = [
        f"{arms} from {_listed(against)}" for (word, arms), against in grouped.items() if not word
    ]
    sentences = [f"{'; '.join(clear)}."] * bool(clear)
    sentences += [f"Not told apart: {'; '.join(alike)}."] * bool(alike)
    return f"**{' '.join(sentences)}**"


def _listed(arms: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(arms[:-1]), arms[-1])))


def _is_known(
    asked: dict[str, str], documents: dict[str, Document], measured: Sequence[str]
) -> bool:
    """Runs of both arms that begin alike were measured."""
    document = documents.get(asked["study"])
    return document is not None and any(
        difference(document, asked["arm"], asked["against"], name) for name in measured
    )


def told(gaps: dict[str, Interval | None]) -> str:
    """By which measures an interval says that the first of two arms is better, or worse; or ""."""
    words: dict[str, list[str]] = {}
    for name, gap in gaps.items():
        if gap is not None and gap.verdict in ("above", "below"):
            word = "better" if (gap.verdict == "below") == is_loss(name) else "worse"
            tail = name.rpartition(".")[2]
            is_alone = sum(each.rpartition(".")[2] == tail for each in gaps) == 1
            words.setdefault(word, []).append(tail if is_alone else name)
    return " and ".join(f"{word} ({', '.join(by)})" for word, by in sorted(words.items()))


def write(results: Path, docs: Path) -> list[Path]:
    """The page, and a chart a study, in `docs`."""
    documents = {path.stem: read_results(path) for path in sorted(results.glob("*.json"))}
    sections, written = [INTRO], []
    if documents:
        sections.append(answers(documents))
    for document in documents.values():
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
