"""Export every strategy to ONNX in every way, and compare onnxruntime to PyTorch.

python -m benchmarks.onnx_exports --openvino --tensorrt operators.md

The results are `results/onnx_exports.json`, of which docs/onnx_exports.py writes the tables.

One row per strategy; for each kind of shape (`SHAPES`) and each route (`ROUTES`) an entry with one
of `error`, `draws`, `refused` and `failed`. An error is the largest difference of the outputs,
relative to the largest output, over the sizes in `SHAPES`, none of which was exported.

--openvino runs the graphs for any batch size in OpenVINO too. --tensorrt compares their operators
to the list of onnx-tensorrt (docs/operators.md there); nothing is run.
"""

import argparse
import itertools
import json
import logging
import multiprocessing
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import onnxruntime
import timm
import torch
from torch import Tensor, nn

from benchmarks.machine import provenance
from elip_models import STRATEGIES, reduce_
from elip_models.saving.files import write_file

COMMITTED = Path(__file__).parent / "results" / "onnx_exports.json"
SIDE, PATCH = 96, 16
BOUND = 1e-5
LEAST, MOST = 4, 40  # rows of patches
BATCH = torch.export.Dim("batch")
ROWS = PATCH * torch.export.Dim("rows", min=LEAST, max=MOST)


class Shape(NamedTuple):
    """The sizes that a graph takes.

    dynamic: the dynamic dimensions of the images. tried: batch and height of the images it reads.
    """

    dynamic: dict[int, Any] | None
    tried: tuple[tuple[int, int], ...]


SHAPES = {
    "one batch size": Shape(None, ((2, SIDE),)),
    "any batch size": Shape({0: BATCH}, ((1, SIDE), (3, SIDE))),
    "any image size": Shape({2: ROWS}, tuple((2, PATCH * rows) for rows in range(LEAST, MOST + 1))),
}
ROUTES = ("model", "program")
"""Export of the model, and of its `torch.export` program."""
FOR_OTHER_RUNTIMES = "any batch size", "model"


def small_model(strategy: str, depth: int = 4) -> nn.Module:
    """Return a reduced ViT with random weights whose blocks attend unevenly."""
    torch.manual_seed(0)
    options = {"depth": depth, "embed_dim": 48, "num_heads": 2, "num_classes": 5, "img_size": SIDE}
    model = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **options).eval()
    for weight in model.parameters():
        if weight.dim() == 2:
            nn.init.normal_(weight, std=0.2)
    return reduce_(model, strategy, keep=0.7)


def exported(model: nn.Module, shape: str, route: str) -> onnx.ModelProto:
    """Return the ONNX program of a model."""
    images = torch.randn(2, 3, SIDE, SIDE)
    dynamic = SHAPES[shape].dynamic
    sizes = None if dynamic is None else (dynamic,)
    if route == "program":
        program = torch.export.export(model, (images,), dynamic_shapes=sizes)
        return torch.onnx.export(program, (), dynamo=True, verbose=False).model_proto
    return torch.onnx.export(
        model, (images,), dynamo=True, dynamic_shapes=sizes, verbose=False
    ).model_proto


