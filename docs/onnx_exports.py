"""Write the tables of serve.md from the committed results: which exports are exact, and times.

python docs/onnx_exports.py             # rewrite the blocks between their markers
python docs/onnx_exports.py --check     # exit status 1 if a block is stale

`python -m benchmarks.onnx_exports` and `pytest benchmarks/bench_onnx.py` measure them.
"""

from pathlib import Path
from typing import Any

from benchmarks.marked_block import Block, run
from benchmarks.onnx_exports import COMMITTED
from benchmarks.tables import milliseconds, ratio, table
from elip_models.saving.files import read_object

PAGE = Path(__file__).resolve().with_name("serve.md")
TIMES = COMMITTED.parent / "intel-xeon-2-cores" / "bench.json"
TOWER = "vit_small_patch16_224"

Document = dict[str, Any]


def exports(document: Document) -> str:
    """Return the table of exports, the reasons of errors, and what other runtimes do."""
    strategies = document["strategies"]
    columns = [(shape, route) for shape, routes in strategies["tome"].items() for route in routes]
    rows, reasons = [], {}
    for strategy, shapes in strategies.items():
        rows.append([f"`{strategy}`"])
        for shape, route in columns:
            entry = shapes[shape][route]
            rows[-1].append(cell(entry))
            for outcome in ("refused", "failed"):
                if outcome in entry:
                    reason = entry[outcome].replace(repr(strategy), "this strategy")
                    reasons.setdefault(f"{outcome}: {reason}", []).append(strategy)
    versions = document["versions"]
    note = (
        f"Small ViT, fp32, torch {versions['torch']}, onnxruntime {versions['onnxruntime']}. A "
        "number is the largest difference from PyTorch, relative to the largest output, at batch "
        "sizes and image sizes other than those of the example. `program`: an exported program "
        f"becomes the file. At most {document['bound']:.0e} counts as exact."
    )
    header = ["strategy", *(f"{shape}, {route}" for shape, route in columns)]
    parts = [note, table(header, rows, left=1)]
    if reasons:
        parts.append("\n".join(f"- {_names(reasons[text])}: {text}" for text in reasons))
    return "\n\n".join([*parts, openvino(document), tensorrt(document)])


def cell(entry: Document) -> str:
    """Return what came of an export, for the table."""
    if "error" in entry:
        return f"exact, {entry['error']:.0e}"
    if "draws" in entry:
        return "draws anew in every run"
    return "refused" if "refused" in entry else "fails"


def openvino(document: Document) -> str:
    """Return the sentences on OpenVINO."""
    errors = {
        strategy: shapes["any batch size"]["model"]["openvino"]
        for strategy, shapes in document["strategies"].items()
        if "openvino" in shapes["any batch size"]["model"]
    }
    exact = {name: error for name, error in errors.items() if error <= document["bound"]}
    wrong = [name for name in errors if name not in exact]
    return (
        f"**OpenVINO {document['versions']['openvino'].partition('-')[0]}** ran the files for any "
        f"batch size, in fp32 at batch 1 and 3. The largest difference is {max(exact.values()):.0e}"
        f" for {_names(exact)}. It ignores the option `antialias` of the operator `Resize`, so the "
        f"files of {_names(wrong)} give wrong results in it. Files for any image size resize their "
        "position embeddings with this option, and were not run."
    )


def tensorrt(document: Document) -> str:
    """Return the sentences on TensorRT."""
    lacking = {name: ops for name, ops in document["not_in_tensorrt"].items() if ops}
    supported = [name for name in document["strategies"] if name not in lacking]
    text = (
        "**TensorRT: operators, not run.** The [list of onnx-tensorrt](https://github.com/onnx/"
        "onnx-tensorrt/blob/main/docs/operators.md) for TensorRT 10.1 has every operator in the "
        f"files for any batch size of {_names(supported)}."
    )
    reasons: dict[str, list[str]] = {}
    for name, ops in lacking.items():
        reasons.setdefault(", ".join(ops), []).append(name)
    lines = (f"It lacks {ops}, in the files of {_names(names)}." for ops, names in reasons.items())
    return " ".join([text, *lines])


def times(document: Document) -> str:
    """Return the times and nodes of a small tower's files, and which operators take the time."""
    entries = [
        entry["extra_info"]
        for entry in document["benchmarks"]
        if "onnxruntime" in entry["extra_info"]
    ]
    entries = [e for e in entries if e["op"] == TOWER and e["shape"]["B"] == 1]
    names = [name for name in entries[0]["milliseconds"] if " 0." in name and "int8" not in name]
    rows = [
        [
            f"`{name}`",
            str(entries[0].get("nodes", {}).get(name, "–")),
            *(ratio(entry["ratios"].get(name)) for entry in entries),
        ]
        for name in names
    ]
    threads = [entry["runtime_threads"] for entry in entries]
    dense = [f"{milliseconds(entry['milliseconds']['dense'])} ms" for entry in entries]
    note = (
        f"ViT-S, batch 1, onnxruntime {entries[0]['onnxruntime']}, {entries[0]['device']}: time "
        f"relative to dense, which takes {' and '.join(dense)}. `nodes` are those of the file."
    )
    header = ["strategy, `keep`", "nodes", *(f"threads: {count}" for count in threads)]
    parts = [note, table(header, rows, left=1)]
    if "operators" in entries[-1]:
        parts += operators(entries[-1])
    return "\n\n".join(parts)


def operators(entry: Document) -> list[str]:
    """Return which operators take the time of the files, in percent."""
    shares = entry["operators"]
    names = list(dict.fromkeys(name for ops in shares.values() for name in list(ops)[:8]))
    rows = [
        [f"`{name}`", *(f"{ops.get(name, 0.0):.1%}" for ops in shares.values())] for name in names
    ]
    note = f"Share of the time by operator, {entry['runtime_threads']} threads:"
    return [note, table(["operator", *(f"`{label}`" for label in shares)], rows, left=1)]


def _names(names: Any) -> str:
    """Return names as code, joined by commas, each once."""
    return ", ".join(f"`{name}`" for name in dict.fromkeys(names))


def blocks() -> list[Block]:
    """Return the blocks of serve.md."""
    return [
        Block(PAGE, "onnx_exports", exports(read_object(COMMITTED))),
        Block(PAGE, "onnx_times", times(read_object(TIMES))),
    ]


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 1 if the page has no markers, or is stale under --check."""
    return run(blocks, "python docs/onnx_exports.py", __doc__, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
