"""Write the section "A collection of a billion images" of scaling.md, from a measured rate.

python docs/scaling.py                                     # rewrite the block between the markers
python docs/scaling.py --check                             # exit status 1 if the block is stale
python docs/scaling.py --images-per-second 900 --price 2   # print the tables for a rate of yours

The rate is that of one machine, or of one GPU; the tables multiply it by their number.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.marked_block import rewrite
from benchmarks.tables import table
from elip_models.saving.files import read_object

DOCS = Path(__file__).resolve().parent
RESULTS = DOCS.parent / "benchmarks" / "results" / "real" / "collection.json"
BEGIN, END = "<!-- collection:begin -->", "<!-- collection:end -->"
IMAGES = 1_000_000_000
MACHINES = (1, 8, 64, 512)
PRICE = 0.10
"""Dollars for a machine and hour: an example, which the page states."""
DAY = 24
DIGITS = 2  # that are significant


def cost_table(rates: Mapping[str, float], price: float) -> str:
    """Return hours and dollars for IMAGES images at rates in images per second, dense first."""
    dense = next(iter(rates.values()))
    rows = [
        [
            name,
            f"{rate:,.1f}",
            rounded(hours(rate)),
            f"${rounded(hours(rate) * price)}",
            f"{dense / rate:.2f}",
        ]
        for name, rate in rates.items()
    ]
    header = ["", "images/s of one", "hours, all together", f"cost at ${price:.2f} per hour"]
    return table([*header, "relative to dense"], rows, left=1)


def time_table(rates: Mapping[str, float]) -> str:
    """Return the days for IMAGES images on several machines."""
    rows = [
        [f"{count:,}", *(f"{rounded(hours(rate) / DAY / count)} days" for rate in rates.values())]
        for count in MACHINES
    ]
    return table(["machines or GPUs", *rates], rows, left=1)


def hours(rate: float) -> float:
    """Return the hours for IMAGES images at a rate in images per second."""
    return IMAGES / rate / 3600


def rounded(value: float) -> str:
    """Return a number of two significant digits, in full: 12,000 or 0.35."""
    short = float(f"{value:.{DIGITS}g}")
    return f"{short:,.0f}" if short >= 10**DIGITS / 10 else f"{short:g}"


def block(measured: Mapping[str, Any], price: float) -> str:
    """Return what was measured, and both tables."""
    dense, reduced = measured["dense"], measured["reduced"]
    name = f"`{reduced['strategy']}`, keep {reduced['keep']:g}"
    rates = {"dense": dense["images_per_second"], name: reduced["images_per_second"]}
    bare = {"dense": dense["bare_images_per_second"], name: reduced["bare_images_per_second"]}
    shares = " and ".join(f"{rates[each] / bare[each]:.0%} ({each})" for each in rates)
    what = measured.get("model", "the model")
    return "\n\n".join(
        [
            f"Measured on one machine ({measured['machine']['device']}): {what} embeds "
            f"{rates['dense']:.1f} images/s dense and {rates[name]:.1f} reduced, which is {shares} "
            f"of the rate of the model alone. The reduced embeddings have a mean cosine of "
            f"{mean(reduced['cosine']):.3f} with the dense ones. Among {measured['photographs']:,} "
            f"photographs, {mean(reduced['recall_at_10']):.0%} of the "
            f"[neighbours are kept](concepts.md#neighbours-kept).{ray(measured)}",
            f"For {IMAGES:,} images at this rate, and at an example price of ${price:.2f} for a "
            "machine and hour:",
            cost_table(rates, price),
            "The time if the machines share the work equally, which was not measured:",
            time_table(rates),
        ]
    )


def ray(measured: Mapping[str, Any]) -> str:
    """Return the rate of Ray's actors beside those of one process and of the model, if measured."""
    if "ray" not in measured:
        return ""
    found = measured["ray"]
    rates, share = found["images_per_second"], found["share_of_bare"]
    return (
        f" With Ray, {found['actors']} actors on this machine embed {rates['actors']:.1f} images/s "
        f"(reduced, after they have started), one process {rates['one process']:.1f}. The model "
        f"alone runs {rates['bare']:.1f} on all cores: Ray reaches {share['median']:.0%} of that "
        f"({share['low']:.0%} to {share['high']:.0%} in {found['rounds']} interleaved rounds of "
        f"{found['photographs']} photographs)."
    )


def mean(value: float | Mapping[str, float]) -> float:
    """Return a number, or the mean of an interval."""
    return value["mean"] if isinstance(value, Mapping) else value


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 1 without results or markers, or if the page is stale."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--page", type=Path, default=DOCS / "scaling.md")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--price", type=positive, default=PRICE, help="dollars for an hour")
    parser.add_argument("--images-per-second", type=positive, metavar="X", help="your dense rate")
    parser.add_argument("--reduced", type=positive, metavar="X", help="your reduced rate")
    options = parser.parse_args(arguments)
    if options.reduced and not options.images_per_second:
        parser.error("--reduced: expected --images-per-second too, got none")
    if options.images_per_second:
        rates = {"dense": options.images_per_second}
        rates |= {"reduced": options.reduced} if options.reduced else {}
        sys.stdout.write(f"{cost_table(rates, options.price)}\n\n{time_table(rates)}\n")
        return 0
    try:
        measured = read_object(options.results)
    except (OSError, ValueError) as error:
        parser.error(f"--results: {error}; pass your own rate as --images-per-second")
    text, command = block(measured, options.price), "python docs/scaling.py"
    return rewrite(options.page, BEGIN, END, text, command=command, check=options.check)


def positive(text: str) -> float:
    """Return a number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


if __name__ == "__main__":
    raise SystemExit(main())
