"""docs/how_it_works.md names the files that a forward pass runs."""

import sys
from pathlib import Path

import pytest
import timm
import torch

import elip_models

ROOT = Path(elip_models.__file__).parents[1]
PAGE = (ROOT / "docs" / "how_it_works.md").read_text(encoding="utf-8")


def files_that_run(call):
    """Return the files of `elip_models` with a function that `call()` runs."""
    package, files = Path(elip_models.__file__).parent, set()

    def note(frame, event, argument):
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(package):
            files.add(path.relative_to(package).as_posix())

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return files


@pytest.mark.parametrize(("column", "strategy"), [(2, "merge"), (3, "elip")])
def test_the_table_has_the_files_that_a_forward_pass_runs(column, strategy):
    rows = [line.strip("|").split(" | ") for line in PAGE.splitlines() if ".py` |" in line]
    listed = {row[0].strip(" `") for row in rows if row[column].strip() == "yes"}
    model = elip_models.reduce_(timm.create_model("vit_tiny_patch16_224", img_size=64), strategy)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        model.eval()(images)  # the first pass also computes what later ones read
        assert files_that_run(lambda: model(images)) == {
            name for name in listed if not name.startswith("elip_kernels/")
        }
