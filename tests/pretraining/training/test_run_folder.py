"""A folder has one run, and nothing in it is removed that the run did not write."""

import json
import os
import re
import subprocess
import sys

import pytest

from elip_models.pretraining.data import EmojiScenes
from elip_models.pretraining.training.provenance import run_provenance
from elip_models.pretraining.training.recipe import load_recipe
from elip_models.pretraining.training.run_folder import RunFolder
from elip_models.pretraining.training.trainer import train
from elip_models.validation import TrainingError
from tests.helpers.tiny_run import tiny_config

LAUNCHED = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


def contents(folder):
    """Relative name -> bytes of every file, None of a folder."""
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def started(folder, *overrides):
    """A folder with the files of a run that has started, without any training."""
    config, run = tiny_config(folder, *overrides), RunFolder(folder)
    with run.locked(config, resume=False):
        run.prepare()
        run.record_start(config, {"started": "now"})
    return config, run


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", ["tokenizer/tokenizer.json", "metrics.jsonl", "a.png", ".x/y"])
def test_a_folder_with_other_files_is_refused_and_keeps_them(tmp_path, name, resume):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text('{"step": 9}')
    before = contents(tmp_path)
    config = tiny_config(tmp_path, f"data.tokenizer={tmp_path}/tokenizer")
    with pytest.raises(TrainingError, match=r"output_dir: expected a new or empty folder.* set an"):
        train(config, resume=resume)
    assert contents(tmp_path) == before


def test_a_recipe_without_a_run_is_another_file(tmp_path):
    (tmp_path / "recipe.yaml").write_text("name: mine")
    with pytest.raises(TrainingError, match=r"with recipe\.yaml: set another"):
        train(tiny_config(tmp_path), resume=True)


def test_a_start_that_fails_leaves_a_folder_as_it_was(tmp_path):
    for folder in (tmp_path, tmp_path / "a" / "b"):
        run = RunFolder(folder)
        with (
            pytest.raises(KeyError, match="failed"),
            run.locked(tiny_config(folder), resume=False),
        ):
            run.prepare()
            run.train_tokenizer(lambda path: path.mkdir())
            raise KeyError("failed")
    assert contents(tmp_path) == {}


@pytest.mark.slow
def test_what_a_killed_start_left_is_removed_but_no_file_that_came_since(tmp_path):
    script = f"""if True:
        import os
        import pathlib
        from elip_models.pretraining.training.run_folder import RunFolder
        from tests.helpers.tiny_run import tiny_config
        run = RunFolder({str(tmp_path)!r})
        with run.locked(tiny_config(run.path), resume=False):
            run.train_tokenizer(pathlib.Path.mkdir)
            os._exit(9)"""
    assert subprocess.run([sys.executable, "-c", script], timeout=120).returncode == 9
    assert sorted(os.listdir(tmp_path)) == [".lock", ".tokenizer"]
    run = started(tmp_path)[1]
    assert run.trained_tokenizer() is None
    assert sorted(os.listdir(tmp_path)) == [".lock", "provenance.jsonl", "recipe.yaml"]
    run.recipe.unlink()
    run.tokenizer.mkdir()
    with pytest.raises(TrainingError, match=r"with tokenizer: set another"):
        run.check(tiny_config(tmp_path), resume=True)


@pytest.mark.parametrize("rank", [{"RANK": "1"}, {"RANK": "x"}, LAUNCHED | {"WORLD_SIZE": "1"}])
def test_one_run_at_a_time_even_if_a_rank_is_in_the_environment(tmp_path, monkeypatch, rank):
    for name, value in rank.items():
        monkeypatch.setenv(name, value)
    config = tiny_config(tmp_path)
    with (
        RunFolder(tmp_path).locked(config, resume=True),
        pytest.raises(TrainingError, match=rf"in use by process {os.getpid()} on"),
        RunFolder(tmp_path).locked(config, resume=True),
    ):
        raise AssertionError("two runs")


def test_the_other_processes_of_a_launcher_leave_the_lock_to_the_first(tmp_path, monkeypatch):
    config = tiny_config(tmp_path)
    with RunFolder(tmp_path).locked(config, resume=True):
        for name, value in LAUNCHED.items():
            monkeypatch.setenv(name, value)
        with RunFolder(tmp_path).locked(config, resume=True):
            assert (tmp_path / ".lock").exists()


