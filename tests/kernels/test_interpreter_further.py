"""The kernels in the interpreter against fp64: the files that `test_interpreter.py` leaves."""

import pytest

from elip_kernels._triton import HAS_TRITON
from tests.helpers.interpreter import FOLDER, check_passes
from tests.kernels.test_interpreter import HALF

OTHERS = sorted({str(path) for path in FOLDER.glob("test_*.py")} - {*HALF})


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON, reason="triton is absent, so there is no kernel to interpret")
def test_other_kernels_under_the_interpreter():
    check_passes(*OTHERS)
