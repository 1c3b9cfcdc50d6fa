"""Write the tables of real_model.md from the committed results of `python -m benchmarks.real`.

python docs/real_model.py             # rewrite the block between the two markers
python docs/real_model.py --check     # exit status 1 if the block is stale
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks.marked_block import rewrite
from benchmarks.tables import ratio, table
from elip_models.models.io.files import read_object

DOCS = Path(__file__).resolve().parent
RESULTS = DOCS.parent / "benchmarks" / "results" / "real"
BEGIN, END = "<!-- real:begin -->", "<!-- real:end -->"
TITLES = {
    "cosine": "cosine",
    "neighbours": "neighbours kept",
    "self": "finds itself",
    "patches": "patch cosine",
}


def block(document: dict[str, Any]) -> str:
    """Return what was measured, the table of settings, and the table of differences."""
    settings = document["settings"]
    times = document.get("time", {}).get("by_threads", {})
    header = ["setting", "FLOPs", *TITLES.values(), *(f"time, {n} threads" for n in times)]
    rows = [
        [
            f"`{row['setting']}`",
            f"{row['flops']:.2f}",
            *(interval(row[name]) for name in TITLES),
            *(ratio(each["ratios"][row["setting"]]) for each in times.values()),
        ]
        for row in settings
    ]
    parts = [note(document), table(header, rows, left=1)]
    compared = [row for row in settings if "difference" in row]
    if compared:
        rows = [
            [f"`{row['setting']}`", *(difference(row["difference"][name]) for name in TITLES)]
            for row in compared
        ]
        parts += [
            finding(compared, document["against"]),
            f"Differences from `{document['against']}`, paired by image. Bold: the interval "
            "excludes zero.",
            table(["setting", *TITLES.values()], rows, left=1),
        ]
    if document["photographs"]["sets"] > 1:
        rows = [
            [f"`{row['setting']}`", *(means(row["by_set"].get(name)) for name in TITLES)]
            for row in settings
        ]
        parts += ["Mean of each set:", table(["setting", *TITLES.values()], rows, left=1)]
    return "\n\n".join(parts)


def note(document: dict[str, Any]) -> str:
    """Return model, photographs, versions, and the error of the model."""
    photographs, error = document["photographs"], document["onnxruntime"]
    versions = ", ".join(f"{name} {each}" for name, each in document["versions"].items())
    largest = max(error["cls_error"], error["patch_error"])
    number = photographs["images"] * photographs["sets"]
    parted = f", in {photographs['sets']} disjoint sets" if photographs["sets"] > 1 else ""
    return (
        f"### {number} photographs of `{photographs['names']}`\n\n"
        f"{document['model']}, on the first {number} photographs of that list{parted}. "
        f"On {error['images']} of them the dense model differs from onnxruntime's run of the "
        f"original file by at most {largest:.1e}; the largest feature is "
        f"{error['largest_feature']:.1f}. Measured on {document['device']} on {document['date']} "
        f"at commit {document['commit']['id'][:7]}; {versions}."
    )


def finding(compared: list[dict[str, Any]], against: str) -> str:
    """Return which settings keep significantly fewer neighbours than another one, and more."""
    found = [(row["setting"], row["difference"]["neighbours"]) for row in compared]
    groups = {
        "fewer": [f"`{setting}`" for setting, each in found if each["high"] < 0],
        "more": [f"`{setting}`" for setting, each in found if each["low"] > 0],
    }
    return " ".join(
        f"{', '.join(names)} {'keeps' if len(names) == 1 else 'keep'} significantly {amount} "
        f"neighbours than `{against}`."
        for amount, names in groups.items()
        if names
    )


def means(found: list[float] | None) -> str:
    """Return '0.966, 0.963, 0.968', or a dash."""
    return "–" if found is None else ", ".join(f"{each:.3f}" for each in found)


def interval(found: dict[str, float] | None) -> str:
    """Return '0.966 (0.962 to 0.970)', or a dash."""
    if found is None:
        return "–"
    return f"{found['mean']:.3f} ({found['low']:.3f} to {found['high']:.3f})"


def difference(found: dict[str, float] | None) -> str:
    """Return '+0.010 (0.004 to 0.016)', in bold if the interval excludes zero."""
    if found is None:
        return "–"
    text = f"{found['mean']:+.3f} ({found['low']:.3f} to {found['high']:.3f})".replace("-", "−")
    return f"**{text}**" if found["low"] > 0 or found["high"] < 0 else text


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 1 if the page has no markers, or is stale under --check."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=DOCS / "real_model.md")
    options = parser.parse_args(arguments)
    results = sorted(options.results.glob("*.json"), reverse=True)  # the test split comes first
    text = "\n\n".join(block(read_object(path)) for path in results)
    command = "python docs/real_model.py"
    return rewrite(options.page, BEGIN, END, text, command=command, check=options.check)


if __name__ == "__main__":
    raise SystemExit(main())