@pytest.mark.parametrize("replaced", [False, True])
def test_a_run_whose_lock_was_removed_writes_no_more(tmp_path, replaced):
    config, run = started(tmp_path)
    with run.locked(config, resume=True):
        run.append_row({"step": 1})
        (tmp_path / ".lock").unlink()
        if replaced:
            (tmp_path / ".lock").write_text("other")
        before = contents(tmp_path)
        for write in (
            run.check_lock,
            lambda: run.append_row({"step": 2}),
            lambda: run.record_start(config, {}),
        ):
            with pytest.raises(TrainingError, match=r"\.lock was removed or replaced.*--resume"):
                write()
        with RunFolder(tmp_path).locked(config, resume=True):
            assert run.rows() == [{"step": 1}]
    assert before.items() - contents(tmp_path).items() <= {
        (run._lock.path.relative_to(tmp_path), b"other")
    }


def test_damaged_lines_of_the_log_are_counted_and_the_others_kept(tmp_path):
    run, told = RunFolder(tmp_path), []
    for step in range(1, 7):
        run.append_row({"step": step, "loss": step / 2})
    lines = run.metrics.read_bytes().splitlines(keepends=True)
    lines[1] = b'{"step": 2, "lo\xff\n'
    lines[3] = b'{"step": "4", "loss": 2.0}\n'
    run.metrics.write_bytes(b"".join(lines) + b"[" * 200_000 + b'\n{"step": 7, "lo')
    assert [row["step"] for row in run.rows()] == [1, 3, 5, 6]
    run.truncate_rows(5, told.append)
    assert run.metrics.read_bytes() == lines[0] + lines[2] + lines[4]
    assert len(told) == 1 and "metrics.jsonl: 3 of 8 lines" in told[0] and "line 2" in told[0]
    run.truncate_rows(5, told.append)
    assert len(told) == 1


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'{"step": 1}\n{"step": 90}\n{"step": 3}\n', "1 of 3 lines .* line 2"),
        (b'{"step": 1}\n{"step": 2, \0\0"step": 3}', "1 of 2 lines .* line 2"),
        (b'{"step": 1}\n{"step": 2, "loss": 0', "1 of 2 lines .* line 2"),
        (b'{"step": 1}\n{"step": 6, "loss": 0', None),
        (b'{"step": 1}\n{"st', None),
    ],
)
def test_a_row_that_no_killed_run_can_have_lost_is_counted(tmp_path, content, told):
    run, warned = RunFolder(tmp_path), []
    run.metrics.write_bytes(content)
    run.truncate_rows(5, warned.append)
    assert [bool(re.search(told or "", each)) for each in warned] == [True] * (told is not None)


def test_a_line_that_a_killed_process_left_is_not_joined_with_the_next(tmp_path):
    run = RunFolder(tmp_path)
    run.metrics.write_bytes(b'{"step": 1}\n{"st')
    run.append_row({"step": 2})
    assert [row["step"] for row in run.rows()] == [1, 2]


URL = "{stream: 'https://me:hunter2@h/a.tar', samples: 9}"
QUERY = "{stream: 'https://h/a.tar?Signature=hunter2', samples: 9}"


@pytest.mark.parametrize("spec", [URL, QUERY])
def test_a_recipe_with_a_secret_is_private_and_no_message_has_it(tmp_path, spec, monkeypatch):
    config, run = started(tmp_path, f"data.train={spec}")
    assert run.recipe.stat().st_mode & 0o777 == 0o600
    assert load_recipe(run.recipe) == config
    with pytest.raises(TrainingError, match=r"another recipe: data\.train") as error:
        run.check(tiny_config(tmp_path), resume=True)
    assert "hunter2" not in str(error.value)
    monkeypatch.setattr(sys, "argv", ["elip", "train", f"data.train={spec}", "seed=1"])
    provenance = run_provenance(EmojiScenes(2, image_size=32), None)
    assert "hunter2" not in json.dumps(provenance)


def test_a_recipe_without_a_secret_is_readable_as_any_new_file(tmp_path):
    (tmp_path / "other").touch()
    _, run = started(tmp_path / "run")
    assert run.recipe.stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "file"])
def test_a_folder_that_cannot_be_is_one_sentence(tmp_path, name):
    (tmp_path / "file").touch()
    folder = f"{tmp_path}/{name}"
    run = RunFolder(folder)
    with (
        pytest.raises(TrainingError, match="output_dir: expected a folder that can be written"),
        run.locked(tiny_config(tmp_path), resume=False),
    ):
        raise AssertionError("started")
