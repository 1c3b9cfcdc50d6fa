"""Tables and rows of the panel, of CamVid, of retrieval and of calibrations, from their results.

The mean over the sets counts each set once. Its interval is that of a mean of independent sets.
"""

from collections.abc import Iterator, Sequence
from math import hypot
from statistics import NormalDist, fmean
from typing import Any, NamedTuple

from benchmarks.real.camvid import difference_of_groups
from benchmarks.real.measures import KNN, OWN, RECALLS, TOP1
from benchmarks.real.sets import SOURCES
from benchmarks.tables import table
from elip_models.intervals import Interval, paired_interval
from elip_models.profiling.measure import NO_GAIN

TITLES = {TOP1: "kept classifiers", OWN: "refitted classifiers", KNN: "nearest neighbours"}
HEADS = {"dense": "kept head", "own": "refitted head"}
"""Of CamVid, by the key of its results."""
RECALL_TITLES = dict(zip(RECALLS, ("text R@1", "text R@5", "image R@1", "image R@5"), strict=True))
EQUAL_TIME = 0.05
"""Largest difference of the times, relative to dense, of two settings that are contrasted."""
BATCH, SINGLE = 8, 1
DISTILLED = {
    "distilled_resize_merge": "resize_merge 0.5",
    "distilled_resize": "resize:size=168",
}
"""Folder of a model that `elip distill` wrote, by which results name it: what it was trained as."""
RESIZE, DENSE_AT = "resize:size=", "dense@"
"""How the names of settings that are a smaller image begin, on the panel and on CamVid."""

Document = dict[str, Any]


class Row(NamedTuple):
    """What one setting costs on the panel, by one measure.

    Attributes:
        setting: as `reduce_` takes it.
        sets: the difference from dense by set.
        mean: over the sets.
        worst: the set with the largest loss, by its mean.
        non_inferior: the number of sets on which the setting is non-inferior.
    """

    setting: str
    sets: dict[str, Interval]
    mean: Interval
    worst: str
    non_inferior: int


def rows(panel: Document, measure: str = OWN) -> list[Row]:
    """Return a row for each setting of the panel, in their order."""
    first, *_ = panel["sets"].values()
    found = []
    for i, entry in enumerate(first["settings"]):
        differences = {
            name: each["settings"][i]["difference"][measure] for name, each in panel["sets"].items()
        }
        sets = {name: interval_of(each) for name, each in differences.items()}
        found.append(
            Row(
                entry["setting"],
                sets,
                mean_over_sets(list(sets.values())),
                min(sets, key=lambda name: sets[name].mean),
                sum(each["non_inferior"] for each in differences.values()),
            )
        )
    return found


def power(panel: Document, setting: str, measure: str = OWN) -> list[float]:
    """Return how probably a setting that loses nothing would be non-inferior, set by set.

    It changes as many photographs as `setting` does, as many for the better as for the worse. The
    difference is taken as normal.
    """
    found = []
    for each in panel["sets"].values():
        entry = next(entry for entry in each["settings"] if entry["setting"] == setting)
        gap, count = entry["difference"][measure], each["photographs"]
        error = (gap["gains"] + gap["losses"]) ** 0.5 / count
        found.append(NormalDist().cdf(panel["margin"] / error - NormalDist().inv_cdf(0.975)))
    return found


def mean_over_sets(intervals: Sequence[Interval]) -> Interval:
    """Return the mean of intervals of independent sets; its half width is that of a sum."""
    mean = fmean(each.mean for each in intervals)
    lower = hypot(*(each.mean - each.low for each in intervals)) / len(intervals)
    upper = hypot(*(each.high - each.mean for each in intervals)) / len(intervals)
    return Interval(mean, mean - lower, mean + upper)


def contrast(first: str, second: str, count: int) -> Interval:
    """Return the difference of two settings of one set by their packed outcomes."""
    left, right = int(first, 16), int(second, 16)
    return paired_interval((left & ~right).bit_count(), (right & ~left).bit_count(), count)


def points(interval: Interval) -> str:
    """Return '−1.4 (−3.5 to 0.8)' in points."""
    mean, low, high = (100 * end for end in interval)
    return f"{mean:+.1f} ({low:.1f} to {high:.1f})".replace("-", "−")


def times(document: Document, batch: int) -> dict[str, Interval]:
    """Return the time of each setting relative to dense, with its interval; empty if not there."""
    runs = document.get("time", {"runs": []})["runs"]
    ratios = next((run["ratios"] for run in runs if run["batch"] == batch), {})
    return {name: Interval(*each.values()) for name, each in ratios.items()}


def widest_time(document: Document) -> float:
    """Return the width of the widest interval of a time."""
    ratios = (run["ratios"] for run in document["time"]["runs"])
    return max(each["high"] - each["low"] for found in ratios for each in found.values())


