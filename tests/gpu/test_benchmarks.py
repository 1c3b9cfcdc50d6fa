"""The timing functions of the benchmarks, on the device."""

import pytest
import torch

from benchmarks import cases, comparison, sweeps, tune
from elip_models.profiling import measure
from tests.gpu.ops import ON_GPU, WIDTH, pick

pytestmark = pytest.mark.gpu
SHAPE = pick(tune.Shape(96, 257, torch.bfloat16), tune.Shape(1, 18, torch.float32))
SMALL = (tune.Sweep("reduce", "reduce_forward", {"num_warps": (8,)}),)


@pytest.fixture(autouse=True)
def _take_the_way_of_a_gpu(monkeypatch):
    for module in (cases, tune):
        monkeypatch.setattr(module, "ON_GPU", True)
    monkeypatch.setattr(sweeps, "WIDTH", WIDTH)


@pytest.mark.parametrize("sweep", pick(tune.SWEEPS, SMALL), ids=lambda s: f"{s.op}-{s.table}")
def test_a_candidate_of_every_sweep_is_right_and_timed(sweep):
    first = tune.Sweep(sweep.op, sweep.table, {axis: n[:1] for axis, n in sweep.axes.items()})
    result = tune.run(first, SHAPE, rounds=1)
    entries = result["candidates"]
    assert all("left_out" in e or e.get("of_table", 0) > 0 for e in entries), entries
    assert entries or ON_GPU  # some tables are for other batch sizes
    assert result["kernels"] == ["_reduce_fwd_kernel"] or sweep not in SMALL


def test_a_graph_is_timed_by_events(device):
    x = torch.zeros(8, device=device)
    with torch.no_grad():
        step = comparison.capture_graph(lambda: lambda: x.add_(1.0))
        before = x.clone()
        times = measure.time_side_by_side({"step": step}, device=torch.device("cuda"), rounds=2)
    assert len(times["step"]) == 2 and min(times["step"]) > 0
    assert (x > before).all()


def test_the_peak_of_a_step_is_measured(device):
    size = 2**20
    peak = measure.peak_bytes(lambda: torch.ones(size, device=device), torch.device("cuda"))
    assert peak >= pick(4 * size, 0)


def test_a_graph_of_a_reduced_model_takes_new_images(device):
    gpu, timm = (pytest.importorskip(n, exc_type=ImportError) for n in ("benchmarks.gpu", "timm"))
    size = pick(160, 32)
    dense = timm.create_model("test_vit", img_size=size, num_classes=0).eval().to(device)
    images = torch.randn(2, 3, size, size, device=device)
    with torch.no_grad():
        reduced = gpu.read_settings("merge 0.7", dense)[1].model
        call = gpu.graph(reduced, images)
        images.normal_()
        assert torch.equal(call(), reduced(images))
