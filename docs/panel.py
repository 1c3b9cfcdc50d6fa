"""Write the panel of photographs in results.md and appendix.md from its committed results.

python docs/panel.py             # rewrite the blocks between the markers
python docs/panel.py --check     # exit status 1 if the block is stale
"""

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from benchmarks.marked_block import Block, run
from benchmarks.real.panel_tables import (
    RECALL_TITLES,
    TITLES,
    calibrated_table,
    camvid_contrasts_table,
    contrasts_table,
    means_table,
    panel_table,
    power,
    retrieval_table,
    sets_table,
    variants_table,
    widest_time,
)
from elip_models.saving.files import read_object

DOCS = Path(__file__).resolve().parent
RESULTS = DOCS.parent / "benchmarks" / "results" / "real"
NAMES = "panel", "camvid", "retrieval"
CALIBRATED = "calibrated*.json"
"""Each file has other sets."""


def block(panel: dict[str, Any], camvid: dict[str, Any], retrieval: dict[str, Any]) -> str:
    """Return the sets, the means of each setting, CamVid and retrieval."""
    parts = [
        f"{panel['model']}, features in {panel['dtype']}. No setting was chosen on these "
        "photographs, except that some of the clothes had chosen settings of strategies before. "
        f"`{panel['held_out']}` was named as the set that decides nothing, and measured last. "
        "Seven settings were added after results of the first four had been seen.",
        "Means over the sets of the differences from dense in points of top-1, with 95% intervals "
        "(of independent sets, not adjusted for the number of rows). The last column is paired. "
        f"Times are relative to dense, {times_note(panel)}.",
        means_table(panel),
        measured_on(panel),
        sets_table(panel),
        f"**CamVid**, {camvid['model']}: {camvid['frames']['test']} test frames, heads fitted on "
        f"{camvid['frames']['train']}. Dense mIoU {100 * camvid['dense']['own']:.1f}. Differences "
        "in points of mIoU with 95% intervals (percentile bootstrap of groups of "
        f"{camvid['group']} consecutive frames). A smaller image of 294 px has this height instead "
        f"of 336. Times with whole grids: {times_note(camvid)}. [Every setting against "
        "dense](dense.md#measurements). Settings minus smaller images of about the same time:",
        camvid_contrasts_table(camvid),
        measured_on(camvid),
        "**Retrieval**, Flickr8k: its "
        f"{retrieval['photographs']:,} training photographs, which chose no setting. Maps of "
        "DINOv2's and MiniLM's features are fitted on one half and measured on the other, both "
        "ways. Each caption looks for its photograph (text) and each photograph for a caption "
        "(image) among those of its half. Dense: "
        + ", ".join(
            f"{title} {100 * retrieval['dense'][name]:.1f}" for name, title in RECALL_TITLES.items()
        )
        + ". Differences in points, with 95% intervals (percentile bootstrap of photographs; they "
        "take the maps as given).",
        retrieval_table(retrieval),
        measured_on(retrieval),
    ]
    return "\n\n".join(parts)


def sets_block(panel: dict[str, Any]) -> str:
    """Return a table of every set for each measure, and contrasts of settings of equal time."""
    margin = 100 * panel["margin"]
    default = panel["sets"][panel["held_out"]]["settings"][0]["setting"]
    powers = power(panel, default)
    parts = [
        "Differences from dense in points of top-1, with 95% intervals (adjusted Wald, Bonett and "
        "Price 2012, paired by photograph, not adjusted for the number of rows). **Bold**: "
        f"non-inferior, the interval ends above −{margin:.1f} points, a margin that was named "
        "before the first measurement.",
    ]
    for measure, name in TITLES.items():
        parts += [f"**{name.capitalize()}**", panel_table(panel, measure)]
    parts += [
        "**How much the panel can show.** A setting that changes as many photographs as "
        f"`{default}` and loses nothing would be non-inferior on {sum(powers):.1f} of the "
        f"{len(powers)} sets on average, and on all of them with a probability of "
        f"{100 * prod(powers):.0f}% (refitted classifiers). So a setting may fail on a set "
        "without losing a point there.",
        "**Settings of about equal time.** Means of the sets: points of the first minus points of "
        "the second. Better or worse: sets whose 95% interval excludes zero.",
        contrasts_table(panel),
        measured_on(panel),
    ]
    return "\n\n".join(parts)


def calibrated_block(documents: Sequence[dict[str, Any]]) -> str:
    """Return what `calibrate` chose on a user's photographs, and what others say of the choice."""
    calibrated = documents[0]
    first, *_ = calibrated["sets"].values()
    return "\n\n".join(
        [
            f"`calibrate` with a tolerance of {100 * calibrated['tolerance']:.0f} points and the "
            f"task `{calibrated['task']}`, on {first['calibrated_on']:,} photographs of the part "
            "of a set that the panel does not measure. The judges are the panel's photographs of "
            f"the set, {first['judged_on']:,} or more, classified by probes of the same "
            f"{first['calibrated_on']:,}. Points of top-1 with 95% intervals.",
            calibrated_table(documents),
            *map(measured_on, documents),
        ]
    )


def variants_block(variants: dict[str, Any]) -> str:
    """Return what each form of merging changes, on photographs that may choose."""
    counts = variants["photographs"]
    parts = [
        f"{sum(counts.values()):,} photographs of {len(counts)} sets ({', '.join(counts)}), of the "
        "parts that the panel does not measure; refitted classifiers, cross-fitted. Differences "
        "from dense on the mean of the sets: top-1 in points, cross-entropy in thousandths of a "
        "nat, where more is worse. 95% intervals (normal approximation, paired by photograph, not "
        "adjusted for the number of variants)."
    ]
    parts += [variants_table(group) for group in variants["groups"].values()]
    return "\n\n".join([*parts, measured_on(variants)])


def times_note(document: dict[str, Any]) -> str:
    """Return how times were measured."""
    found = document.get("time")
    if found is None:
        return "not measured yet"
    return (
        f"{found['dtype']}, one thread, medians of {found['rounds']} interleaved rounds (95% "
        f"intervals of the median are at most {widest_time(document):.2f} wide)"
    )


def measured_on(document: dict[str, Any]) -> str:
    """Return machine, date, commit and versions."""
    versions = ", ".join(f"{name} {text}" for name, text in document["versions"].items())
    times = document.get("time", document)["commit"]
    changed = ", times with uncommitted changes to pages" if times["dirty"] else ""
    return (
        f"Measured on {document['device']} on {document['date']} at commit "
        f"{document['commit']['id'][:7]}{changed}; {versions}."
    )


def blocks() -> list[Block]:
    """Return the blocks of the page."""
    page, appendix = DOCS / "results.md", DOCS / "appendix.md"
    panel, camvid, retrieval = (read_object(RESULTS / f"{name}.json") for name in NAMES)
    calibrated = [read_object(file) for file in sorted(RESULTS.glob(CALIBRATED))]
    return [
        Block(page, "panel", block(panel, camvid, retrieval)),
        Block(appendix, "sets", sets_block(panel)),
        Block(page, "calibrated", calibrated_block(calibrated)),
        Block(page, "variants", variants_block(read_object(RESULTS / "variants.json"))),
    ]


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 1 if a page has no markers, or is stale under --check."""
    return run(blocks, "python docs/panel.py", __doc__, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
