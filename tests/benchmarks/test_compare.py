"""Changes that `benchmarks.compare` reports between two runs."""

import json

import pytest

from benchmarks import compare


@pytest.fixture
def run(tmp_path):
    """Return run(file name, ratios by benchmark, device), which writes a JSON file."""

    def write(name, ratios, device="Some CPU"):
        benchmarks = [
            {"name": benchmark, "extra_info": {"ratios": each}}
            for benchmark, each in ratios.items()
        ]
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        content = {"machine_info": {"device": device}, "benchmarks": benchmarks}
        path.write_text(json.dumps(content))
        return path

    return write


def test_prints_changes_above_the_threshold_the_largest_first(run, capsys):
    old = run("old.json", {"a": {"dense": 0.80}, "b": {"dense": 0.5, "eager": 1.0}, "c": {"x": 1}})
    new = run("new.json", {"a": {"dense": 0.82}, "b": {"dense": 0.6, "eager": 0.9}, "d": {"x": 1}})
    assert compare.main([str(new), str(old)]) == 0
    summary, *rows = capsys.readouterr().out.splitlines()
    assert summary == "2 of 3 ratios changed by more than 5%; 1 are new, 1 gone"
    assert [row.split() for row in rows] == [
        ["0.500", "->", "0.600", "+20.0%", "b,", "against", "dense"],
        ["1.000", "->", "0.900", "-10.0%", "b,", "against", "eager"],
    ]


def test_the_old_run_defaults_to_the_committed_one_of_the_device(
    run, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(compare, "RESULTS", tmp_path)
    new = run("new.json", {"a": {"dense": 0.6}})
    run("other/bench.json", {"a": {"dense": 0.3}}, device="Other CPU")
    assert compare.main([str(new)]) == 1
    assert "no committed results of 'Some CPU'" in capsys.readouterr().err
    run("some/bench.json", {"a": {"dense": 0.5}})
    assert compare.main([str(new)]) == 0
    assert "0.500 -> 0.600" in capsys.readouterr().out
