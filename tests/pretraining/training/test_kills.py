"""Runs killed by SIGKILL resume exactly; `python -m tests.kills` has many more cases."""

import pytest

from elip_models.pretraining.training.accelerator import NO_SHARED_STORE, make_accelerator
from elip_models.pretraining.training.run_folder import RunFolder
from elip_models.validation import ConfigError
from tests.helpers.tiny_run import own_process, tiny_config
from tests.kills import CASES, compare


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_killed_run_equals_an_uninterrupted_one(case, tmp_path):
    """Kill one of two processes; torchrun ends the other and restarts both."""
    compare(tmp_path, case, 1, seed=0)


def test_restarts_that_could_hang_raise(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    config, folder = tiny_config(tmp_path), RunFolder(tmp_path)
    with (
        own_process(),
        pytest.raises(ConfigError, match=f"torchrun: expected {NO_SHARED_STORE}=1"),
    ):
        make_accelerator(config, folder)
    monkeypatch.setenv(NO_SHARED_STORE, "1")
    with own_process():
        assert make_accelerator(config, folder).num_processes == 1
