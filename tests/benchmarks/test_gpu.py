"""`python -m benchmarks.gpu` on a CPU: its table and its JSON, never a time."""

import json
from functools import partial

import pytest
import timm
import torch

from benchmarks import gpu
from benchmarks.parity import why_not_compiled
from benchmarks.settings import read_settings

SMALLEST = ("--model", "test_vit", "--batch", "1", "--dtype", "fp32", "--rounds", "6")


def rows(text):
    """Return the cells of each row of a Markdown table that has a model or an op."""
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    return [line.strip("| ").split(" | ") for line in lines]


@pytest.mark.slow
def test_the_command_prints_its_json_as_a_table(tmp_path, capsys, monkeypatch):
    without_cpp = partial(torch.compile, backend="aot_eager")  # whose compiler takes 30 seconds
    monkeypatch.setattr(torch, "compile", without_cpp)
    output = tmp_path / "gpu.json"
    arguments = [*SMALLEST, "--settings", "merge 0.7", "--output", str(output)]
    assert gpu.main(arguments) == 0
    printed = capsys.readouterr().out
    document = json.loads(output.read_text())
    assert document.keys() >= {"device", "threads", "versions", "commit", "date", "runs", "ops"}
    (run,), (op,) = document["runs"], document["ops"]
    assert [row["setting"] for row in run["settings"]] == ["dense", "merge 0.7"]
    _, row = run["settings"]
    assert row["parity"]["passed"] and row["flops"] < 1
    ways = {"eager"} | ({"compile"} if why_not_compiled() is None else set())
    ratios = {way: timed["ratio"] for way, timed in row["ways"].items()}
    assert ratios.keys() == ways
    assert all(each["low"] <= each["mean"] <= each["high"] for each in ratios.values())
    assert op["parity"]["passed"] and op["ratios"].keys() == {"official", "eager"}

    dense, *_, last = rows(printed)
    assert dense[:5] == ["`test_vit`", "fp32", "1", "`dense`", "1.00"]
    assert last[0] == "`reduce`, PyTorch"
    assert "CUDA graph: no GPU" in printed and f"Wrote {output}" in printed
    assert gpu.main(["--show", str(output)]) == 0
    assert rows(capsys.readouterr().out) == rows(printed)


@pytest.fixture
def settings():
    return read_settings("merge 0.7", timm.create_model("test_vit", img_size=32, num_classes=0))


def test_a_setting_that_does_not_run_in_a_way_has_its_reason(settings):
    def fails_on_reduced(model, images):
        if model is not settings[0].model:
            raise RuntimeError("no code for this device\nand a long trace")
        return gpu.eager(model, images)

    with torch.no_grad():
        found = gpu._timed(fails_on_reduced, settings, torch.randn(1, 3, 32, 32), 6)
    assert found["merge 0.7"] == {"left_out": "RuntimeError: no code for this device"}
    assert found["dense"]["ratio"] == {"mean": 1.0, "low": 1.0, "high": 1.0}


def test_a_way_whose_features_differ_has_no_time(settings):
    with torch.no_grad():
        found = gpu._timed(
            lambda model, images: lambda: -model(images), settings, torch.randn(1, 3, 32, 32), 6
        )
    assert all("a cosine of -1.0000" in each["left_out"] for each in found.values())


def test_the_table_has_a_ratio_with_its_interval_and_the_reason_of_each_dash():
    timed = {"ms": 3.0, "ratio": {"mean": 0.71, "low": 0.7, "high": 0.72}}
    passed = {"passed": True}
    broken = {"passed": False, "reason": "expected errors of at most 1e-6"}
    row = {"flops": 0.7, "peak_bytes": 2**21, "parity": passed}
    dense = row | {"setting": "dense", "flops": 1.0, "parity": None, "ways": {"eager": timed}}
    merged = row | {"setting": "merge 0.7", "ways": {"eager": timed, "compile": {"left_out": "no"}}}
    wrong = row | {"setting": "tome 0.7", "ways": {"eager": timed}, "parity": broken}
    run = {"model": "vit", "dtype": "fp16", "batch": 64, "settings": [dense, merged, wrong]}
    document = {"device": "A GPU", "date": "2026-12-03", "commit": {"id": "0123456789"}}
    document |= {"versions": {"torch": "2.13.0"}, "left_out": {}, "runs": [run], "ops": []}
    text = gpu.report(document)
    assert text.startswith("A GPU, 2026-12-03, commit 0123456; torch 2.13.0.")
    middle = ["1.00", "3 ms", "–", "–", "2"], ["0.70", "0.71 (0.70 to 0.72)", "–", "–", "2"]
    assert [cells[4:] for cells in rows(text)] == [*middle, middle[1]]
    assert "vit fp16 64, merge 0.7, compile: no" in text
    assert "vit fp16 64, tome 0.7: WRONG, expected errors of at most 1e-6" in text


def test_too_few_rounds_for_an_interval_are_refused(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--rounds", "5"])
    assert "--rounds: expected at least 6, got 5" in capsys.readouterr().err