def title(setting: str) -> str:
    """Return a setting as a cell of a table: `merge 0.7`, or 'smaller image, 196 px'."""
    if setting in DISTILLED:
        return f"{title(DISTILLED[setting])}, distilled"
    if is_smaller_image(setting):
        return f"smaller image, {setting.removeprefix(RESIZE).removeprefix(DENSE_AT)} px"
    strategy, _, pixels = setting.partition("@")
    return f"`{strategy}`, {pixels} px" if pixels else f"`{setting}`"


def is_smaller_image(setting: str) -> bool:
    """Return whether a setting is the dense model on a smaller image, distilled or not."""
    return DISTILLED.get(setting, setting).startswith((RESIZE, DENSE_AT))


def time_text(document: Document, setting: str, batch: int) -> str:
    """Return '0.69', with 'no gain' where it is one."""
    found = times(document, batch)
    if setting not in found:
        return ""
    ratio = found[setting].mean
    return f"{ratio:.2f}" + ("" if ratio < NO_GAIN else ", no gain")


def sets_table(panel: Document) -> str:
    """Return what the sets show, their sizes, licences, and who chose settings on them."""
    cells = [
        [
            name,
            SOURCES[name].shows,
            f"{found['photographs']:,}",
            f"`{SOURCES[name].repository}`",
            SOURCES[name].licence,
            *(f"{100 * found['dense'][measure]:.1f}" for measure in (TOP1, KNN)),
        ]
        for name, found in panel["sets"].items()
    ]
    header = ["set", "classes", "measured", "files", "licence", "dense probe", "dense k-NN"]
    return table(header, cells, left=2)


def means_table(panel: Document) -> str:
    """Return a row for each setting: its times, means of the sets, and the worst set.

    The last column is the setting minus the smaller image of the nearest time, distilled if the
    setting was, with kept classifiers.
    """
    ratios = times(panel, BATCH)
    found = {measure: {row.setting: row for row in rows(panel, measure)} for measure in TITLES}
    contrasted = {(left, right): mean for left, right, _, mean in contrasts(panel, TOP1)}
    contrasted |= {(right, left): negative(mean) for (left, right), mean in contrasted.items()}
    cells = []
    for name, row in found[TOP1].items():
        rivals = [
            other
            for setting, other in contrasted
            if setting == name
            and is_smaller_image(other)
            and not is_smaller_image(name)
            and (other in DISTILLED) == (name in DISTILLED)
        ]
        nearest = min(
            rivals, key=lambda other: abs(ratios[name].mean - ratios[other].mean), default=None
        )
        cells.append(
            [
                title(name),
                *(time_text(panel, name, batch) for batch in (BATCH, SINGLE)),
                *(points(found[measure][name].mean) for measure in TITLES),
                f"{points(row.sets[row.worst]).partition(' ')[0]} ({row.worst})",
                "" if nearest is None else points(contrasted[name, nearest]),
            ]
        )
    header = ["setting", "batch 8", "batch 1", *TITLES.values(), "worst set, kept"]
    return table([*header, "minus a smaller image, kept"], cells, left=1)


def negative(interval: Interval) -> Interval:
    """Return the interval of the difference the other way round."""
    return Interval(-interval.mean, -interval.high, -interval.low)


def panel_table(panel: Document, measure: str) -> str:
    """Return a row for each setting: the difference from dense on each set, mean and time."""
    names = list(panel["sets"])
    cells = []
    for row in rows(panel, measure):
        differences = []
        for name in names:
            bold = "**" if row.sets[name].low > -panel["margin"] else ""
            differences.append(f"{bold}{points(row.sets[name])}{bold}")
        cells.append(
            [
                title(row.setting),
                *(time_text(panel, row.setting, batch) for batch in (BATCH, SINGLE)),
                points(row.mean),
                *differences,
            ]
        )
    return table(["setting", "batch 8", "batch 1", "mean", *names], cells, left=1)


def contrasts(
    panel: Document, measure: str = OWN
) -> Iterator[tuple[str, str, dict[str, Interval], Interval]]:
    """Yield pairs of settings of about equal time, with first minus second: by set, on average."""
    ratios = times(panel, BATCH)
    first, *_ = panel["sets"].values()
    names = [entry["setting"] for entry in first["settings"] if entry["setting"] in ratios]
    for i, left in enumerate(names):
        for j, right in enumerate(names[i + 1 :], start=i + 1):
            if abs(ratios[left].mean - ratios[right].mean) > EQUAL_TIME:
                continue
            sets = {
                name: contrast(
                    found["settings"][i]["correct"][measure],
                    found["settings"][j]["correct"][measure],
                    found["photographs"],
                )
                for name, found in panel["sets"].items()
            }
            yield left, right, sets, mean_over_sets(list(sets.values()))


