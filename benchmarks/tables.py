"""Markdown tables of one device: towers, strategies and models, and a separate page of ops.

A time of more than 0.97 of the reference is marked "no gain".
"""

from collections.abc import Sequence
from typing import Any

from benchmarks.measured import Results
from benchmarks.parity import OURS
from elip_models.profiling.measure import no_gain
from elip_models.strategies import STRATEGIES

OTHERS = ("official", "eager", "compiled")

Entry = dict[str, Any]


def device_tables(results: Results) -> str:
    """Return the tables of a run on a device: versions, tables, and a link to its page of ops."""
    machine = results.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    about = (
        f"Measured on {results.date} at commit {results.commit}; CPU threads: "
        f"{machine['threads']}; {versions}."
    )
    towers = [entry for entry in results.entries if "flops" in entry]
    compared = [entry for entry in results.entries if "strategies" in entry]
    steps = [entry for entry in results.entries if "step_flops" in entry]
    ops = [entry for entry in results.entries if "possible" in entry]
    parts = [about]
    if towers:
        if has_chart("towers", results.entries):
            parts.append(chart(results, "towers", "times relative to dense"))
        parts += tower_table(towers)
    if compared:
        parts += strategy_table(compared)
    if any("language_model" in entry for entry in results.entries):
        parts.append("[Language models](vlm.md#how-much-time-it-saves) have a table of their own.")
    caches = [entry for entry in results.entries if "static" in entry.get("ratios", ())]
    if caches:
        parts += cache_table(caches)
    exported = [entry for entry in results.entries if "onnxruntime" in entry]
    if exported:
        parts += onnx_table(exported)
    if steps:
        parts += pretraining_table(steps)
    if ops:
        if has_chart("ops", results.entries):
            parts.append(chart(results, "ops", "times over that of a copy"))
        parts.append(f"[Every op, side by side]({results.slug}-ops.md).")
    return "\n\n".join(parts)


def has_chart(kind: str, entries: Sequence[Entry]) -> bool:
    """Return whether there is a chart: of three towers or more, or of ops that ran kernels."""
    if kind == "towers":
        return len({tower(entry) for entry in entries if "flops" in entry}) > 2
    return any(entry["kernels"] for entry in entries if "possible" in entry)


def chart(results: Results, kind: str, title: str) -> str:
    """Return the link to a chart of `plot.draw`."""
    return f"![{kind} on {results.machine['device']}: {title}]({results.slug}-{kind}.svg)"


def tower_table(entries: list[Entry]) -> list[str]:
    """Return time and (in brackets) FLOPs of each scorer relative to dense."""
    scorers = list(entries[0]["ratios"])
    rows = []
    for entry in entries:
        flops, memory = entry["flops"], entry["memory"]
        cells = [
            f"{ratio(entry['ratios'][name])} ({flops[name] / flops['dense']:.2f})"
            for name in scorers
        ]
        bytes_left = f"{memory['last'] / memory['dense']:.2f}" if memory["dense"] else "–"
        dense = milliseconds(entry["milliseconds"]["dense"])
        rows.append([tower(entry), entry["direction"], dense, *cells, bytes_left])
    header = ["tower, batch, dtype", "mode", "dense, ms", *scorers, "memory, `last`"]
    note = (
        "Time of each scorer relative to the dense tower, with relative FLOPs in brackets, scorer "
        "included. Memory is relative to dense: peak memory on a GPU, bytes saved for backward on "
        "a CPU."
    )
    return [note, table(header, rows, left=2)]


def strategy_table(entries: list[Entry]) -> list[str]:
    """Return time and (in brackets) counted FLOPs of each strategy relative to dense."""
    names, rows = [name for name in entries[0]["ratios"] if name in STRATEGIES], []
    for entry in entries:
        flops = entry["strategy_flops"]
        cells = [f"{ratio(entry['ratios'][name])} ({flops[name]:.2f})" for name in names]
        dense = milliseconds(entry["milliseconds"]["dense"])
        rows.append([tower(entry), entry["direction"], dense, *cells])
    settings = ", ".join(f"`{entries[0]['strategies'][name]}`" for name in names)
    note = (
        "Time of each strategy relative to the dense tower, with relative FLOPs in brackets. All "
        f"are set to {entries[0]['share']:.3f} of a dense training step; `resize` takes the nearest"
        " size. `patch_dropout` uses all patches in inference. Settings: "
        f"{settings}."
    )
    header = ["tower, batch, dtype", "mode", "dense, ms", *names]
    return [note, table(header, rows, left=2)]


def language_model_table(entries: list[Entry]) -> list[str]:
    """Return time and (in brackets) cached bytes of a LLaVA that reads fewer image tokens."""
    keeps, rows = list(entries[0]["ratios"]), []
    for entry in entries:
        cached = entry["cache_bytes"]
        cells = [
            f"{ratio(entry['ratios'][keep])} ({cached[keep] / cached['dense']:.2f})"
            for keep in keeps
        ]
        dense = milliseconds(entry["milliseconds"]["dense"])
        rows.append([f"`{entry['language_model']}`", entry["direction"], dense, *cells])
    tokens = entries[0]["tokens"]
    note = (
        f"A LLaVA with random weights, {tokens['image']} image tokens and {tokens['text']} of "
        "text: time relative to the dense model, with relative bytes of the key-value cache in "
        "brackets, by `keep`. Prefill includes the image tower; decoding adds "
        f"{tokens['decoded']} tokens."
    )
    return [note, table(["strategy", "phase", "dense, ms", *keeps], rows, left=2)]


