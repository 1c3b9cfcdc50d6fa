"""`optim.shard`: FSDP2 trains like DistributedDataParallel and resumes exactly, or raises."""

import pytest

from elip_models.pretraining.training.recipe import load_recipe
from elip_models.pretraining.training.sharded import check_sharding
from elip_models.pretraining.training.trainer import train
from elip_models.validation import ConfigError
from tests.helpers import sharded_cases, two_processes
from tests.helpers.tiers import tiered
from tests.helpers.tiny_run import own_process, tiny_config

SLOW = ("clip, all options", "meter", "clip resumed", "clip, fused")


@pytest.fixture(scope="module")
def failed(request, tmp_path_factory):
    """Return the failures of each case that this session has collected."""
    tests = [test for test in request.session.items if "failed" in test.fixturenames]
    names = [test.callspec.params["case"] for test in tests if test.module is request.module]
    folder = tmp_path_factory.mktemp("two_processes")
    return two_processes.run([sharded_cases.__name__], names, folder)


CASES = [
    *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW),
    *tiered(
        [case for case in sharded_cases.CASES if case not in SLOW],
        [],
        slow=["meter, checkpointing"],
    ),
]


@pytest.mark.parametrize("case", CASES)
def test_sharded_runs_equal_replicated_ones(failed, case):
    assert not failed[case], failed[case]


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("albef_tiny", (), r"optim\.shard: expected false for ALBEF, .*momentum encoders"),
        ("blip_tiny", (), r"optim\.shard: expected false for BLIP, .*momentum encoders"),
        ("clip_tiny", ("precision=fp16",), r"optim\.precision: .*shard=true, as .*got 'fp16'"),
        ("clip_tiny", ("name=muon",), r"optim\.name: .*whole matrices.*got 'muon'"),
        ("meter_tiny", ("ema=0.9",), r"optim\.ema: expected null .*got 0\.9"),
        ("meter_tiny", ("compile=eager",), r"optim\.compile: expected false .*got 'eager'"),
    ],
)
def test_unsupported_sharding_raises(recipe, overrides, message):
    config = load_recipe(recipe, [f"optim.{each}" for each in ("shard=true", *overrides)])
    with pytest.raises(ConfigError, match=message):
        check_sharding(config, 2)


def test_sharding_on_one_process_raises(tmp_path):
    folder = tmp_path / "run"
    config = tiny_config(folder, "optim.shard=true")
    with own_process(), pytest.raises(ConfigError, match=r"optim\.shard: .*torchrun"):
        train(config)
    assert not folder.exists()
