"""Resuming: a killed run continues exactly, and a run that cannot be resumed raises."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from elip_models.pretraining.data import DataError, EmojiScenes
from elip_models.pretraining.training import trainer
from elip_models.pretraining.training.accelerator import make_accelerator
from elip_models.pretraining.training.run_folder import RunFolder
from elip_models.pretraining.training.trainer import train
from elip_models.validation import TrainingError
from tests.helpers.tiny_run import logged, own_process, tiny_arguments, tiny_config

COMMAND = [sys.executable, "-m", "elip_models.cli"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
NUMBERS = ("loss", "step", "epoch", "lr", "grad_norm", "temperature")
SCORES = ("image_to_text_r1", "image_to_text_r10", "text_to_image_r5", "step")


@pytest.fixture(autouse=True)
def _own_process():
    with own_process():
        yield


def elip(folder, *overrides):
    command = [*COMMAND, *tiny_arguments(folder, *overrides)]
    subprocess.run(command, check=True, capture_output=True, timeout=120, env=ENVIRONMENT)


def kill_at_step(folder, step, *overrides):
    """Start a run and kill it with SIGKILL as soon as its log contains `step`."""
    command = [*COMMAND, *tiny_arguments(folder, *overrides)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=ENVIRONMENT)
    log = folder / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and f'"step": {step},' in log.read_text()):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(tmp_path):
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
    elip(whole, *overrides)
    kill_at_step(killed, 10, *overrides)
    assert RunFolder(killed).checkpoints.latest().name in ("step_00000008", "step_00000012")
    leave_what_a_kill_can_leave(killed)
    elip(killed, *overrides, "--resume", "data.num_workers=1")
    assert len(logged(whole, *NUMBERS)) == 22
    assert logged(killed, *NUMBERS) == logged(whole, *NUMBERS)
    assert logged(killed, *SCORES) == logged(whole, *SCORES)
    assert len(logged(killed, "step")) == len(logged(whole, "step"))
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (whole, killed)]
    assert weights[0] == weights[1]


def leave_what_a_kill_can_leave(folder):
    """Write a half-written checkpoint, a half-removed one, and half a line of the log."""
    for name in (".step_00000020", "step_00000016"):
        checkpoint = folder / "checkpoints" / name
        checkpoint.mkdir()
        (checkpoint / "model.safetensors").write_bytes(b"half")
    with (folder / "metrics.jsonl").open("a") as log:
        log.write('{"step": 11, "lo')


def test_resume_without_a_run_starts_one(tmp_path):
    assert train(tiny_config(tmp_path), resume=True).step == 4


def test_resume_of_a_finished_run_changes_nothing_and_reports_again(tmp_path):
    config = tiny_config(tmp_path, "report=[retrieval]")
    first = train(config)
    log = (tmp_path / "metrics.jsonl").read_text()
    again = train(config, resume=True)
    assert (tmp_path / "metrics.jsonl").read_text() == log
    assert (again.step, again.loss, again.scores) == (first.step, first.loss, first.scores)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["report=[retrieval]", "eval_every=4"])
def test_an_evaluation_that_fails_at_the_end_loses_no_step(tmp_path, monkeypatch, when):
    expected = train(tiny_config(tmp_path / "whole", when))
    config = tiny_config(tmp_path / "failed", when)

    def fail(*given):
        raise DataError("no readable sample")

    with monkeypatch.context() as patch, pytest.raises(DataError):
        patch.setattr(trainer.Evaluation, "run", fail)
        train(config)
    monkeypatch.setattr(trainer.Trainer, "_train_step", fail)
    found = train(config, resume=True)
    assert (found.step, found.loss, found.scores) == (4, expected.loss, expected.scores)
    assert logged(tmp_path / "failed", *SCORES) == logged(tmp_path / "whole", *SCORES)


def test_longer_run_continues(tmp_path):
    train(tiny_config(tmp_path, "checkpoint_every=2"))
    assert train(tiny_config(tmp_path, "optim.steps=6"), resume=True).step == 6
    assert [row["step"] for row in logged(tmp_path, "step")] == [1, 2, 3, 4, 5, 6]


def test_keeps_the_newest_checkpoints(tmp_path):
    train(tiny_config(tmp_path, "checkpoint_every=1", "keep_checkpoints=2"))
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_00000003", "step_00000004"]


def scaled(config, folder):
    """Return an accelerator with fp16's gradient scaler, which skips its first steps."""
    accelerator = make_accelerator(config, folder)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=2)
    return accelerator


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 5])
def test_a_gradient_scaler_is_resumed_exactly(tmp_path, monkeypatch, step):
    monkeypatch.setattr(trainer, "make_accelerator", scaled)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    overrides = ("optim.steps=8", "checkpoint_every=1", "keep_checkpoints=9")
    train(tiny_config(whole, *overrides))
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "model")
    for number in range(step + 1, 9):
        shutil.rmtree(stopped / "checkpoints" / f"step_{number:08}")
    train(tiny_config(stopped, *overrides), resume=True)
    norms = [row["grad_norm"] for row in logged(whole, "grad_norm")]
    assert len(norms) == 8
    assert logged(stopped, *NUMBERS) == logged(whole, *NUMBERS)
    scales = [
        torch.load(folder / "checkpoints" / f"step_{number:08}" / "scaler.pt")["scale"]
        for number in (1, step, 8)
        for folder in (whole, stopped)
    ]
    assert scales[0] < 2.0**127
    assert scales[::2] == scales[1::2]
    assert len(set(scales)) == 3
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (whole, stopped)]
    assert weights[0] == weights[1]


def test_a_folder_with_a_run_raises_and_does_not_change(tmp_path):
    train(tiny_config(tmp_path))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(TrainingError, match=r"already contains a run.*--resume"):
        train(tiny_config(tmp_path))
    assert before == {
        path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()
    }


def test_resume_with_another_recipe_names_the_keys(tmp_path):
    train(tiny_config(tmp_path))
    with pytest.raises(TrainingError, match=r"optim\.lr: 0\.001 -> 0\.002; optim\.precision"):
        train(tiny_config(tmp_path, "optim.lr=0.002", "optim.precision=bf16"), resume=True)


def test_resuming_on_other_data_raises(tmp_path):
    scenes, images = EmojiScenes(12, image_size=32), tmp_path / "images"
    images.mkdir()
    entries = []
    for i in range(12):
        scenes[i].image.save(images / f"{i}.png")
        entries.append({"image": f"images/{i}.png", "caption": scenes.captions(i)[0]})
    data = tmp_path / "list.json"
    data.write_text(json.dumps(entries))
    config = tiny_config(tmp_path / "run", f"data.train={data}")
    train(config)
    data.write_text(json.dumps(entries[:10]))
    with pytest.raises(TrainingError, match="expected num_samples = 12, got 10"):
        train(config, resume=True)
