"""The kernels in the interpreter against fp64: the files that `test_interpreter.py` leaves.

`limits` are the bounds of rounding, and images of thousands of tokens.
"""

import pytest

from elip_kernels._triton import HAS_TRITON
from tests.helpers.interpreter import FOLDER, check_passes, file
from tests.kernels.test_interpreter import HALF

LIMITS = [file("numerics"), file("many_tokens")]
OTHERS = {str(path) for path in FOLDER.glob("test_*.py")} - {*HALF, *LIMITS, file("randomised")}
FILES = {"agreement": sorted(OTHERS), "limits": LIMITS}


@pytest.mark.slow
@pytest.mark.parametrize("what", FILES)
@pytest.mark.skipif(not HAS_TRITON, reason="triton is absent, so there is no kernel to interpret")
def test_other_kernels_under_the_interpreter(what):
    check_passes(*FILES[what])