def cache_table(entries: list[Entry]) -> list[str]:
    """Return the times of a token with a static cache relative to a dynamic one."""
    names = list(entries[0]["ratios"])[1:]
    rows = [
        [
            f"`{entry['strategy']}`",
            milliseconds(entry["milliseconds"]["dynamic"]),
            *(ratio(entry["ratios"].get(name)) for name in names),
        ]
        for entry in entries
    ]
    note = (
        "Decoding of the same model at `keep=0.25` with a static cache, as is and compiled: time "
        f"of {entries[0]['tokens']['decoded']} tokens relative to the dynamic cache."
    )
    return [note, table(["strategy", "dynamic, ms", *names], rows, left=1)]


def onnx_table(entries: list[Entry]) -> list[str]:
    """Return the times of exported towers relative to the dense tower in onnxruntime."""
    names = list(dict.fromkeys(name for entry in entries for name in entry["ratios"]))
    rows = [
        [
            tower(entry),
            str(entry["runtime_threads"]),
            milliseconds(entry["milliseconds"]["dense"]),
            *(ratio(entry["ratios"].get(name)) for name in names),
        ]
        for entry in entries
    ]
    note = (
        f"Inference in onnxruntime {entries[0]['onnxruntime']} after `torch.onnx.export`: time "
        "relative to the dense tower in onnxruntime, by strategy and `keep`. `PyTorch` is the "
        "dense tower in PyTorch."
    )
    return [note, table(["tower, batch, dtype", "threads", "dense, ms", *names], rows, left=1)]


def pretraining_table(entries: list[Entry]) -> list[str]:
    """Return time and (in brackets) FLOPs and memory of each scorer relative to dense."""
    names = list(dict.fromkeys(name for entry in entries for name in entry["ratios"]))
    rows = []
    for entry in entries:
        flops, memory = entry["step_flops"], entry["memory"]
        cells = [
            f"{ratio(entry['ratios'][name])} ({flops[name]:.2f}, "
            f"{memory[name] / memory['dense']:.2f})"
            if name in flops
            else ratio(None)
            for name in names
        ]
        size = f"{tower(entry)}, width {entry['width']}"
        rows.append([size, milliseconds(entry["milliseconds"]["dense"]), *cells])
    note = (
        "Pre-training step: forward and backward of all objectives, with momentum towers and "
        "without the optimiser. Time of each scorer relative to the dense model, with relative "
        "FLOPs and memory in brackets. `shared`: the momentum tower reuses the tokens that the "
        "trained tower kept."
    )
    return [note, table(["model, batch, dtype", "dense, ms", *names], rows, left=1)]


def op_page(results: Results) -> str | None:
    """Return the page of ops, or None if no op was measured."""
    ops = [entry for entry in results.entries if "possible" in entry]
    if not ops:
        return None
    title = f"# Every op, side by side: {results.machine['device']}"
    return "\n\n".join([title, *op_table(ops)]) + "\n"


def op_table(entries: list[Entry]) -> list[str]:
    """Return our time relative to the other implementations, and the speed relative to a copy."""
    rows, some = [], any(entry["kernels"] for entry in entries)
    measured = {name for entry in entries for name in entry["ratios"]}
    others = [*OTHERS, *sorted(measured - {OURS, *OTHERS})]
    for entry in entries:
        ratios = [ratio(entry["ratios"].get(name)) for name in others]
        possible = f"{100 * entry['possible'][OURS]:.0f}%"
        ours = milliseconds(entry["milliseconds"][OURS])
        ran = " (PyTorch implementation)" if some and not entry["kernels"] else ""
        name = f"`{entry['op']}` {entry['direction']}{ran}"
        rows.append([name, sizes(entry), ours, *ratios, possible])
    header = ["op", "shape", "ours, ms", *(f"vs {name}" for name in others), "speed vs copy"]
    note = (
        "Our time divided by that of the official algorithm, of an eager implementation, and of "
        "the same under `torch.compile`. Speed vs copy: the time of copying the bytes that the op "
        "must move (between allocated buffers), divided by our time."
    )
    if not some:
        note += " Ours is the PyTorch implementation of each op; no kernel runs on this device."
    reasons = {reason for entry in entries for reason in entry["left_out"].items()}
    absent = [f"– means that {name} was not measured: {why}." for name, why in sorted(reasons)]
    return [note, table(header, rows, left=2), *absent]


def tower(entry: Entry) -> str:
    """Return a title such as 'vit_base_patch16 256 px, 4, fp32'."""
    name = entry["op"].removesuffix("_224")
    return f"{name} {entry['shape']['image']} px, {entry['shape']['B']}, {entry['dtype']}"


def sizes(entry: Entry) -> str:
    """Return sizes such as 'B64 N257 D768 K166 fp32'."""
    return " ".join([*(f"{name}{size}" for name, size in entry["shape"].items()), entry["dtype"]])


def milliseconds(value: float) -> str:
    """Return milliseconds with three digits and without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def ratio(value: float | None) -> str:
    """Return a time ratio with two digits, marked if it is no gain."""
    if value is None:
        return "–"
    return f"{value:.2f}" + (" no gain" if no_gain(value) else "")


def table(header: Sequence[str], rows: list[list[str]], *, left: int) -> str:
    """Return a Markdown table whose first `left` columns are left-aligned."""
    rule = ["---"] * left + ["--:"] * (len(header) - left)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, rule, *rows])
