"""`optim.shard` raises where it is not supported; `test_distributed.py` has runs that shard."""

import pytest

from elip_models.pretraining.training.recipe import load_recipe
from elip_models.pretraining.training.sharded import check_sharding
from elip_models.pretraining.training.trainer import train
from elip_models.validation import ConfigError
from tests.helpers.tiny_run import tiny_config

UNSUPPORTED = [
    ("albef_tiny", "seed=0", "the momentum encoders of ALBEF"),
    ("clip_tiny", "optim.precision=fp16", r"optim\.precision=fp16"),
    ("meter_tiny", "optim.compile=eager", r"optim\.compile"),
]


@pytest.mark.parametrize(("recipe", "override", "problem"), UNSUPPORTED)
def test_unsupported_sharding_raises(recipe, override, problem):
    config = load_recipe(recipe, ["optim.shard=true", override])
    with pytest.raises(ConfigError, match=rf"optim\.shard: expected false, got true, .*{problem}"):
        check_sharding(config, 2)


def test_sharding_on_one_process_raises(tmp_path):
    with pytest.raises(ConfigError, match=r"optim\.shard: .*torchrun"):
        train(tiny_config(tmp_path / "run", "optim.shard=true"))
    assert not (tmp_path / "run").exists()
