"""Checkpoints are verified; a folder has one run; a signal ends a run after a last checkpoint."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from elip_models.pretraining.training.run_checkpoints import Checkpoints, damage_of, step_of
from elip_models.pretraining.training.run_folder import RunFolder
from elip_models.pretraining.training.signal_handling import StopSignal
from elip_models.pretraining.training.trainer import train
from elip_models.validation import Stopped, TrainingError
from tests.helpers.tiers import tiered
from tests.helpers.tiny_run import logged, own_process, tiny_arguments, tiny_config

COMMAND = [sys.executable, "-m", "elip_models.cli"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def committed(folder, *steps, keep=9):
    checkpoints = Checkpoints(folder / "checkpoints")
    for step in steps:
        unfinished = checkpoints.unfinished(step)
        (unfinished / "shards").mkdir(parents=True)
        (unfinished / "model.safetensors").write_bytes(bytes(range(200)))
        (unfinished / "shards" / "0.bin").write_bytes(b"shard")
        checkpoints.commit(step, keep=keep, num_samples=7)
    return checkpoints


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "removed": lambda file: file.unlink(),
    "emptied": lambda file: file.write_bytes(b""),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "flipped": flip,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["model.safetensors", "shards/0.bin", "run.json"])
def test_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path, name, damage):
    checkpoints = committed(tmp_path, 4, 8)
    newest = checkpoints.latest()
    assert newest.name == "step_00000008" and damage_of(newest) is None
    DAMAGES[damage](newest / name)
    told = []
    assert checkpoints.latest(told.append).name == "step_00000004"
    assert len(told) == 1 and name in told[0]
    assert str(newest) in told[0] and "resuming step_00000004 instead" in told[0]


def test_a_run_does_not_restart_if_every_checkpoint_is_damaged(tmp_path):
    checkpoints = committed(tmp_path, 4, 8)
    for checkpoint in checkpoints.path.iterdir():
        flip(checkpoint / "model.safetensors")
    with pytest.raises(TrainingError, match=r"0008 is.*; .*0004 is.*no undamaged checkpoint"):
        checkpoints.latest()


def test_a_checkpoint_is_visible_when_it_is_complete(tmp_path):
    checkpoints = committed(tmp_path)
    assert checkpoints.latest() is None
    checkpoints.unfinished(3).mkdir(parents=True)
    for name in ("step_5", "step_final", ".removed_step_00000002"):
        (checkpoints.path / name).mkdir()
    assert checkpoints.latest() is None
    checkpoints.commit(3, keep=1, num_samples=7)
    assert checkpoints.latest().name == "step_00000003"
    assert not list(checkpoints.path.glob(".*"))


def test_the_newest_are_kept_and_an_equal_step_is_overwritten(tmp_path):
    checkpoints = committed(tmp_path, 1, 2, 3, 3, keep=2)
    assert sorted(each.name for each in checkpoints.path.iterdir()) == [
        "step_00000002",
        "step_00000003",
    ]
    assert step_of(checkpoints.latest(), num_samples=7) == 3
    with pytest.raises(TrainingError, match="expected num_samples = 7, got 8"):
        step_of(checkpoints.latest(), num_samples=8)


def test_a_run_resumes_from_the_last_undamaged_checkpoint(tmp_path):
    whole, damaged = tmp_path / "whole", tmp_path / "damaged"
    with own_process():
        train(tiny_config(whole, "checkpoint_every=1"))
        train(tiny_config(damaged, "checkpoint_every=1"))
    newest = RunFolder(damaged).checkpoints.latest()
    (newest / "random_states_0.pkl").unlink()
    shutil.rmtree(damaged / "model")
    console = Console(record=True)
    with own_process():
        train(tiny_config(damaged, "checkpoint_every=1"), resume=True, console=console)
    said = " ".join(console.export_text().split())
    assert "random_states_0.pkl is missing" in said and "resuming step_00000003 instead" in said
    assert logged(damaged, "loss", "step") == logged(whole, "loss", "step")
    weights = [(each / "model" / "model.safetensors").read_bytes() for each in (whole, damaged)]
    assert weights[0] == weights[1]


def started(folder, *overrides):
    """Return the process of a long run that has done its second step."""
    command = [*COMMAND, *tiny_arguments(folder, "optim.steps=100000", *overrides)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=ENVIRONMENT, text=True
    )
    deadline = time.monotonic() + 120
    while not ((log := folder / "metrics.jsonl").exists() and '"step": 2,' in log.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    return process


@pytest.mark.parametrize(
    "number", tiered([signal.SIGTERM, signal.SIGINT], [], slow=[signal.SIGTERM])
)
def test_a_signal_ends_a_run_with_a_checkpoint_of_its_last_step(tmp_path, number):
    process = started(tmp_path, "checkpoint_every=100000", "data.num_workers=1")
    other = tiny_config(tmp_path, "optim.steps=100000")
    with pytest.raises(TrainingError, match=rf"in use by process {process.pid} on "):
        train(other, resume=True)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    step = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    checkpoint = RunFolder(tmp_path).checkpoints.latest()
    assert step_of(checkpoint) == step
    said = " ".join(error.split())
    assert f"{signal.Signals(number).name} ended the run after step {step} of 100000" in said
    assert "Traceback" not in error, error


def test_a_stopped_run_continues_exactly(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    with own_process():
        train(tiny_config(whole))
    config = tiny_config(stopped)
    with own_process(), pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            "elip_models.pretraining.training.signal_handling.StopSignal.received",
            _at_second_step(),
        )
        with pytest.raises(Stopped, match="after step 2 of 4") as error:
            train(config)
        assert error.value.status == 143
    with own_process():
        train(config, resume=True)
    assert logged(stopped, "loss", "step") == logged(whole, "loss", "step")


def _at_second_step():
    steps = []

    def came(self, accelerator, *, may_wait):
        steps.append(may_wait)
        self.signal = signal.SIGTERM if len(steps) == 2 else None
        return self.signal is not None

    return came


def test_signal_handlers_are_restored(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with own_process():
        train(tiny_config(tmp_path))
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_the_process_is_not_killed_if_the_checkpoint_is_in_time(monkeypatch):
    ended = []
    monkeypatch.setattr("elip_models.pretraining.training.signal_handling.GRACE_PERIOD", 0.2)
    monkeypatch.setattr("elip_models.pretraining.training.signal_handling.os._exit", ended.append)
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
    time.sleep(0.4)
    assert ended == []
    with StopSignal():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.4)
    assert ended == [130]


def test_a_folder_is_unlocked_when_its_run_has_ended(tmp_path):
    config = tiny_config(tmp_path)
    with own_process():
        train(config)
        assert train(config, resume=True).step == 4
    assert not (tmp_path / ".owner").exists()
