"""What benchmarks write, what plot.py makes of it, and what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks.parity import judged, parity
from benchmarks.plot import BEGIN, END, main
from elip_models.profile import count_flops

ROOT = Path(__file__).resolve().parents[1]
HELD = {"max_abs": 1e-7, "bound": 1e-6, "passed": True}


def entries():
    """An op's entry, a tower's and an overhead's."""
    held = {"parity": dict(HELD), "rounds": 10, "dtype": "fp32"}
    op = held | {
        "op": "reduce",
        "direction": "forward",
        "milliseconds": {"official": 4.0, "eager": 2.0, "elip_kernels": 2.0, "copy": 1.0},
        "ratios": {"official": 0.5, "eager": 1.0},
        "possible": {"official": 0.25, "eager": 0.5, "elip_kernels": 0.5, "copy": 1.0},
        "bytes": 1000,
        "left_out": {"compiled": "no compiler"},
        "shape": {"B": 64, "N": 257, "D": 768, "K": 166},
    }
    tower = held | {
        "op": "vit_base_patch16_224",
        "direction": "training",
        "milliseconds": {"dense": 1674.0, "last": 1230.0},
        "ratios": {"last": 0.735},
        "flops": {"dense": 100, "last": 71},
        "memory": {"dense": 100, "last": 69},
        "shape": {"B": 4, "image": 256},
    }
    return [op, tower, held | {"op": "reduce", "overhead_microseconds": 21.4}]


@pytest.fixture
def page(tmp_path):
    """page(entries) -> arguments of plot.py for a README and these results of one device."""

    def write(entries):
        folder = tmp_path / "results" / "some-cpu"
        folder.mkdir(parents=True)
        machine = {"device": "Some CPU, 2 cores", "threads": 2, "versions": {"torch": "2.13.0"}}
        content = {
            "machine_info": machine,
            "commit_info": {"id": "0123456789", "dirty": False},
            "benchmarks": [{"name": entry["op"], "extra_info": entry} for entry in entries],
        }
        (folder / "bench.json").write_text(json.dumps(content))
        readme = tmp_path / "README.md"
        readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
        return ["--results", str(folder.parent), "--readme", str(readme)]

    return write


def test_tables_and_charts_come_from_the_json(page, tmp_path):
    arguments = page(entries())
    assert main([*arguments, "--check"]) == 1
    assert main(arguments) == 0
    assert main([*arguments, "--check"]) == 0
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    for part in (
        "### Some CPU, 2 cores",
        "CPU threads: 2; torch 2.13.0; commit 0123456.",
        "| `reduce` forward | B64 N257 D768 K166 fp32 | 2 | 0.50 | 1.00 no gain | – | 50% |",
        "| vit_base_patch16 256 px, 4, fp32 | training | 1674 | 0.73 (0.71) | 0.69 |",
        "compiled was not measured: no compiler.",
        "reduce 21 µs",
    ):
        assert part in text, part
    for name in ("some-cpu-towers.svg", "some-cpu-ops.svg"):
        assert f"(docs/{name})" in text
        assert "</svg>" in (tmp_path / "docs" / name).read_text()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"parity": HELD | {"passed": False}}, "parity failed"),
        ({"parity": HELD | {"max_abs": 2e-6}}, "parity failed"),
        ({"parity": HELD | {"max_abs": float("nan")}}, "parity failed"),
        ({"parity": None}, "parity was not checked"),
        ({"rounds": 3}, "expected 10 rounds or more, got 3"),
    ],
)
def test_refuses_what_was_not_held_to_parity(page, tmp_path, capsys, change, reason):
    op, *others = entries()
    arguments = page([*others, op | change])
    before = (tmp_path / "README.md").read_text()
    assert main(arguments) == 1
    message = capsys.readouterr().err
    assert reason in message and "bench.json: reduce" in message
    assert (tmp_path / "README.md").read_text() == before
    assert not (tmp_path / "docs").exists()


def test_readme_without_markers_is_refused(page, tmp_path, capsys):
    arguments = page(entries())
    (tmp_path / "README.md").write_text("nothing")
    assert main(arguments) == 1
    assert BEGIN in capsys.readouterr().err


def test_committed_readme_shows_the_committed_results():
    assert main(["--check"]) == 0


def test_parity_is_twice_the_error_of_what_is_replaced():
    exact, near, far = (torch.full((3,), x, dtype=torch.float64) for x in (1.0, 1.001, 1.003))
    assert parity((exact,), {"eager": (near,), "elip_kernels": (near,)})["passed"]
    with pytest.raises(AssertionError, match="parity"):
        parity((exact,), {"eager": (near,), "elip_kernels": (far,)})
    with pytest.raises(AssertionError, match="parity"):
        judged({"official": 0.0, "last": 1e-3}, ours=["last"])


def test_flops_count_attention_on_every_device():
    q = torch.randn(2, 3, 5, 4)
    assert count_flops(lambda: F.scaled_dot_product_attention(q, q, q)) == 2 * 2 * 2 * 3 * 5 * 5 * 4


def test_a_benchmark_records_parity_and_nothing_private(tmp_path, capsys):
    path = tmp_path / "device" / "bench.json"
    path.parent.mkdir()
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_reduce.py", "--rounds", "1"]
    command += ["--benchmark-json", str(path), "-k", "B1- and training", "-p", "no:cacheprovider"]
    run = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    content = json.loads(path.read_text())
    assert content["machine_info"].keys() == {"device", "threads", "versions"}
    assert content["commit_info"].keys() <= {"id", "dirty"}
    (benchmark,) = content["benchmarks"]
    facts = benchmark["extra_info"]
    assert facts["parity"]["passed"] and facts["ratios"].keys() == {"official", "eager"}
    assert "no-such-compiler" in facts["left_out"]["compiled"]
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["possible"]["elip_kernels"] > 0
    assert facts["bytes"] > 0
    readme = tmp_path / "README.md"
    readme.write_text(f"{BEGIN}{END}")
    assert main(["--results", str(tmp_path), "--readme", str(readme)]) == 1
    assert "rounds" in capsys.readouterr().err
