"""Predicted times compared with those in the JSON of a GPU run."""

import json

import pytest

from benchmarks import predicted
from benchmarks.kernel_analysis.latency import LAUNCH, MACHINES
from elip_kernels._triton import HAS_TRITON

if not HAS_TRITON:
    pytest.skip("triton is absent, so there is nothing to launch", allow_module_level=True)

SHAPE = {"B": 1, "N": 257, "D": 768, "K": 166}


def entry(direction="forward", milliseconds=0.004, **changes):
    """Return an entry as `bench_reduce.py` stores it on a GPU."""
    times = {"elip_kernels": milliseconds, "copy": 0.002}
    facts = {"op": "reduce", "direction": direction, "kernels": True, "milliseconds": times}
    return facts | {"shape": SHAPE, "dtype": "bf16"} | changes


@pytest.fixture
def printed(tmp_path, capsys):
    """Return printed(entries, device), which returns exit status, output and errors."""

    def run(entries, device="NVIDIA H100 80GB HBM3"):
        path = tmp_path / "bench.json"
        benchmarks = [{"extra_info": each} for each in entries]
        content = {"machine_info": {"device": device}, "benchmarks": benchmarks}
        path.write_text(json.dumps(content))
        return predicted.main([str(path)]), *capsys.readouterr()

    return run


def test_measured_and_predicted_times_share_a_row(printed, monkeypatch):
    monkeypatch.setattr(predicted, "predicted", lambda entry, machine: (1e-6, 2e-6))
    tower = {"op": "vit_base_patch16_224", "milliseconds": {"dense": 3.0}}
    status, out, _ = printed([entry(), tower, entry(kernels=False)])
    device, header, *lines = out.splitlines()
    assert (status, device) == (0, "NVIDIA H100 80GB HBM3")
    assert header.split() == " ".join(predicted.COLUMNS).split()
    assert [line.split() for line in lines] == [
        ["reduce", "forward", "B1", "N257", "D768", "K166", "bf16", "1.0", "2.0", "4.0", "2.00"]
    ]


@pytest.mark.parametrize("device", ["NVIDIA GH200 480GB", "NVIDIA H100 PCIe", "Some CPU, 2 cores"])
def test_an_unknown_machine_is_reported(printed, device):
    status, _, error = printed([entry()], device)
    assert status == 1 and error.startswith(f"{device}: expected one of H100 80GB HBM3, H200")


@pytest.mark.slow
def test_a_training_step_is_the_sum_of_its_launches():
    machine = MACHINES[90]
    forward, backward, both = (
        predicted.predicted(entry(direction), machine)
        for direction in ("forward", "backward", "training")
    )
    assert both == pytest.approx([sum(pair) for pair in zip(forward, backward, strict=True)])
    assert forward[1] == pytest.approx(LAUNCH + 2 * machine.latency)
    assert forward[0] < backward[1]
