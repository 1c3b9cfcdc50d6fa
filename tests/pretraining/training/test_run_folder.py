"""A folder has one run, its checkpoints are verified, and nothing of others in it is changed."""

import json
import sys

import pytest

import elip_models.saving.saved_folder as files
from elip_models.pretraining.training.recipe import load_recipe
from elip_models.pretraining.training.run_checkpoints import MANIFEST, Checkpoints, step_of
from elip_models.pretraining.training.run_folder import RunFolder, run_provenance
from elip_models.pretraining.training.trainer import train
from elip_models.validation import ConfigError, TrainingError
from tests.helpers.tiny_run import tiny_config


def contents(folder):
    """Relative name -> bytes of each file."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", ["tokenizer/tokenizer.json", "metrics.jsonl"])
def test_a_folder_with_other_files_is_refused_and_keeps_them(tmp_path, name, resume):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text('{"step": 9}')
    with pytest.raises(TrainingError, match=r"output_dir: expected a new or empty folder.* set an"):
        train(tiny_config(tmp_path), resume=resume)
    assert contents(tmp_path) == {name: b'{"step": 9}'}


@pytest.mark.parametrize("option", ["optim.batch_size=49", "data.tokenizer=/missing"])
def test_a_start_that_fails_leaves_nothing(tmp_path, option):
    with pytest.raises(ConfigError):
        train(tiny_config(tmp_path / "a" / "b", option))
    assert not list(tmp_path.iterdir())


def test_a_finished_run_is_not_started_again_nor_resumed_by_another_recipe(tmp_path):
    train(tiny_config(tmp_path, "optim.steps=1"))
    before = contents(tmp_path)
    with pytest.raises(TrainingError, match=r"already contains a run.*--resume"):
        train(tiny_config(tmp_path))
    with pytest.raises(TrainingError, match=r"optim\.lr: 0\.001 -> 0\.002; optim\.eps"):
        train(tiny_config(tmp_path, "optim.lr=0.002", "optim.eps=1e-5"), resume=True)
    assert contents(tmp_path) == before


def test_a_run_writes_its_provenance(tmp_path):
    train(tiny_config(tmp_path, "optim.steps=1"))
    provenance = tmp_path / "provenance.jsonl"
    provenance.write_text(provenance.read_text() + '{"started": "2')  # of a run that was killed
    train(tiny_config(tmp_path, "optim.steps=2"), resume=True)
    first, _, second = provenance.read_text().splitlines()
    first, second = json.loads(first), json.loads(second)
    assert [first["resumed"], second["resumed"]] == [None, "step_00000001"]
    assert first["versions"]["torch"] and first["command"] and first["samples"] == 48


URL = "{stream: 'https://me:hunter2@h/a.tar', samples: 9}"
QUERY = "{stream: 'https://h/a.tar?Signature=hunter2', samples: 9}"


@pytest.mark.parametrize("spec", [URL, QUERY])
def test_a_recipe_with_a_secret_is_private_and_no_message_has_it(tmp_path, spec, monkeypatch):
    config, run = tiny_config(tmp_path, f"data.train={spec}"), RunFolder(tmp_path)
    monkeypatch.setattr(sys, "argv", ["elip", "train", f"data.train={spec}", "seed=1"])
    run.record_start(config, run_provenance(9, None))
    assert "hunter2" not in run.provenance.read_text()
    assert run.recipe.stat().st_mode & 0o777 == 0o600
    assert load_recipe(run.recipe) == config
    with pytest.raises(TrainingError, match=r"another recipe: data\.train") as error:
        run.check(tiny_config(tmp_path), resume=True)
    assert "hunter2" not in str(error.value)
    run.record_start(tiny_config(tmp_path), {})
    assert run.recipe.stat().st_mode == run.provenance.stat().st_mode


def test_half_a_row_of_a_killed_run_is_dropped_and_a_damaged_one_is_named(tmp_path):
    run = RunFolder(tmp_path)
    for step in range(1, 5):
        run.append_row({"step": step, "loss": step / 2})
    rows = run.metrics.read_bytes()
    run.metrics.write_bytes(rows + b'{"step": 5, "lo')
    assert [row["step"] for row in run.rows()] == [1, 2, 3, 4]
    run.truncate_rows(3)
    assert run.metrics.read_bytes() == b"".join(rows.splitlines(keepends=True)[:3])
    run.metrics.write_bytes(rows.replace(b'{"step": 2', b'{"st\xffp": 2'))
    with pytest.raises(TrainingError, match=r"metrics\.jsonl: expected rows that a run wrote"):
        run.truncate_rows(3)


def committed(folder, *steps, keep=9):
    checkpoints = Checkpoints(folder / "checkpoints")
    for step in steps:
        folder = files.unfinished(checkpoints.of(step))
        (folder / "shards").mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(bytes(range(200)))
        (folder / "shards" / "0.bin").write_bytes(b"shard")
        checkpoints.commit(step, keep=keep, num_samples=7)
    return checkpoints


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "removed": lambda file: file.unlink(),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-9]),
    "flipped": flip,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["model.safetensors", "shards/0.bin", MANIFEST])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path, name, damage):
    checkpoints, warnings = committed(tmp_path, 4, 8), []
    DAMAGES[damage](checkpoints.of(8) / name)
    assert checkpoints.latest(warnings.append) == checkpoints.of(4)
    (warning,) = warnings
    assert str(checkpoints.of(8)) in warning and "resuming step_00000004 instead" in warning
    assert name in warning or name == MANIFEST
    DAMAGES[damage](checkpoints.of(4) / name)
    with pytest.raises(TrainingError, match=r"0008 is.*; .*0004 is.*no undamaged checkpoint"):
        checkpoints.latest()


def test_the_newest_checkpoints_are_kept_and_an_equal_step_is_replaced(tmp_path):
    checkpoints = committed(tmp_path, 1, 2, 3, 3, keep=2)
    folders = sorted(folder.name for folder in checkpoints.path.iterdir())
    assert folders == ["step_00000002", "step_00000003"]
    assert step_of(checkpoints.latest(), num_samples=7) == 3
    with pytest.raises(TrainingError, match="expected num_samples = 7, got 8"):
        step_of(checkpoints.latest(), num_samples=8)
