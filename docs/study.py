"""Write docs/study.md, a page per question and per study, and charts, from committed results.

python docs/study.py             # write them
python docs/study.py --check     # exit status 1 if a file is missing or stale
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import yaml

from benchmarks.studies.analysis import against, contrasts, holm
from benchmarks.studies.chart import draw
from benchmarks.studies.page import (
    HOW_TO_READ,
    difference_cell,
    difference_title,
    equivalent,
    markdown,
    power,
    study_page,
)
from benchmarks.studies.results import Document, Interval, is_loss, read_results

FOLDER = Path(__file__).parent
RESULTS = FOLDER.parent / "benchmarks" / "results" / "studies"
QUESTIONS = FOLDER / "answers.yaml"
UNTESTED = "untested"
MEASURED = ("reduced.top1", "reduced.contrastive_loss")
INTRO = """# Study: quality of token reduction at equal cost

This page compares the strategies in training and in inference, to help you choose one. All runs use
small models and images of emoji on a CPU; nothing was measured at the scale of the ELIP paper.
[How to read the tables](#how-to-read-the-tables) explains metrics and statistics. The page of each
question describes its arms.
To repeat a study, or to run it on your own data ([how](training.md#studies)):

```bash
python -m benchmarks.studies quality --dry-run                       # arms, FLOPs and time
python -m benchmarks.studies quality_emoji data.train='train-*.tar' data.eval=val.json
```
"""
NOTES = "[All findings](../study.md) · [How to read the tables](../study.md#how-to-read-the-tables)"
WRITTEN = """
`python docs/study.py` writes this page from `benchmarks/results/studies`.
"""


class Comparison(NamedTuple):
    """Paired differences of an arm from a reference in one study, by metric."""

    study: str
    arm: str
    reference: str
    differences: dict[str, Interval | None]
    is_main: bool


def comparisons(question: dict[str, Any], documents: dict[str, Document]) -> list[Comparison]:
    """Return the comparisons of a question that have results.

    Those against a reference of the study have the intervals of all arms against it. The others are
    one family, with the levels of Holm's procedure.
    """
    entries = [each for each in question["differences"] if each["study"] in documents]
    metrics = question.get("measured", MEASURED)
    intervals: dict[tuple[str, str, str, str], Interval] = {}  # by study, reference, arm and metric
    others = {}
    for study, reference in dict.fromkeys((each["study"], each["against"]) for each in entries):
        document = documents[study]
        if reference in document["references"]:
            against_it = against(document, reference, metrics)
            intervals |= {(study, reference, *key): each for key, each in against_it.items()}
            continue
        for metric in metrics:
            for trains in (True, False):
                of_arms = contrasts(document, reference, metric, trains=trains)
                others |= {(study, reference, arm, metric): each for arm, each in of_arms.items()}
    asked = {(each["study"], each["against"], each["arm"]) for each in entries}
    intervals |= holm({key: each for key, each in others.items() if key[:3] in asked})
    found = []
    for entry in entries:
        study, arm, reference = entry["study"], entry["arm"], entry["against"]
        gaps = {metric: intervals.get((study, reference, arm, metric)) for metric in metrics}
        if any(gaps.values()):
            found.append(Comparison(study, arm, reference, gaps, "main" in entry))
    return found


def summary(questions: Sequence[dict[str, Any]], documents: dict[str, Document]) -> str:
    """Return the table of main findings: one line per comparison that is marked as `main`."""
    header = [
        "question",
        "comparison",
        "result",
        "paired difference (adjusted 95% CI), recalls in points",
        "seeds",
    ]
    rows = []
    for question in questions:
        for each in comparisons(question, documents):
            if each.is_main:
                link = f"[{question['short']}]({_page(question)})"
                verdict = verdict_of(each.differences) or "no significant difference"
                pair = f"`{each.arm}` vs `{each.reference}`"
                rows.append([link, pair, verdict, *_effects(each.differences)])
    return f"## Main findings\n\n{markdown((header, rows), left=4)}\n"


def _effects(differences: dict[str, Interval | None]) -> list[str]:
    """Return the differences of the first two metrics in words, and the number of seeds."""
    known = [(metric, gap) for metric, gap in differences.items() if gap is not None]
    cells = [f"{name} {difference_cell(gap, name)}" for name, gap in known[:2]]
    return [", ".join(cells), str(known[0][1].seeds)]


def _page(question: dict[str, Any]) -> str:
    """Return the path of a question's page in the folder of pages."""
    words = "".join(c for c in question["short"].lower() if c.isalnum() or c == " ")
    return f"findings/{'_'.join(words.split())}.md"


def answer(question: dict[str, Any], documents: dict[str, Document]) -> str:
    """Return the page of one question: setting, conclusions and all of its comparisons."""
    found = comparisons(question, documents)
    metrics = question.get("measured", MEASURED)
    header = ["arm", "reference", "study", *map(difference_title, metrics)]
    rows = [
        [
            f"`{each.arm}`",
            f"`{each.reference}`",
            f"[{each.study}](../studies/{each.study}.md)",
            *(difference_cell(gap, metric) for metric, gap in each.differences.items()),
        ]
        for each in found
    ]
    table = markdown((header, rows), left=3)
    parts = [f"# {question['question']}", question["about"], conclusions(found), table]
    parts += [_power(found), *_equivalences(found, documents, metrics), NOTES]
    return "\n\n".join(parts) + f"\n{WRITTEN}"


def _power(found: Sequence[Comparison]) -> str:
    """Return the minimal detectable effects of the comparisons of a page."""
    intervals = {
        (str(number), metric): gap
        for number, each in enumerate(found)
        for metric, gap in each.differences.items()
        if gap is not None
    }
    return power(intervals)


def _equivalences(
    found: Sequence[Comparison], documents: dict[str, Document], metrics: Sequence[str]
) -> list[str]:
    """Return the arms of each study that are equivalent to a dense reference."""
    pairs = dict.fromkeys((each.study, each.reference) for each in found)
    return [
        f"`{study}`: {sentence[0].lower()}{sentence[1:]}"
        for study, reference in pairs
        if reference == documents[study]["references"][0]
        for sentence in equivalent(documents[study], reference, metrics)
    ]


def conclusions(found: Sequence[Comparison]) -> str:
    """Return a list of the significant differences, and of those that are not significant."""
    several = len({each.study for each in found}) > 1
    arms: dict[tuple[str, str, str], list[str]] = {}
    for each in found:
        study = f" in `{each.study}`" if several else ""
        key = verdict_of(each.differences), f"`{each.reference}`", study
        arms.setdefault(key, []).append(f"`{each.arm}`")
    studies: dict[tuple[str, str, str], list[str]] = {}
    for (verdict, reference, study), names in arms.items():
        studies.setdefault((verdict, _listed(names), reference), []).append(study)
    references: dict[tuple[str, str, str], list[str]] = {}
    for (verdict, names, reference), where in studies.items():
        place = where[0] + "".join(each.replace(" in", " and", 1) for each in where[1:])
        references.setdefault((verdict, names, place), []).append(reference)
    lines, alike, untested = [], [], []
    for (verdict, names, place), others in references.items():
        if verdict and verdict != UNTESTED:
            verb = "are" if " and " in names else "is"
            lines.append(f"- {names} {verb} {_than(verdict, _listed(others))}{place}.")
        else:
            pairs = untested if verdict else alike
            pairs.append(f"{names} vs {_listed(others)}{place}")
    if alike:
        lines.append(f"- No significant difference: {'; '.join(alike)}.")
    if untested:
        lines.append(f"- No test with one seed: {'; '.join(untested)}.")
    return "\n".join(lines)


def _than(verdict: str, reference: str) -> str:
    """Return a verdict with the reference behind its first adjective."""
    head, bracket, tail = verdict.partition(" (")
    return f"{head} than {reference}{bracket}{tail}"


def _listed(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def verdict_of(differences: dict[str, Interval | None]) -> str:
    """Return in which metrics an arm is significantly better or worse than the reference.

    Returns:
        Such as "significantly better (reduced.top1)"; "" if no difference is significant;
        `UNTESTED` with one seed.
    """
    known = {metric: gap for metric, gap in differences.items() if gap is not None}
    if all(gap.half is None for gap in known.values()):
        return UNTESTED
    words: dict[str, list[str]] = {}
    for metric, gap in known.items():
        if gap.is_significant:
            word = "better" if (gap.mean < 0) == is_loss(metric) else "worse"
            words.setdefault(word, []).append(metric)
    parts = [f"{word} ({', '.join(names)})" for word, names in sorted(words.items())]
    return f"significantly {' and '.join(parts)}" if parts else ""


def write(results: Path, docs: Path) -> list[Path]:
    """Write the page of main findings, a page per question, and page and chart per study."""
    documents = {path.stem: read_results(path) for path in sorted(results.glob("*.json"))}
    folder = docs / "studies"
    folder.mkdir(exist_ok=True)
    (docs / "findings").mkdir(exist_ok=True)
    written = []
    for name, document in documents.items():
        chart = draw(document, folder / f"{name}.svg")
        path = folder / f"{name}.md"
        path.write_text(study_page(document, chart.name, NOTES), encoding="utf-8")
        written += [chart, path]
    questions = yaml.safe_load(QUESTIONS.read_text(encoding="utf-8"))
    answered = [each for each in questions if comparisons(each, documents)]
    for question in answered:
        path = docs / _page(question)
        path.write_text(answer(question, documents), encoding="utf-8")
        written.append(path)
    findings = [f"- [{each['question']}]({_page(each)})" for each in answered]
    pages = [
        f"- [{document['question']}](studies/{name}.md) (`{name}`)"
        for name, document in documents.items()
    ]
    sections = [INTRO, summary(questions, documents)]
    sections += ["## Questions\n", "\n".join(findings) + "\n"]
    sections += ["## All arms of each study\n", "\n".join(pages) + "\n", HOW_TO_READ + WRITTEN]
    if not documents:
        sections = [INTRO, "No results are committed yet.\n"]
    (docs / "study.md").write_text("\n".join(sections), encoding="utf-8")
    return [*written, docs / "study.md"]


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 1 if a file is missing or stale under --check."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="only report stale files")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=FOLDER)
    options = parser.parse_args(arguments)
    if not options.check:
        write(options.results, options.docs)
        return 0
    with TemporaryDirectory() as folder:
        written = write(options.results, Path(folder))
        wanted = {path.relative_to(folder): path.read_bytes() for path in written}
    stale = [
        options.docs / name
        for name, content in wanted.items()
        if not (options.docs / name).is_file() or (options.docs / name).read_bytes() != content
    ]
    for path in stale:
        sys.stderr.write(f"{path}: missing or stale; run python docs/study.py\n")
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
