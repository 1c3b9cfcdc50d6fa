"""`python -m benchmarks.real.collection`: speeds, agreement and recall of a small model."""

import json

import pytest

from benchmarks.real import collection

N = 12  # photographs of `folder`


@pytest.fixture
def results(folder, model, monkeypatch, tmp_path):
    """Return a function that runs the command with the small model, and returns its JSON."""
    monkeypatch.setattr(collection, "timm_model", lambda: model)

    def run(*arguments):
        output = tmp_path / "results.json"
        given = [folder, tmp_path / "work", "--output", output, "--rounds", 1, "--timed", 4]
        assert collection.main([*map(str, given), *map(str, arguments)]) == 0
        return json.loads(output.read_text())

    return run


def test_the_command_embeds_times_and_compares_all_photographs(results):
    found = results("--keep", 1)
    assert found["photographs"] == found["counts"]["embedded"] == N
    assert found["reduced"]["recall_at_10"]["mean"] == found["reduced"]["neighbours"] == 1
    assert found["reduced"]["cosine"]["mean"] == pytest.approx(1)
    for arm in ("dense", "reduced"):
        rates = found[arm]
        share = rates["images_per_second"] / rates["bare_images_per_second"]
        assert rates["share_of_bare"]["median"] == pytest.approx(share, rel=0.01)
