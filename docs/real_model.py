"""Write the results in real_model.md from the committed results of `benchmarks.real`.

python docs/real_model.py             # rewrite both blocks between markers
python docs/real_model.py --check     # exit status 1 if a block is stale
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.marked_block import rewrite
from benchmarks.tables import ratio, table
from elip_models.saving.files import read_object

DOCS = Path(__file__).resolve().parent
RESULTS = DOCS.parent / "benchmarks" / "results" / "real"
BEGIN, END = "<!-- real:begin -->", "<!-- real:end -->"
FIRST, LAST = "<!-- conclusion:begin -->", "<!-- conclusion:end -->"
RATES = (0.7, 0.5, 0.35)
TITLES = {
    "cosine": "cosine",
    "neighbours": "neighbours kept",
    "self": "finds itself",
    "patches": "patch cosine",
}
RETRIEVAL = {
    "text_to_image_r1": "text to image, R@1",
    "text_to_image_r5": "R@5",
    "image_to_text_r1": "image to text, R@1",
    "image_to_text_r5": "R@5",
}
RANKS = {"r1": "R@1", "reciprocal_rank": "mean reciprocal rank"}


def block(document: dict[str, Any], title: str = "") -> str:
    """Return what was measured, the table of settings, and the table of differences.

    `title` is the beginning of the heading.
    """
    settings = document["settings"]
    times = document.get("time", {}).get("by_threads", {})
    header = ["setting", "FLOPs", *TITLES.values(), *(_threads(n) for n in times)]
    rows = [
        [
            f"`{row['setting']}`",
            f"{row['flops']:.2f}",
            *(interval(row[name]) for name in TITLES),
            *(ratio(each["ratios"][row["setting"]]) for each in times.values()),
        ]
        for row in settings
    ]
    parts = [note(document, title), table(header, rows, left=1)]
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


def conclusion(results: Path) -> str:
    """Return the main results: ToMe and a smaller image at each rate, and training without labels.

    Raises:
        ValueError: the results contradict the sentence below the table.
    """
    features = read_object(results / "dinov2_s_flickr8k_strategies.json")
    retrieval = read_object(results / "retrieval_dinov2_s_flickr8k_test.json")
    kept = {row["setting"]: row["neighbours"]["mean"] for row in features["settings"]}
    recall = {row["setting"]: row["text_to_image_r5"]["mean"] for row in retrieval["settings"]}
    rows = [
        [f"`{rate}`"]
        + [
            "–" if found is None else f"{found:.2f}"
            for measure in (kept, recall)
            for found in (measure.get(f"{name} {rate}") for name in ("tome", "resize"))
        ]
        for rate in RATES
    ]
    least = [rate for rate in RATES if kept[f"tome {rate}"] > kept[f"resize {rate}"]]
    if least != [0.7, 0.5] or any(recall[f"tome {r}"] > recall[f"resize {r}"] for r in (0.5, 0.35)):
        raise ValueError(f"{__file__}: expected results that agree with the sentence, got {rows}")
    trained = [
        f"{after['neighbours']['mean']:.2f} of the neighbours at "
        f"`keep={after['setting'].rpartition('-')[2]}` (before: "
        f"{before['neighbours']['mean']:.2f})"
        for path in sorted(results.glob("distilled_*.json"), reverse=True)
        for before, after in [read_object(path)["settings"]]
    ]
    header = ["`keep`", "`tome`", "`resize`", "`tome`, R@5", "`resize`, R@5"]
    return "\n\n".join(
        [
            f"{features['model'].split(',')[0]}, not trained further, with ToMe and with a smaller "
            f"image: [neighbours kept](glossary.md#neighbours-kept) among "
            f"{features['photographs']['images']} photographs, and [R@5](glossary.md#recall) of "
            f"text-to-image retrieval among {retrieval['photographs']['images']:,} (dense: "
            f"{recall['dense']:.2f}):",
            table(header, rows, left=1),
            "ToMe keeps more neighbours down to `keep=0.5`, the smaller image at 0.35. The smaller "
            "image has the higher recall at 0.5 and 0.35. Trained without labels, the reduced "
            f"model keeps {' and '.join(trained)}.",
        ]
    )


def note(document: dict[str, Any], title: str) -> str:
    """Return heading, model, photographs, versions, and the error of the model."""
    photographs, error = document["photographs"], document["onnxruntime"]
    largest = max(error["cls_error"], error["patch_error"])
    number = photographs["images"] * photographs["sets"]
    parted = f", in {photographs['sets']} disjoint sets" if photographs["sets"] > 1 else ""
    return (
        f"### {title}{number} photographs of `{photographs['names']}`\n\n"
        f"{document['model']}, on the first {number} photographs of that list{parted}. "
        f"On {error['images']} of them the dense model differs from onnxruntime's run of the "
        f"original file by at most {largest:.1e}; the largest feature is "
        f"{error['largest_feature']:.1f}. {measured(document)}{timed(document.get('time'))}"
    )


def timed(time: dict[str, Any] | None) -> str:
    """Return what the times are and how they were measured, or nothing if there are none."""
    if time is None:
        return ""
    return (
        f" Times are relative to dense: medians of {time['rounds']} interleaved rounds at batch "
        f"{time['batch']} on {time['device']}, measured on {time['date']} at commit "
        f"{time['commit']['id'][:7]}."
    )


def _threads(number: str) -> str:
    return f"time, {number} thread{'s' if int(number) > 1 else ''}"


def measured(document: dict[str, Any]) -> str:
    """Return device, date, commit and versions in a sentence."""
    versions = ", ".join(f"{name} {each}" for name, each in document["versions"].items())
    return (
        f"Measured on {document['device']} on {document['date']} at commit "
        f"{document['commit']['id'][:7]}; {versions}."
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


def distilled_block(document: dict[str, Any]) -> str:
    """Return the tables of a model that was trained without labels, by the name of its setting."""
    return block(document, f"`{document['settings'][-1]['setting']}`, ")


def retrieval_block(document: dict[str, Any]) -> str:
    """Return the recalls of reduced images."""
    photographs, settings = document["photographs"], document["settings"]
    header = ["setting", "FLOPs", *RETRIEVAL.values()]
    rows = [
        [f"`{row['setting']}`", f"{row['flops']:.2f}", *(interval(row[name]) for name in RETRIEVAL)]
        for row in settings
    ]
    parts = [
        f"### Retrieval among {photographs['images']} photographs of `{photographs['names']}`",
        f"{document['model']}, {photographs['captions']} captions. {measured(document)}",
        table(header, rows, left=1),
    ]
    for against in dict.fromkeys(name for row in settings for name in row["differences"]):
        changes = [
            [f"`{row['setting']}`", *(difference(found[name]) for name in RETRIEVAL)]
            for row in settings
            if (found := row["differences"].get(against)) is not None
        ]
        parts += [
            f"Differences from `{against}`, paired by caption. Bold: the interval excludes zero.",
            table(["setting", *RETRIEVAL.values()], changes, left=1),
        ]
    return "\n\n".join(parts)


def guided_block(document: dict[str, Any]) -> str:
    """Return explanation, tables and findings of the re-ranking under the query."""
    guided, photographs = document["guided"], document["photographs"]
    against, settings = guided["against"], guided["settings"]
    header = ["setting", "second encodings", *RANKS.values()]
    header += [f"{title}, minus `{against}`" for title in RANKS.values()]
    rows = [
        [
            f"`{row['setting']}`",
            f"{row['second_flops']:.2f}",
            *(interval(row[name]) for name in RANKS),
            *(difference(row.get("difference", {}).get(name)) for name in RANKS),
        ]
        for row in settings
    ]
    texts = [row for row in settings if "by_text" in row]
    added = [
        [
            f"`{row['setting']}`",
            f"`{row['by_text']['against']}`",
            *(difference(row["by_text"]["difference"][name]) for name in RANKS),
        ]
        for row in texts
    ]
    return "\n\n".join(
        [
            f"### Guidance by the query, {photographs['images']} photographs of "
            f"`{photographs['names']}`",
            f"{document['model']}. {guided['queries']} queries: a caption of as many photographs. "
            f"`{guided['first']}` ranks all photographs; {guided['among_candidates']:.0%} of the "
            f"queries have theirs among the first {guided['candidates']}, which are encoded again. "
            "Second encodings: FLOPs of one query, in forward passes of the dense model; 0 is a "
            f"ranking by one encoding. {measured(document)}",
            table(header, rows, left=1),
            *finding_of(texts, lambda row: row["difference"], f"`{against}`"),
            "What the text adds to the same strategy:",
            table(["setting", "minus", *RANKS.values()], added, left=2),
            *finding_of(texts, lambda row: row["by_text"]["difference"], "selection by the image"),
            cost_of(guided, photographs["images"]),
        ]
    )


def finding_of(
    texts: list[dict[str, Any]], change: Callable[[dict[str, Any]], dict[str, Any]], other: str
) -> list[str]:
    """Return which guided settings differ significantly from another selection."""
    groups: dict[str, list[str]] = {"higher": [], "lower": [], "no": []}
    for row in texts:
        found = change(row)["reciprocal_rank"]
        way = "higher" if found["low"] > 0 else "lower" if found["high"] < 0 else "no"
        groups[way].append(f"`{row['setting']}`")
    found = [
        f"A significantly {way} mean reciprocal rank than {other}: {', '.join(groups[way])}."
        for way in ("higher", "lower")
        if groups[way]
    ]
    if groups["no"]:
        found.append(f"No significant difference from {other}: {', '.join(groups['no'])}.")
    return found


def cost_of(guided: dict[str, Any], images: int) -> str:
    """Return after how many queries one encoding by the dense model costs less than two."""
    settings = guided["settings"]
    first = next(row["flops"] for row in settings if row["setting"] == guided["first"])
    queries = images * (1 - first) / max(row["second_flops"] for row in settings)
    return (
        f"After {queries:.0f} queries, the first and second encodings together cost more than all "
        f"{images} photographs encoded once with the dense model."
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
    kinds = {
        "dinov2_*.json": block,
        "distilled_*.json": distilled_block,
        "retrieval_*_test.json": retrieval_block,
        "retrieval_*_test_guided.json": guided_block,
    }
    text = "\n\n".join(
        write(read_object(path))
        for pattern, write in kinds.items()
        for path in sorted(options.results.glob(pattern), reverse=True)  # the test split first
    )
    written = {"command": "python docs/real_model.py", "check": options.check}
    first = rewrite(options.page, FIRST, LAST, conclusion(options.results), **written)
    return max(first, rewrite(options.page, BEGIN, END, text, **written))


if __name__ == "__main__":
    raise SystemExit(main())
