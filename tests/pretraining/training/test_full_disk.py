"""A full disk ends a run with one line; `python -m tests.full_disk` has all moments."""

import errno
import os
import subprocess
import sys

import pytest

from elip_models.pretraining.training.errors import as_write_error
from elip_models.validation import TrainingError
from tests.helpers.tiers import tiered


@pytest.mark.parametrize("moment", tiered(["weights", "rename"], [], slow=["weights"]))
def test_a_run_on_a_full_disk_resumes_exactly(moment):
    command = [sys.executable, "-m", "tests.full_disk", "--only", moment]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert f"{moment}: error: " in ended.stdout and "the same weights" in ended.stdout


FAILURES = {
    "No space left on device": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "File too large": OSError(errno.EFBIG, os.strerror(errno.EFBIG)),
    "Disk quota exceeded": Exception("Disk quota exceeded (os error 122)"),
    "unexpected pos": RuntimeError("[enforce fail at inline_container.cc:1] . unexpected pos 1"),
}


@pytest.mark.parametrize("problem", FAILURES)
def test_an_error_of_a_writer_is_one_sentence_with_its_cause(tmp_path, problem):
    failure = FAILURES[problem]
    with (
        pytest.raises(TrainingError, match=f"{problem}.*--resume") as error,
        as_write_error(tmp_path),
    ):
        raise failure
    assert str(tmp_path) in str(error.value) and error.value.__cause__ is failure


@pytest.mark.parametrize("failure", [RuntimeError("bug"), FileNotFoundError(2, "no"), KeyError()])
def test_other_errors_pass(tmp_path, failure):
    with pytest.raises(type(failure)) as error, as_write_error(tmp_path):
        raise failure
    assert error.value is failure
