"""Write the table of training studies in results.md from the committed results.

python docs/studies.py             # rewrite the block between the markers
python docs/studies.py --check     # exit status 1 if the block is stale
"""

from pathlib import Path
from typing import NamedTuple

from benchmarks.marked_block import Block, run
from benchmarks.studies.analysis import against
from benchmarks.studies.page import difference_cell
from benchmarks.studies.results import read_results, relative_cost
from benchmarks.tables import table

DOCS = Path(__file__).resolve().parent
RESULTS = DOCS.parent / "benchmarks" / "results" / "studies"
TOP1, LOSS = "reduced.top1", "reduced.contrastive_loss"
DENSE_LOSS = "dense.contrastive_loss"
DENSE_TOP1, OBJECTIVE = "dense.top1", "objective.loss"
OF_LEAK = (DENSE_TOP1, OBJECTIVE)
OF_TRAINING = (TOP1, DENSE_LOSS)
R1, REDUCED_R1, ITC = "dense.r1", "reduced.r1", "objective.loss_itc"


class Comparison(NamedTuple):
    """An arm and its reference in a study, and the metrics of its page that answer the question."""

    question: str
    study: str
    arm: str
    reference: str
    metrics: tuple[str, str] = (TOP1, LOSS)


COMPARISONS = (
    Comparison("Train further, merging", "quality", "tome", "dense", OF_TRAINING),
    Comparison(
        "Train further, at half of the FLOPs", "quality", "tome-low-0.50", "dense", OF_TRAINING
    ),
    Comparison("Train further, at 0.30", "quality", "tome-low-0.30", "dense", OF_TRAINING),
    Comparison("Train further, the paper's method", "quality", "paper", "dense", OF_TRAINING),
    Comparison(
        "Train further, random tokens kept, the others merged",
        "quality",
        "random-nearest",
        "dense",
        OF_TRAINING,
    ),
    Comparison("Train further, EViT", "quality", "evit", "dense", OF_TRAINING),
    Comparison("Train from scratch, merging", "quality_flat", "tome", "dense", (R1, REDUCED_R1)),
    Comparison(
        "Train from scratch, the paper's method", "quality_flat", "paper", "dense", (R1, REDUCED_R1)
    ),
    Comparison(
        "Train from scratch, the paper's method at equal FLOPs",
        "quality_flat",
        "paper",
        "dense-0.88",
        (R1, REDUCED_R1),
    ),
    Comparison("Reduce without training, 0.50", "reduced_later", "tome-0.50", "dense"),
    Comparison("Reduce without training, 0.30", "reduced_later", "tome-0.30", "dense"),
    Comparison(
        "The paper's scorer or random patches", "scorers", "exact-nearest", "random-nearest"
    ),
    Comparison("Mean of all layers or random patches", "scorers", "mean-nearest", "random-nearest"),
    Comparison("Guide CLIP by its caption", "guidance", "none-0.8", "vision", (TOP1, OBJECTIVE)),
    Comparison("Select by the caption alone", "guidance", "none-0", "vision", (TOP1, OBJECTIVE)),
    Comparison("Another caption or its own", "guidance_flat", "negatives", "own", OF_LEAK),
    Comparison("Another caption or the image", "guidance_flat", "negatives", "vision", OF_LEAK),
    Comparison("Guide ALBEF by its caption", "guidance_albef", "match-0.5", "vision", (R1, ITC)),
    Comparison("Guide BLIP by its caption", "guidance_blip", "match-0.5", "vision", (R1, ITC)),
)


NAMES = {
    TOP1: "top-1",
    LOSS: "loss",
    DENSE_LOSS: "loss with all patches",
    DENSE_TOP1: "top-1 with all patches",
    OBJECTIVE: "training objective",
    R1: "R@1 with all patches",
    REDUCED_R1: "R@1",
    ITC: "ITC objective",
}


def block(results: Path) -> str:
    """Return a row for each comparison: cost of the arm, and its differences from the reference.

    The intervals are those of the study's page, whose family has all metrics of the study.
    """
    rows = []
    for each in COMPARISONS:
        document = read_results(results / f"{each.study}.json")
        gaps = against(document, each.reference, document["quality"])
        cells = [
            f"{NAMES[metric]} {difference_cell(gaps[each.arm, metric], metric)}"
            for metric in each.metrics
        ]
        is_of_dense = document["references"][0] == "dense"
        cost = relative_cost(document, each.arm) if is_of_dense else None
        pair = f"[`{each.arm}` vs `{each.reference}`](studies/{each.study}.md)"
        seeds = str(gaps[each.arm, each.metrics[0]].seeds)
        rows.append([each.question, pair, f"{cost:.2f}" if cost else "–", *cells, seeds])
    header = ["question", "arm and reference", "FLOPs", "difference", "difference", "seeds"]
    return table(header, rows, left=2)


def blocks() -> list[Block]:
    """Return the table of comparisons."""
    return [Block(DOCS / "results.md", "studies", block(RESULTS))]


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 1 if a page has no markers, or is stale under --check."""
    return run(blocks, "python docs/studies.py", __doc__, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
