"""A process that fails ends the others: with its error, in `embed` and in training."""

import pytest

from elip_models.rank_barrier import RankBarrier
from tests.helpers import failing_rank_cases, two_processes
from tests.helpers.tiers import slow_except


@pytest.fixture(scope="module")
def failed(request, tmp_path_factory):
    """Return the failures of each case that this session has collected."""
    tests = [test for test in request.session.items if "failed" in test.fixturenames]
    names = [test.callspec.params["case"] for test in tests if test.module is request.module]
    folder = tmp_path_factory.mktemp("two_processes")
    return two_processes.run([failing_rank_cases.__name__], names, folder)


QUICK = ["barrier, main", "barrier, other", "embed, before the shards"]


@pytest.mark.parametrize("case", slow_except(QUICK, list(failing_rank_cases.CASES)))
def test_both_processes_end_with_the_error_of_one(failed, case):
    assert not failed[case], failed[case]


def test_one_process_waits_for_nobody():
    barrier = RankBarrier()
    with pytest.raises(OSError, match="full"), barrier.reporting():
        barrier.wait()
        raise OSError("full")
