"""The core works in a copy of the package without what stands on it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import elip_kernels
import elip_models
from elip_models.validation import PARTS

SCRIPT = Path(__file__).parents[1] / "helpers" / "core_alone.py"


@pytest.mark.slow
def test_the_core_works_without_pretraining_and_embedding(tmp_path):
    core = tmp_path / "elip_models"
    core.mkdir()
    (tmp_path / "elip_kernels").symlink_to(Path(elip_kernels.__file__).parent)
    for path in Path(elip_models.__file__).parent.iterdir():
        if f"elip_models.{path.name}" not in PARTS:
            (core / path.name).symlink_to(path)
    run = subprocess.run(
        [sys.executable, "-P", str(SCRIPT)],  # -P: the helpers are no modules of the script
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "Usage: elip" in run.stdout
    assert "error: this needs elip_models.pretraining, which this copy lacks" in run.stderr
