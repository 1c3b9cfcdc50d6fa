"""Write the predicted break-even batches of faster.md from the committed predictions.

python docs/break_even.py             # rewrite the block between the markers
python docs/break_even.py --check     # exit status 1 if the block is stale

The predictions are those of `python -m benchmarks.break_even --output FILE`.
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks.break_even import batch_or_none
from benchmarks.marked_block import rewrite
from benchmarks.tables import table
from elip_models.saving.files import read_object

DOCS = Path(__file__).resolve().parent
RESULTS = DOCS.parent / "benchmarks" / "results" / "predicted" / "h100.json"
BEGIN, END = "<!-- break-even:begin -->", "<!-- break-even:end -->"
MODES = {"eager": "eager", "graph": "CUDA graph", "compiled graph": "compiled, CUDA graph"}


def block(document: dict[str, Any]) -> str:
    """Return what was predicted, and a table with a row for each model."""
    models = document["models"]
    note = (
        f"**Predictions, not measurements,** for {document['gpu']}, `{document['model']}` in bf16 "
        f"and `keep={document['keep']}`: from which batch on a reduced model is faster than dense. "
        f"The host needs {document['host_ms']} ms for a dense forward pass, which is assumed. A "
        f"dash: no batch up to {document['largest']}. Made at commit "
        f"{document['commit']['id'][:7]} on {document['date']}."
    )
    rows = [
        [
            name if name == "dense" else f"`{name}`",
            str(each["launches"]),
            *("" if name == "dense" else batch_or_none(each, mode) for mode in MODES),
        ]
        for name, each in models.items()
    ]
    return f"{note}\n\n{table(['model', 'kernel launches', *MODES.values()], rows, left=1)}"


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 1 if the page has no markers, or is stale under --check."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--page", type=Path, default=DOCS / "faster.md")
    options = parser.parse_args(arguments)
    text, command = block(read_object(RESULTS)), "python docs/break_even.py"
    return rewrite(options.page, BEGIN, END, text, command=command, check=options.check)


if __name__ == "__main__":
    raise SystemExit(main())
