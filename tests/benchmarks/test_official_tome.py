"""`python -m benchmarks.official_tome`, on a package that stands for the official one."""

import json
import sys

import pytest

from benchmarks import official_tome

PATCH = """import elip_models
def timm(model):
    elip_models.reduce_(model, "tome:r=13")
"""


@pytest.fixture
def clone(tmp_path):
    package = tmp_path / "ToMe" / "tome"
    (package / "patch").mkdir(parents=True)
    (package / "__init__.py").write_text("from tome import patch\n")
    (package / "patch" / "__init__.py").write_text(PATCH)
    yield package.parent
    for name in ("tome", "tome.patch"):
        sys.modules.pop(name, None)


def test_the_official_code_is_compared_with_tome_on_the_same_images(clone, monkeypatch):
    monkeypatch.setattr(official_tome, "MODELS", ("test_vit",))
    monkeypatch.setattr(official_tome, "PIXELS", 160)
    output = clone / "result.json"
    assert official_tome.main([str(clone), "--rounds", "6", "--output", str(output)]) == 0
    (found,) = json.loads(output.read_text())["models"].values()
    assert found["largest_relative_difference"] == 0
    for run in found["time"]["runs"]:
        assert run["ratios"].keys() == {"dense", official_tome.OFFICIAL, *official_tome.OURS}


def test_a_folder_without_the_official_code_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        official_tome.main([str(tmp_path)])
    assert "facebookresearch/ToMe" in capsys.readouterr().err
