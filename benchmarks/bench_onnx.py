"""Time in onnxruntime of exported towers: dense, reduced and at a smaller image, fp32 and int8.

A graph has a fixed batch, and runs in 1 and 2 threads. OpenVINO runs the same graphs if openvino is
installed. `PyTorch` is the dense tower in PyTorch.

`nodes` are those of each file. `operators` is the share of the time of each operator, by the
profiler of onnxruntime, which fuses some nodes when it opens a file.

Parity: the fp32 output of each graph and runtime against that of PyTorch in fp64. int8 rounds other
weights in each graph, so its output is not compared.
"""

import json
from collections import Counter, defaultdict
from copy import deepcopy
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import pytest
import timm
import torch

from benchmarks.cases import DTYPE_NAMES, ON_GPU
from benchmarks.parity import relative_error
from elip_models import reduce_
from elip_models.profiling.measure import milliseconds, ratios_to, time_side_by_side
from elip_models.profiling.runner import DENSE

onnx = pytest.importorskip("onnx", reason="the extra 'onnx' is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra 'onnx' is not installed")
BOUND = 1e-5
CPU = torch.device("cpu")
STRATEGIES = {
    f"{strategy} {keep}": (strategy, keep)
    for strategy, keep in (
        ("merge", 0.7),
        ("tome", 0.7),
        ("evit", 0.7),
        ("elip", 0.7),
        ("resize_merge", 0.5),
        ("resize", 0.7),
    )
}
PROFILED = (DENSE, "merge 0.7", "tome 0.7")
PROFILED_RUNS = 20
QUANTISED = (DENSE, "tome 0.7")
TINY, SMALL = ("vit_tiny_patch16_224", 96), ("vit_small_patch16_224", 224)
LARGER = ("vit_base_patch16_224", 224), ("vit_small_patch14_dinov2", 224)


def cases(scale):
    """Return tower, image side, batch size and threads of each case, as 'NAME-224-B1-T2'."""
    towers = {"smallest": [TINY], "default": [SMALL], "full": [SMALL, *LARGER]}[scale]
    batches = (1, 8) if scale == "full" else (1,)
    threads = (1,) if scale == "smallest" else (1, 2)
    return [f"{name}-{size}-B{B}-T{T}" for name, size in towers for B in batches for T in threads]


@cache
@torch.no_grad()
def exported(name, size, batch, depth, labels):
    """Return models and their ONNX programs by label."""
    dense = timm.create_model(name, img_size=size, depth=depth, num_classes=0).eval()
    models = {DENSE: dense}
    for label in labels:
        strategy, keep = STRATEGIES[label]
        models[label] = reduce_(deepcopy(dense), strategy, keep=keep)
    image = torch.randn(batch, 3, size, size)
    return models, {
        label: torch.onnx.export(model, (image,), dynamo=True, verbose=False).model_proto
        for label, model in models.items()
    }


def session_of(program, threads, **settings):
    """Return an onnxruntime session of an ONNX program; `settings` are those of its options."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    # a worker that spins after its run would take time from the next session
    options.add_session_config_entry("session.force_spinning_stop", "1")
    for name, value in settings.items():
        setattr(options, name, value)
    return onnxruntime.InferenceSession(
        program.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def in_onnxruntime(program, image, threads):
    """Return a call of an ONNX program for these images."""
    session = session_of(program, threads)
    feed = {session.get_inputs()[0].name: image.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def operator_shares(program, image, threads, folder):
    """Return the share of the time of each operator, from 0.5%, by onnxruntime's profiler."""
    prefix = str(folder / "profile")
    session = session_of(program, threads, enable_profiling=True, profile_file_prefix=prefix)
    feed = {session.get_inputs()[0].name: image.numpy()}
    for _ in range(PROFILED_RUNS):
        session.run(None, feed)
    runs = defaultdict(list)  # by operator and node
    for event in json.loads(Path(session.end_profiling()).read_text()):
        if event["name"].endswith("_kernel_time"):
            runs[event["args"]["op_name"], event["name"]].append(event["dur"])
    microseconds = Counter()
    for (op, _), durations in runs.items():
        microseconds[op] += median(durations)
    total = microseconds.total()
    return {op: us / total for op, us in microseconds.most_common() if us >= 0.005 * total}


def in_openvino(program, image, threads):
    """Return a call of an ONNX program for these images."""
    import openvino

    core = openvino.Core()
    network = core.read_model(program.SerializeToString(), b"")
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    model = core.compile_model(network, "CPU", settings)
    return lambda: torch.from_numpy(model([image.numpy()])[0])


def quantised(program, folder):
    """Return the ONNX program with int8 weights of its linear layers."""
    from onnxruntime import quantization

    source, target = folder / "fp32.onnx", folder / "int8.onnx"
    onnx.save(program, source)
    quantization.quantize_dynamic(source, target, op_types_to_quantize=["MatMul", "Gemm"])
    return onnx.load(target)


@pytest.mark.skipif(ON_GPU, reason="the runtimes are timed on a CPU, beside PyTorch there")
@pytest.mark.cases(case=cases)
@torch.no_grad()
def test_exported(record, rounds, scale, case, tmp_path):
    name, size, batch, threads = case.split("-")
    size, batch, threads = int(size), int(batch[1:]), int(threads[1:])
    depth, labels = (2, ("tome 0.7",)) if scale == "smallest" else (12, tuple(STRATEGIES))
    models, programs = exported(name, size, batch, depth, labels)
    image = torch.randn(batch, 3, size, size)
    steps = {label: in_onnxruntime(program, image, threads) for label, program in programs.items()}
    if find_spec("openvino") is not None:
        for label, program in programs.items():
            if not label.startswith("resize"):  # OpenVINO ignores the antialias of Resize
                steps[f"OpenVINO, {label}"] = in_openvino(program, image, threads)
    exact = {label: deepcopy(model).double()(image.double()) for label, model in models.items()}
    errors = {
        label: relative_error(step(), exact[label.removeprefix("OpenVINO, ")])
        for label, step in steps.items()
    }
    worst = max(errors.values())
    assert worst <= BOUND, f"parity: expected errors of at most {BOUND}, got {errors}"
    for label in QUANTISED:
        program = quantised(programs[label], tmp_path)
        steps[f"int8, {label}"] = in_onnxruntime(program, image, threads)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    steps["PyTorch"] = lambda: models[DENSE](image)
    times = time_side_by_side(steps, device=CPU, rounds=rounds)
    torch.set_num_threads(before)
    ratios = ratios_to(DENSE, times)
    record(
        steps[DENSE],
        op=name,
        direction="inference",
        rounds=rounds,
        ratios={label: ratio for label, ratio in ratios.items() if label != DENSE},
        milliseconds=milliseconds(times),
        nodes={label: len(program.graph.node) for label, program in programs.items()},
        operators={
            label: operator_shares(programs[label], image, threads, tmp_path)
            for label in PROFILED
            if label in programs
        },
        onnxruntime=onnxruntime.__version__,
        runtime_threads=threads,
        shape={"B": batch, "image": size},
        dtype=DTYPE_NAMES[torch.float32],
        parity={"max_abs": worst, "bound": BOUND, "passed": True, "errors": errors},
    )
