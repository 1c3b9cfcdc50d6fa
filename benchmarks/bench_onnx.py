"""Time of exported towers in onnxruntime: strategies at equal training FLOPs against dense.

Batch 1 and 16, with as many threads as PyTorch; the dense tower in PyTorch is timed too.

Parity: the output of each graph against PyTorch's, with the same random numbers.
"""

import io
from unittest import mock

import pytest
import timm
import torch

from benchmarks.cases import DTYPE_NAMES, ON_GPU
from benchmarks.parity import relative_error
from elip_models import ELIP, EViT, RandomPruning, ToMe, reduce_
from elip_models.profiling.measure import milliseconds, ratios_to, time_side_by_side
from elip_models.profiling.runner import DENSE
from elip_models.reduction.flops import training_ratio
from elip_models.reduction.schedule import PRESETS
from elip_models.reduction.strategies import Dense
from elip_models.towers import as_tower

onnx = pytest.importorskip("onnx", reason="the extra 'onnx' is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra 'onnx' is not installed")

BOUND = 1e-5
CPU = torch.device("cpu")
TOWERS = (("vit_small_patch16_224", 224), ("vit_tiny_patch16_224", 96))


def batches(scale):
    """Return the batch sizes of a scale."""
    return [1, 16] if scale == "full" else [1]


def strategies_at_equal_flops(tower):
    last = ELIP(PRESETS["clip"], scorer="last", without_text="vision")
    share = training_ratio(last, tower.size)
    others = {"evit": EViT(0.7), "tome": ToMe(8), "random": RandomPruning(PRESETS["clip"])}
    found = {name: each.at_flops(tower, share) for name, each in others.items()}
    return {DENSE: Dense(), "last": last, **found}, share


def exported_at(scale, strategies):
    """Return the strategies of a scale: an export takes ten seconds."""
    few = {"smallest": (DENSE, "last"), "default": (DENSE, "last", "tome")}
    names = few.get(scale, strategies)
    return {name: strategies[name] for name in names}


def exported(model, image):
    """Return a call of the exported model that returns its output and its random numbers."""
    file = io.BytesIO()
    torch.onnx.export(model, (image,), file, dynamo=True, verbose=False)
    program = onnx.load_from_string(file.getvalue())
    draws = [n.output[0] for n in program.graph.node if n.op_type.startswith("RandomUniform")]
    program.graph.output.extend(onnx.ValueInfoProto(name=name) for name in draws)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        program.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = {session.get_inputs()[0].name: image.numpy()}
    return lambda: [torch.from_numpy(each) for each in session.run(None, feed)]


def error_of(call, model, image):
    """Return the error of a graph against the model with the same random numbers."""
    output, *draws = call()
    with mock.patch.object(torch, "rand", lambda *size, device: draws.pop(0).view(size)):
        return relative_error(output, model(image).double())


@pytest.mark.skipif(ON_GPU, reason="onnxruntime is timed on a CPU, beside PyTorch there")
@pytest.mark.cases(case=batches)
@torch.no_grad()
def test_onnxruntime(record, rounds, scale, case):
    name, size = TOWERS[scale == "smallest"]
    model = timm.create_model(name, img_size=size, num_classes=0).eval()
    strategies, share = strategies_at_equal_flops(as_tower(model))
    strategies = exported_at(scale, strategies)
    image = torch.randn(case, 3, size, size)
    steps, errors = {}, {}
    for label, strategy in strategies.items():
        steps[label] = exported(reduce_(model, strategy=strategy), image)
        errors[label] = error_of(steps[label], model, image)
    worst = max(errors.values())
    assert worst <= BOUND, f"parity: expected errors of at most {BOUND}, got {errors}"
    reduce_(model, strategy=strategies[DENSE])
    times = time_side_by_side(steps | {"PyTorch": lambda: model(image)}, device=CPU, rounds=rounds)
    ratios = ratios_to(DENSE, times)
    record(
        steps["last"],
        op=name,
        direction="inference",
        rounds=rounds,
        ratios={label: each for label, each in ratios.items() if label != DENSE},
        milliseconds=milliseconds(times),
        onnxruntime=onnxruntime.__version__,
        share=share,
        shape={"B": case, "image": size},
        dtype=DTYPE_NAMES[torch.float32],
        parity={"max_abs": worst, "bound": BOUND, "passed": True, "errors": errors},
    )
