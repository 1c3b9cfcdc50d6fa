"""Write the tables of vlm.md and of the appendix from the committed results.

python docs/vlm.py             # rewrite the blocks between the markers
python docs/vlm.py --check     # exit status 1 if a block is stale

The results are those of `benchmarks/bench_vlm.py`, of `benchmarks/redundant_patches.py`, and of a
study whose code is at commit 7962d105.
"""

from pathlib import Path
from typing import Any

from benchmarks.marked_block import Block, run
from benchmarks.measured import read_results
from benchmarks.real.training_tables import difference
from benchmarks.tables import language_model_table, table
from elip_models.saving.files import read_object

DOCS = Path(__file__).resolve().parent
RESULTS = DOCS.parent / "benchmarks" / "results" / "vlm"
DEFAULT = "diverse"
RELEVANT = f"{DEFAULT}:relevance=true"


def study_block(study: dict[str, Any]) -> str:
    """Return what was trained, and the tables of accuracies and of kinds of questions."""
    note = (
        f"{study['questions']:,} training images with five to seven questions each, "
        f"{study['steps']:,} steps, {_plural(study['seeds'], 'seed')}; {study['evaluated']:,} "
        f"questions on other images; {study['image_tokens']} image tokens. Measured on "
        f"{study['date']} at commit {study['commit']['id'][:9]} on {study['device']}. Differences "
        "from the model with every token are paired by seed, with the 95% confidence interval of "
        "Student's t over the seeds; one seed has none. The intervals are not adjusted for the "
        "number of rows, and do not include the choice of the questions. Bold: the interval "
        "excludes zero. Right answers have the 95% interval over the questions, with the trained "
        "models fixed."
    )
    dense = study["settings"][0]["by_seed"]
    rows = [
        [_title(row), _share(row["accuracy"]), _points(row["by_seed"], dense), _by_seed(row, dense)]
        for row in study["settings"][1:]
    ]
    rows.insert(0, [_title(study["settings"][0]), _share(study["settings"][0]["accuracy"]), "", ""])
    kinds = list(study["settings"][0]["by_kind"])
    by_kind = [
        [_title(row), *(f"{row['by_kind'][kind][0]:.1%}" for kind in kinds)]
        for row in study["settings"]
    ]
    seeds = {row["setting"]: row["by_seed"] for row in study["settings"]}
    keeps = [name.split()[1] for name in seeds if name.startswith(RELEVANT)]
    relevance = ", ".join(
        f"{_points(seeds[f'{RELEVANT} {keep}'], seeds[f'diverse {keep}'])} at {keep}"
        for keep in keeps
    )
    parts = [
        note,
        table(["image tokens", "right answers", "difference, points", "by seed"], rows, left=1),
        f"`{RELEVANT}` against `diverse`, paired by seed, in points: {relevance}.",
        table(["right answers", *kinds], by_kind, left=1),
    ]
    return "\n\n".join(parts)


def losses_block(study: dict[str, Any]) -> str:
    """Return what the models of the study lose with the default strategy, by `keep`."""
    seeds = {row["setting"]: row["by_seed"] for row in study["settings"]}
    losses = {
        name.split()[1]: sorted(
            100 * (dense - one) for one, dense in zip(values, seeds["dense"], strict=True)
        )
        for name, values in seeds.items()
        if name.startswith(f"{DEFAULT} ")
    }
    ranges = ", ".join(
        f"{values[0]:.1f} to {values[-1]:.1f} points at {keep}" for keep, values in losses.items()
    )
    return f"With `{DEFAULT}` and without further training, their accuracy fell by {ranges}."


def documents_block(measured: dict[str, Any]) -> str:
    """Return how documents were measured, and the table of tokens, times and features."""
    versions = ", ".join(map(" ".join, measured["versions"].items()))
    note = (
        f"A Qwen2.5-VL with random weights, on JPEG files of quality {measured['quality']}, with "
        f"{measured['text_tokens']} tokens of text. Measured on {measured['device']} on "
        f"{measured['date']} at commit {measured['commit']['id'][:7]}, "
        f"{_plural(measured['threads'], 'thread')}; {versions}. Times are medians of "
        f"{measured['rounds']} rounds, relative to the dense model; prefill includes the image "
        "tower."
    )
    rows = [
        [
            f"{name}, {document['units']:,} tokens",
            tolerance,
            f"{removed:.0%}",
            *(f"{document[phase]['ratios'][tolerance]:.2f}" for phase in ("tower", "prefill")),
            f"{document['cosine'][tolerance]:.3f}",
        ]
        for name, document in measured["documents"].items()
        for tolerance, removed in document["removed"].items()
    ]
    header = ["image", "tolerance", "removed", "image tower", "prefill", "cosine of features"]
    return f"{note}\n\n{table(header, rows, left=1)}"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _title(setting: dict[str, Any]) -> str:
    return "every token" if setting["setting"] == "dense" else f"`{setting['setting']}`"


def _by_seed(setting: dict[str, Any], dense: list[float]) -> str:
    """Return the difference of each seed from dense, in points."""
    pairs = zip(setting["by_seed"], dense, strict=False)  # a setting may have fewer seeds
    return ", ".join(f"{100 * (one - other):+.1f}".replace("-", "−") for one, other in pairs)


def _share(interval: list[float]) -> str:
    mean, low, high = (f"{100 * value:.1f}" for value in interval)
    return f"{mean}% ({low} to {high})"


def _points(values: list[float], reference: list[float]) -> str:
    """Return the difference of two settings by seed, in points, with its interval."""
    return difference(dict(enumerate(values)), dict(enumerate(reference)))


def blocks() -> list[Block]:
    """Return the times, the losses, the documents and the study."""
    parts = []
    for measured in read_results(RESULTS):
        versions = measured.machine["versions"].items()
        parts.append(
            f"Measured on {measured.machine['device']} on {measured.date} at commit "
            f"{measured.commit}, {_plural(measured.machine['threads'], 'thread')}; "
            f"{', '.join(map(' '.join, versions))}."
        )
        parts += language_model_table([e for e in measured.entries if "language_model" in e])
    documents = documents_block(read_object(RESULTS / "dedup.json"))
    study = read_object(RESULTS / "study.json")
    return [
        Block(DOCS / "vlm.md", "times", "\n\n".join(parts)),
        Block(DOCS / "vlm.md", "losses", losses_block(study)),
        Block(DOCS / "documents.md", "documents", documents),
        Block(DOCS / "appendix.md", "study", study_block(study)),
    ]


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 1 if a page has no markers, or is stale under --check."""
    return run(blocks, "python docs/vlm.py", __doc__, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
