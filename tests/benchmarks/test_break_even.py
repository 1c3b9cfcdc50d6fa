"""The predicted batch from which a reduced model is faster than dense."""

import json
from itertools import pairwise

import pytest
import timm
import torch

from elip_kernels._triton import HAS_TRITON
from elip_models import reduce_

if not HAS_TRITON:
    pytest.skip("triton is absent, so there are no kernels", allow_module_level=True)

from benchmarks import break_even
from benchmarks.kernel_analysis.latency import LAUNCH, MACHINES
from tests.project.test_docs import script

H100 = MACHINES[90]
TOME = ["_match_kernel", "_slots_kernel", "_order_kernel", "_merge_fwd_kernel"]


def vit():
    sizes = {"embed_dim": 48, "num_heads": 3, "depth": 2, "img_size": 64}
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes).eval()


def launches_of(model):
    return break_even.launches_of(model, torch.rand(3, 3, 64, 64), H100.arch)


def test_kernels_and_products_of_a_block_are_recorded_with_their_sizes():
    dense, reduced = launches_of(vit()), launches_of(reduce_(vit(), "tome", keep=0.7))
    names = [each.name for each in reduced]
    assert [name for name in names if name.endswith("_kernel")] == 2 * TOME  # in each block
    assert not any(each.name.endswith("_kernel") for each in dense)
    products = [each for each in dense if each.name == "addmm"]
    assert len(products) == 2 * 4  # queries, keys and values; output; both layers of the MLP
    tokens, width = 17, 48
    assert products[0].flops == (0, 2 * tokens * width * 3 * width)
    constant, slope = products[0].bytes
    assert constant == 4 * (3 * width * width + 3 * width)
    assert slope == 4 * tokens * (width + 3 * width)


def test_a_compiler_joins_neighbours_but_no_products_and_no_kernels_of_ours():
    launches = launches_of(reduce_(vit(), "tome", keep=0.7))
    fused = break_even.compiled(launches)
    kept = [each for each in launches if not each.fuses]
    assert [each for each in fused if not each.fuses] == kept
    assert not any(one.fuses and two.fuses for one, two in pairwise(fused))


def test_time_of_a_launch_is_bound_by_its_bytes_its_flops_or_its_waits():
    launch = break_even.Launch("mm", (0, 3.35e6), (0, 0), 0)
    assert launch.seconds(2, H100, 1e15) == pytest.approx(LAUNCH + 2e-6)
    launch = break_even.Launch("mm", (0, 0), (0, 6e8), 0)
    assert launch.seconds(1, H100, 1e15) == pytest.approx(LAUNCH + 1e-6)
    programs = 0, break_even.AT_ONCE * H100.processors
    launch = break_even.Launch("ours", (0, 0), (0, 0), 3, programs)
    assert launch.seconds(2, H100, 1e15) == pytest.approx(LAUNCH + 2 * 3 * H100.latency)


@pytest.mark.parametrize(("saved", "expected"), [(0.3, 4), (0.0, None), (2.0, 1)])
def test_the_first_batch_is_that_from_which_all_larger_ones_are_faster(saved, expected):
    dense = [float(batch) for batch in range(1, 10)]
    assert break_even.first_faster(dense, [(1 - saved) * each + 1 for each in dense]) == expected
    assert break_even.first_faster([3.0, 3.0, 3.0, 3.0], [2.0, 4.0, 2.0, 2.0]) == 3


def test_the_host_hides_what_the_device_saves():
    launches = [break_even.Launch("mm", (0, 3.35e6), (0, 0), 0)]
    assert break_even.total(launches, 1, H100, host=1.0) == 1.0
    assert break_even.total(launches, 1, H100) == pytest.approx(LAUNCH + 1e-6)


def test_the_command_predicts_each_strategy(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(break_even, "STRATEGIES", ("random",))
    monkeypatch.setattr(break_even, "host_ratios", lambda models, image: dict.fromkeys(models, 1.0))
    output = tmp_path / "predicted.json"
    words = ["--model", "vit_tiny_patch16_224", "--keep", "0.5", "--output", str(output)]
    assert break_even.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "predicted" in lines[0]
    assert [line.split()[1] for line in lines[3:]] == ["dense", "random"]
    models = json.loads(output.read_text())["models"]
    assert models["dense"]["faster_from"] == dict.fromkeys(models["dense"]["faster_from"])
    assert models["random"]["faster_from"]["graph"] >= 1


def test_the_page_has_the_committed_predictions():
    assert script("break_even").main(["--check"]) == 0
