"""A full disk ends a run with one line; `python -m tests.full_disk` has all moments."""

import subprocess
import sys

import pytest

from elip_models.pretraining.training.run_folder import as_write_error
from elip_models.validation import TrainingError


@pytest.mark.slow
def test_a_run_on_a_full_disk_resumes_exactly():
    command = [sys.executable, "-m", "tests.full_disk", "--only", "weights"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "weights: error: " in ended.stdout and "the same weights" in ended.stdout


FAILURES = [
    OSError(28, "No space left on device"),
    Exception("Disk quota exceeded (os error 122)"),
    RuntimeError("[enforce fail at inline_container.cc:1] . unexpected pos 1"),
]


@pytest.mark.parametrize("failure", FAILURES, ids=str)
def test_an_error_of_a_writer_is_one_line_and_others_pass(tmp_path, failure):
    with pytest.raises(TrainingError, match="--resume") as error, as_write_error(tmp_path):
        raise failure
    assert str(tmp_path) in str(error.value) and str(failure) in str(error.value)
    with pytest.raises(FileNotFoundError), as_write_error(tmp_path):
        raise FileNotFoundError(2, "no")
    with pytest.raises(Exception, match="No such file"), as_write_error(tmp_path):
        raise Exception("No such file or directory (os error 2)")
