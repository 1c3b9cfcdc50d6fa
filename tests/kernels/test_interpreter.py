"""The kernels in the interpreter: a half; `test_interpreter_further.py` is for another worker."""

import pytest

from elip_kernels._triton import HAS_TRITON
from tests.helpers.interpreter import check_passes, file

SMALL = [f"{file('traffic')}::test_each_byte_moves_once", f"{file('reduce_kernel')}::test_masks"]
HALF = [file(name) for name in ("reduce_kernel", "traffic", "randomised")]

pytestmark = pytest.mark.skipif(
    not HAS_TRITON, reason="triton is absent, so there is no kernel to interpret"
)


def test_kernels_under_the_interpreter():
    """A small call of every op runs every kernel."""
    check_passes(*SMALL)


@pytest.mark.slow
def test_accesses_and_random_cases_under_the_interpreter():
    check_passes(*HALF)