def in_onnxruntime(program: onnx.ModelProto) -> Callable[[Tensor], Tensor]:
    """Return a call of an ONNX program."""
    session = onnxruntime.InferenceSession(
        program.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def in_openvino(program: onnx.ModelProto) -> Callable[[Tensor], Tensor]:
    """Return a call of an ONNX program in fp32."""
    import openvino

    core = openvino.Core()
    network = core.read_model(program.SerializeToString(), b"")
    model = core.compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: torch.from_numpy(model([images.numpy()])[0])


def error_of(call: Callable[[Tensor], Tensor], model: nn.Module, shape: str) -> float:
    """Return the largest difference to PyTorch, relative to the largest output."""
    errors = []
    for batch, height in SHAPES[shape].tried:
        images = torch.randn(batch, 3, height, SIDE)
        expected = model(images)
        errors.append(float((call(images) - expected).abs().max() / expected.abs().max()))
    return max(errors)


def reason_of(error: BaseException) -> dict[str, str]:
    """Return why an export failed: what this library refused, or the error of `torch.onnx`."""
    chain = list(_chain(error))
    for cause in chain:
        frames = traceback.extract_tb(cause.__traceback__)
        if isinstance(cause, ValueError) and frames and "elip_" in frames[-1].filename:
            return {"refused": str(cause)}
    lines = str(chain[-1]).strip().splitlines() or [""]
    return {"failed": f"{type(chain[-1]).__name__}: {lines[0]}"}


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its causes, the first cause last."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@torch.no_grad()
def measured(
    strategy: str, shape: str, route: str, *, depth: int = 4, openvino: bool = False
) -> dict[str, Any]:
    """Return the entry of an export."""
    model = small_model(strategy, depth)
    try:
        program = exported(model, shape, route)
    except Exception as error:
        return reason_of(error)
    call = in_onnxruntime(program)
    entry: dict[str, Any] = {"nodes": len(program.graph.node)}
    is_for_others = (shape, route) == FOR_OTHER_RUNTIMES
    if is_for_others:
        entry["operators"] = sorted(operators_of(program))
    if any(node.op_type.startswith("Random") for node in program.graph.node):
        images = torch.randn(2, 3, SIDE, SIDE)
        return entry | {"draws": not torch.equal(call(images), call(images))}
    entry["error"] = error_of(call, model, shape)
    if openvino and is_for_others:
        entry["openvino"] = error_of(in_openvino(program), model, shape)
    return entry


def operators_of(program: onnx.ModelProto) -> set[str]:
    """Return the operators of a graph, and the options that onnx-tensorrt does not read."""
    names = set()
    for node in program.graph.node:
        options = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
        names.add(node.op_type)
        if node.op_type == "Resize" and (options.get("antialias") or options["mode"] == b"cubic"):
            names.add("Resize (bicubic, antialias)")
        if node.op_type == "TopK" and not options.get("sorted", 1):
            names.add("TopK (unsorted)")
        if node.op_type == "ScatterND" and options.get("reduction", b"none") != b"none":
            names.add("ScatterND (reduction)")
    return names


def supported_operators(page: str) -> set[str]:
    """Return the operators with a Y in docs/operators.md of onnx-tensorrt."""
    return set(re.findall(r"^\| (\w+) +\| Y ", page, re.MULTILINE))


def _silence() -> None:
    """Hide the warnings of the exporter in a worker, which computes in one thread."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 1 if a graph in onnxruntime computes something else than PyTorch."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=COMMITTED, help="JSON file to write.")
    parser.add_argument("--openvino", action="store_true", help="Run OpenVINO too.")
    parser.add_argument("--tensorrt", type=Path, help="docs/operators.md of onnx-tensorrt.")
    parser.add_argument("--jobs", type=int, default=1, help="Exports at a time.")
    options = parser.parse_args(arguments)
    rows: dict[str, Any] = {}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=spawn, initializer=_silence) as pool:
        futures = {
            case: pool.submit(measured, *case, openvino=options.openvino)
            for case in itertools.product(STRATEGIES, SHAPES, ROUTES)
        }
        for (strategy, shape, route), future in futures.items():
            entry = future.result()
            rows.setdefault(strategy, {}).setdefault(shape, {})[route] = entry
            sys.stderr.write(f"{strategy}, {shape}, {route}: {entry}\n")
    packages = ["onnx", "onnxscript", "onnxruntime", *(["openvino"] if options.openvino else [])]
    document = provenance(packages) | {"bound": BOUND, "strategies": rows}
    if options.tensorrt is not None:
        shape, route = FOR_OTHER_RUNTIMES
        supported = supported_operators(options.tensorrt.read_text())
        document["not_in_tensorrt"] = {
            strategy: [name for name in row[shape][route]["operators"] if name not in supported]
            for strategy, row in rows.items()
        }
    write_file(options.output, (json.dumps(document, indent=1) + "\n").encode())
    entries = [entry for row in rows.values() for pair in row.values() for entry in pair.values()]
    return int(not all(entry.get("error", 0.0) <= BOUND for entry in entries))


if __name__ == "__main__":
    raise SystemExit(main())
