"""Two processes with FSDP2 and DDP give the results of one process; all cases share one pair.

Runs that shard train like replicated ones, and resume exactly.
"""

import pytest
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

import elip_models
from tests.helpers import cross_modal_cases, ddp_cases, fsdp_cases, sharded_cases, two_processes
from tests.helpers.towers import SCHEDULE, images, plain_vit

MODULES = [ddp_cases, fsdp_cases, cross_modal_cases, sharded_cases]
CASES = [case for module in MODULES for case in module.CASES]


@pytest.fixture(scope="module")
def failed(request, tmp_path_factory):
    """Return the failures of each case that this session has collected."""
    tests = [test for test in request.session.items if "failed" in test.fixturenames]
    names = [test.callspec.params["case"] for test in tests if test.module is request.module]
    modules = [module.__name__ for module in MODULES]
    return two_processes.run(modules, names, tmp_path_factory.mktemp("two_processes"))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_the_results_of_one(failed, case):
    assert not failed[case], failed[case]


def fsdp1(module):
    """Return a fake of FSDP1's wrapper, which cannot be built without an accelerator."""
    wrapper = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper._fsdp_wrapped_module = module
    return wrapper


@pytest.mark.parametrize("where", ["root", "block", "block after reduce_"])
def test_fsdp1_is_refused(where):
    model = plain_vit()
    if where == "root":
        model = fsdp1(model)
    elif where == "block":
        model.blocks[2] = fsdp1(model.blocks[2])
    with pytest.raises(TypeError, match=r"FullyShardedDataParallel.*fully_shard"):
        elip_models.reduce_(model, schedule=SCHEDULE)
        model.blocks[2] = fsdp1(model.blocks[2])
        model(images())
