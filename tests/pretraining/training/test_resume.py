"""Resuming: a killed or stopped run continues exactly, and one that cannot be resumed raises."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from rich.console import Console

from elip_models.pretraining.data import DataError
from elip_models.pretraining.training import trainer
from elip_models.pretraining.training.accelerator import NO_SHARED_STORE, make_accelerator
from elip_models.pretraining.training.run_checkpoints import step_of
from elip_models.pretraining.training.run_folder import RunFolder
from elip_models.pretraining.training.trainer import train
from elip_models.validation import ConfigError, TrainingError
from tests.helpers.tiny_run import logged, tiny_arguments, tiny_config

COMMAND = [sys.executable, "-m", "elip_models.cli"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
NUMBERS = ("loss", "step", "epoch", "lr", "grad_norm", "temperature")
SCORES = ("image_to_text_r1", "image_to_text_r10", "text_to_image_r5", "step")


def started(folder, *overrides):
    """Return the process of a run."""
    command = [*COMMAND, *tiny_arguments(folder, *overrides)]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=ENVIRONMENT, **pipes)


def wait_for(process, folder, step):
    deadline, log = time.monotonic() + 120, folder / "metrics.jsonl"
    while not (log.exists() and f'"step": {step},' in log.read_text()):
        assert process.poll() is None, "the run has ended"
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.005)


@pytest.mark.slow
def test_a_killed_run_with_all_options_equals_an_uninterrupted_one(tmp_path):
    overrides = (
        "optim.steps=22",
        "optim.grad_accumulation=2",
        "optim.warmup_steps=5",
        "model.overrides.drop_path=0.3",
        "checkpoint_every=4",
        "eval_every=7",
        "report=[retrieval]",
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(tiny_config(whole, *overrides))
    process = started(killed, *overrides)
    wait_for(process, killed, 10)
    process.kill()
    process.communicate()
    for name in (".step_00000020", "step_00000016"):  # half-written, and damaged
        (killed / "checkpoints" / name).mkdir()
        (killed / "checkpoints" / name / "model.safetensors").write_bytes(b"half")
    with (killed / "metrics.jsonl").open("a") as log:
        log.write('{"step": 11, "lo')
    console = Console(record=True, width=300)
    train(tiny_config(killed, *overrides, "data.num_workers=1"), resume=True, console=console)
    assert "step_00000016 is damaged" in console.export_text()
    assert len(logged(whole, *NUMBERS)) == 22
    assert logged(killed, *NUMBERS) == logged(whole, *NUMBERS)
    assert logged(killed, *SCORES) == logged(whole, *SCORES)
    assert len(logged(killed, "step")) == len(logged(whole, "step"))
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (whole, killed)]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_a_signal_ends_a_run_with_a_checkpoint_from_which_it_continues(tmp_path):
    stopped, steps = tmp_path / "stopped", "optim.steps=100000"
    process = started(stopped, steps, "checkpoint_every=100000", "data.num_workers=1")
    wait_for(process, stopped, 2)
    with pytest.raises(TrainingError, match="in use by another run"):
        train(tiny_config(stopped, steps), resume=True)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    step = logged(stopped, "step")[-1]["step"]
    assert step_of(RunFolder(stopped).checkpoints.latest()) == step
    said = " ".join(error.split())
    assert f"SIGTERM ended the run after step {step} of 100000" in said
    assert "Traceback" not in error, error
    train(tiny_config(stopped, f"optim.steps={step + 2}"), resume=True)
    assert [row["step"] for row in logged(stopped, "loss", "step")] == [*range(1, step + 3)]


def test_a_second_signal_has_its_usual_effect_and_handlers_are_restored(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with trainer.StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_resume_starts_continues_and_lengthens_a_run_and_reports_again(tmp_path):
    settings = ("report=[retrieval]", "checkpoint_every=2")
    first = train(tiny_config(tmp_path, *settings), resume=True)  # there is no run
    log = (tmp_path / "metrics.jsonl").read_text()
    again = train(tiny_config(tmp_path, *settings), resume=True)
    assert (tmp_path / "metrics.jsonl").read_text() == log
    assert (again.step, again.loss, again.scores) == (first.step, first.loss, first.scores)
    assert train(tiny_config(tmp_path, *settings, "optim.steps=6"), resume=True).step == 6
    assert [row["step"] for row in logged(tmp_path, "loss", "step")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
@pytest.mark.parametrize("when", ["report=[retrieval]", "eval_every=4"])
def test_an_evaluation_that_fails_at_the_end_loses_no_step(tmp_path, monkeypatch, when):
    expected = train(tiny_config(tmp_path / "whole", when))
    config = tiny_config(tmp_path / "failed", when)

    def fail(*arguments):
        raise DataError("no readable sample")

    with monkeypatch.context() as patch, pytest.raises(DataError):
        patch.setattr(trainer.Evaluation, "run", fail)
        train(config)
    monkeypatch.setattr(trainer.Trainer, "_train_step", fail)
    resumed = train(config, resume=True)
    assert (resumed.step, resumed.loss, resumed.scores) == (4, expected.loss, expected.scores)
    assert logged(tmp_path / "failed", *SCORES) == logged(tmp_path / "whole", *SCORES)


def scaled(config, folder):
    """Return an accelerator with fp16's gradient scaler, which skips its first steps."""
    accelerator = make_accelerator(config, folder)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=2)
    return accelerator


@pytest.mark.slow
def test_a_gradient_scaler_is_resumed_exactly(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "make_accelerator", scaled)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    overrides = ("optim.steps=8", "checkpoint_every=2", "keep_checkpoints=9")
    train(tiny_config(whole, *overrides))
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "model")
    for step in (6, 8):
        shutil.rmtree(stopped / "checkpoints" / f"step_{step:08}")
    train(tiny_config(stopped, *overrides), resume=True)
    assert logged(stopped, *NUMBERS) == logged(whole, *NUMBERS)
    scales = [
        torch.load(folder / "checkpoints" / f"step_{step:08}" / "scaler.pt")["scale"]
        for folder in (whole, stopped)
        for step in (2, 4, 8)
    ]
    assert scales[:3] == scales[3:] and len(set(scales)) == 3
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (whole, stopped)]
    assert weights[0] == weights[1]


def test_restarts_that_could_hang_raise(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(ConfigError, match=f"torchrun: expected {NO_SHARED_STORE}=1"):
        train(tiny_config(tmp_path))
    monkeypatch.setenv(NO_SHARED_STORE, "1")
    assert train(tiny_config(tmp_path)).step == 4
