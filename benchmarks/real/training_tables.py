"""Tables of the trainings in appendix.md, from their results."""

from collections import Counter
from functools import cache
from math import cos, pi
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import timm
import torch
from scipy.stats import t

import elip_models
from benchmarks.real.training import DENSE, FINISH, FINISHED, REDUCED, WARMUP, Arm
from benchmarks.tables import table
from elip_models.saving.files import read_object

ENDS = {DENSE: "", REDUCED: "", FINISHED: " + finish"}
MEASURES = {
    "top1": "top-1",
    "text_to_image_r1": "text to image, R@1",
    "text_to_image_r5": "R@5",
    "image_to_text_r1": "image to text, R@1",
    "image_to_text_r5": "R@5",
}


def tables(results: Path) -> str:
    """Return a table for each study whose results are in the folder; empty without any."""
    studies = {
        "finetune.json": (
            "### Fine-tuning a classifier",
            "DINOv2 ViT-S/14 with a new last layer is trained on {train:,} photographs of clothes "
            "and judged on {held_out:,} others, in {steps} steps of {batch} images of {pixels} x "
            "{pixels} px. The others are the test split and the validation split, which had chosen "
            "settings before.",
        ),
        "clip.json": (
            "### Training a CLIP",
            "DINOv2 ViT-S/14 and MiniLM, with projections fitted on the frozen towers, are trained "
            "on {train:,} photographs of Flickr8k with captions and judged on the {test:,} of its "
            "test split, in {steps} steps of {batch} pairs with images of {pixels} x {pixels} px. "
            "In training, the caption of an image guides `elip`, by its MiniLM vector as it is; in "
            "evaluation no text does.",
        ),
    }
    parts = []
    for file, (title, sentence) in studies.items():
        if (results / file).is_file():
            document = read_object(results / file)
            parts += [title, sentence.format(**document["settings"]) + " " + note(document)]
            parts += [study_table(document)]
    return "\n\n".join(parts)


def note(document: dict[str, Any]) -> str:
    """Return what the columns are, and what was measured where."""
    time = document.get("time")
    measured = (
        f" Time of training is that of the steps, from medians of {time['rounds']} interleaved "
        f"rounds with {time['threads']} threads."
        if time
        else ""
    )
    highest = (1 + cos(pi * (1 - FINISH / (1 - WARMUP)))) / 2  # of a cosine schedule
    counts = Counter(row["arm"] for row in document["runs"]).values()
    seeds = f"{min(counts)}" if len({*counts}) == 1 else f"{min(counts)} to {max(counts)}"
    return (
        f"Points against `dense`, paired by seed, with 95% intervals of Student's t over the "
        "seeds. They do not include the choice of the photographs, and are not adjusted for the "
        f"number of rows; bold: the interval excludes zero. Seeds of each arm: {seeds}; one seed "
        "has no interval. All arms have the learning rate of `dense`. Tokens: share of the dense "
        "model's, mean over the layers. Each model is judged dense and, in the columns marked so, "
        "reduced as it was trained. `+ finish`: the "
        f"last tenth of the steps is dense, with at most {highest:.0%} of the highest learning "
        f"rate.{measured} {document['device']}, {document['date']}, "
        f"commit {document['commit']['id'][:7]}; matrix products in bf16."
    )


def study_table(document: dict[str, Any]) -> str:
    """Return a row for each arm and end: time, and the difference of each measure from dense."""
    values = values_by_seed(document)
    dense = values[DENSE, DENSE, DENSE]
    measures = {name: title for name, title in MEASURES.items() if name in dense}
    header = ["arm", "tokens", "time of training", *measures.values()]
    header += [f"{title}, reduced" for title in measures.values()]
    rows = []
    for arm, end in dict.fromkeys((arm, end) for arm, end, _ in values):
        tokens = f"{kept_tokens(arm, document['settings']['pixels']):.2f}"
        cells = [f"`{arm}`{ENDS[end]}", tokens, training_time(document, arm, end)]
        for forward in (DENSE, REDUCED):
            of_arm = values.get((arm, end, forward), {})
            cells += [
                absolute(dense[name])
                if (arm, forward) == (DENSE, DENSE)
                else difference(of_arm.get(name, {}), dense[name])
                for name in measures
            ]
        rows.append(cells)
    return table(header, rows, left=1)


@cache
def kept_tokens(arm: str, pixels: int) -> float:
    """Return the share of the dense tower's tokens that an arm processes while it is reduced."""
    parsed = Arm.parse(arm)
    if parsed.strategy is None:
        return 1.0
    with torch.device("meta"):
        tower = timm.create_model("vit_small_patch14_dinov2", img_size=pixels, num_classes=0)
    elip_models.reduce_(tower, parsed.strategy, keep=parsed.keep)
    return elip_models.reduction_summary(tower).keep


def values_by_seed(document: dict[str, Any]) -> dict[tuple[str, str, str], Any]:
    """Return {(arm, end, forward): {measure: {seed: value}}}."""
    values: dict[tuple[str, str, str], Any] = {}
    for row in document["runs"]:
        for end, forwards in row["ends"].items():
            for forward, scores in forwards.items():
                measures = values.setdefault((row["arm"], end, forward), {})
                for name, value in scores.items():
                    measures.setdefault(name, {})[row["seed"]] = value
    return values


def training_time(document: dict[str, Any], arm: str, end: str) -> str:
    """Return the time of all steps relative to dense; a dash without times."""
    share = Arm.parse(arm).share
    ratio = document.get("time", {}).get("ratios", {}).get(arm, 1.0 if share < 1 else None)
    if ratio is None:
        return "–"
    if end == FINISHED:
        ratio = (1 - FINISH) * ratio + FINISH
    return f"{share * ratio:.2f}"


def absolute(values: dict[int, float]) -> str:
    """Return the mean over seeds in percent."""
    return f"{100 * fmean(values.values()):.1f}"


def difference(values: dict[int, float], reference: dict[int, float]) -> str:
    """Return '−1.4 (−3.5 to 0.8)' in points, in bold if the interval excludes zero."""
    shared = values.keys() & reference.keys()
    if not shared:
        return "–"
    if len(shared) == 1:
        (seed,) = shared
        return f"{100 * (values[seed] - reference[seed]):+.1f}".replace("-", "−")
    mean, half = interval_over_seeds(values, reference)
    text = f"{mean:+.1f} ({mean - half:.1f} to {mean + half:.1f})".replace("-", "−")
    return f"**{text}**" if half < abs(mean) else text


def interval_over_seeds(
    values: dict[int, float], reference: dict[int, float]
) -> tuple[float, float]:
    """Return mean and half of the 95% interval of paired differences, in points.

    The interval is that of Student's t over the seeds that both have, at least two.
    """
    gaps = [100 * (values[seed] - reference[seed]) for seed in values if seed in reference]
    half = float(t.ppf(0.975, len(gaps) - 1)) * stdev(gaps) / len(gaps) ** 0.5
    return fmean(gaps), half