def contrasts_table(panel: Document) -> str:
    """Return `contrasts` as a table, with sets by refitted classifiers."""
    kept = {(left, right): mean for left, right, _, mean in contrasts(panel, TOP1)}
    cells = []
    for left, right, sets, mean in contrasts(panel, OWN):
        better = [name for name, each in sets.items() if each.low > 0]
        worse = [name for name, each in sets.items() if each.high < 0]
        cells.append(
            [
                f"{title(left)} − {title(right)}",
                points(kept[left, right]),
                points(mean),
                ", ".join(better) or "none",
                ", ".join(worse) or "none",
            ]
        )
    header = ["contrast", "kept", "refitted", "refitted, better on", "worse on"]
    return table(header, cells, left=1)


def camvid_table(camvid: Document) -> str:
    """Return a row for each setting of CamVid: the difference from dense by both heads."""
    cells = []
    for entry in camvid["settings"]:
        gaps = entry["difference"]
        cells.append(
            [
                title(entry["setting"]),
                *(time_text(camvid, entry["setting"], batch) for batch in (BATCH, SINGLE)),
                *(points(interval_of(gaps[head])) for head in HEADS),
                points(interval_of(entry["validation"]["dense"])),
            ]
        )
    header = ["setting", "batch 8", "batch 1", *HEADS.values(), "kept head, validation frames"]
    return table(header, cells, left=1)


def camvid_contrasts_table(camvid: Document) -> str:
    """Return settings minus smaller images of about the same time, by both heads."""
    ratios, totals = times(camvid, BATCH), {e["setting"]: e["totals"] for e in camvid["settings"]}
    smaller = [name for name in totals if is_smaller_image(name)]
    cells = [
        [
            f"{title(name)} − {title(other)}",
            f"{ratios[name].mean:.2f}, {ratios[other].mean:.2f}",
            *(
                points(difference_of_groups(totals[name][head], totals[other][head]))
                for head in HEADS
            ),
        ]
        for name in totals
        for other in smaller
        if name not in smaller and abs(ratios[name].mean - ratios[other].mean) <= EQUAL_TIME
    ]
    return table(["contrast", "times", *HEADS.values()], cells, left=1)


def retrieval_table(retrieval: Document) -> str:
    """Return a row for each setting: the difference of each recall, by refitted and kept maps."""
    cells = [
        [
            title(entry["setting"]),
            *(recall_text(entry, "own", name) for name in RECALLS),
            *(recall_text(entry, "dense", name) for name in RECALLS[1::2]),
        ]
        for entry in retrieval["settings"]
    ]
    refitted = (f"{title}, refitted" for title in RECALL_TITLES.values())
    kept = (f"{RECALL_TITLES[name]}, kept" for name in RECALLS[1::2])
    return table(["setting", *refitted, *kept], cells, left=1)


def recall_text(entry: Document, maps: str, name: str) -> str:
    """Return the difference of a recall in points, bold if it is non-inferior."""
    found = entry["difference"][maps][name]
    bold = "**" if found["non_inferior"] else ""
    return f"{bold}{points(interval_of(found))}{bold}"


def variants_table(group: Sequence[Document]) -> str:
    """Return a row for each variant of a group: its differences from dense and from the first."""
    cells = [
        [
            entry["does"] if i else title(entry["does"]),
            f"{entry['flops']:.2f}",
            points(interval_of(entry["from_dense"]["top1"])),
            nats(interval_of(entry["from_dense"]["cross_entropy"])),
            nats(interval_of(entry["from_first"]["cross_entropy"])) if i else "",
        ]
        for i, entry in enumerate(group)
    ]
    header = ["variant", "FLOPs", "top-1", "cross-entropy", "cross-entropy, against the first"]
    return table(header, cells, left=1)


def nats(interval: Interval) -> str:
    """Return '+4 (−3 to 11)' in thousandths of a nat."""
    mean, low, high = (1000 * end for end in interval)
    return f"{mean:+.0f} ({low:.0f} to {high:.0f})".replace("-", "−")


def interval_of(found: Document) -> Interval:
    """Return the interval in an entry that may say more of it."""
    return Interval(*(found[end] for end in Interval._fields))


def calibrated_table(documents: Sequence[Document]) -> str:
    """Return a row for each draw of photographs: the choice, its promise, and the judges."""
    cells = []
    draws = (
        (f"{name}, seed {each['seed']}, {each['dtype']}", found)
        for each in documents
        for name, found in each["sets"].items()
    )
    for name, found in draws:
        if found["chosen"] is None:
            cells.append([name, "none", "", "", "", "", ""])
            continue
        judged = (points(interval_of(found["judged"][measure])) for measure in TITLES)
        cells.append(
            [
                name,
                f"`{found['chosen']}`",
                f"{found['time']:.2f}",
                points(interval_of(found["held_back"]))
                + ("" if found["confirmed"] else ", refused"),
                *judged,
            ]
        )
    judges = ["on the judges", "refitted", "nearest neighbours"]
    header = ["photographs", "choice", "time", "on the 500 held back", *judges]
    return table(header, cells, left=2)
