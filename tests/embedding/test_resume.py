"""A run that is stopped continues to the same bytes; other runs and settings are refused."""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from functools import partial

import pytest
import torch

import elip_models
from elip_models.cli import main
from elip_models.embedding import output
from elip_models.embedding.encoder import open_encoder
from elip_models.validation import ConfigError
from tests.embedding.conftest import SMALL, files_of
from tests.full_disk import fill
from tests.helpers.tiny_run import elip


@pytest.mark.parametrize("missing", [[0], [1, 2], [0, 1, 2]])
def test_missing_and_damaged_shards_are_written_again(whole, pictures, model, tmp_path, missing):
    folder = tmp_path / "out"
    folder.mkdir()
    for name, content in files_of(whole).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    for number in missing:
        shard = folder / "images" / f"shard-{number:06d}.parquet"
        if number == 1:
            shard.write_bytes(shard.read_bytes()[:100])
        else:
            shard.unlink()
    shown = []
    elip_models.embed(model, pictures, folder, **SMALL, progress=lambda *at: shown.append(at))
    assert files_of(folder) == files_of(whole)
    assert shown[0] == (9 - 3 * len(missing), 0, 9) and shown[-1] == (9, 0, 9)


def killed_at(number, after):
    """Replace os.replace by one that kills this process at a call, before or after it."""
    replace, calls = os.replace, []

    def replacing(*arguments):
        calls.append(arguments)
        if len(calls) == number and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*arguments)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replacing


def in_child(work):
    """Run a function in a forked process; return its exit status."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the process is forked")
def test_a_killed_run_continues_to_the_same_bytes(whole, pictures, model, tmp_path):
    """Six files are renamed into place: the manifest, three shards, the skipped list, and the
    manifest again. The process is killed before or after each, one time after the other."""
    opened = open_encoder(model)

    def work(number, after):
        killed_at(number, after)
        elip_models.embed(opened, pictures, tmp_path, **SMALL)

    for moment in ((1, False), (1, True), (1, False), (2, True), (1, True), (2, False)):
        assert in_child(partial(work, *moment)) == -signal.SIGKILL
    elip_models.embed(opened, pictures, tmp_path, **SMALL)
    assert files_of(tmp_path) == files_of(whole)
    assert {path.name for path in tmp_path.rglob(".*")} <= {".lock"}


@pytest.mark.slow
def test_two_processes_of_torchrun_give_the_same_bytes(whole, pictures, model, tmp_path):
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    options = ["--output", tmp_path / "out", "--workers=0", "--batch-size=2", "--shard-size=3"]
    command = [sys.executable, "-m", *launch, "-m", "elip_models.cli", "embed", pictures]
    done = subprocess.run(
        [*map(str, [*command, "--model", model, *options])],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("9 of 9 images embedded") == 1
    assert files_of(tmp_path / "out") == files_of(whole)


@pytest.mark.slow
def test_ten_kills_at_random_moments_give_the_same_bytes(whole, pictures, model, tmp_path):
    """Worker processes decode; they end with the killed process."""
    rng, opened = random.Random(0), open_encoder(model)

    def work():
        elip_models.embed(opened, pictures, tmp_path, **SMALL | {"workers": 2})

    for _ in range(10):
        process = os.fork()
        if process == 0:
            with suppress(BaseException):
                work()
            os._exit(0)
        time.sleep(rng.uniform(0, 0.6))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        if (tmp_path / "manifest.json").exists() and rng.random() < 0.5:
            shutil.rmtree(tmp_path / "images", ignore_errors=True)  # so that ten runs have work
    work()
    assert files_of(tmp_path) == files_of(whole)


def test_only_unfinished_files_of_this_command_are_removed(tmp_path):
    names = (".notes.txt", "images/.mine.parquet", ".manifest.json.7.7")
    names += ("images/.shard-000001.parquet.7.7",)
    (tmp_path / "images").mkdir()
    for name in names:
        (tmp_path / name).touch()
    output.OutputFolder(tmp_path).begin({"model": "a"})
    assert [(tmp_path / name).exists() for name in names] == [True, True, False, False]


def test_a_second_run_in_the_folder_is_refused(pictures, model, tmp_path):
    folder = output.OutputFolder(tmp_path)
    with folder.locked(), pytest.raises(ConfigError, match="output: expected a folder that no oth"):
        elip_models.embed(model, pictures, tmp_path, **SMALL)


def test_other_settings_are_refused_with_both_named(whole, pictures, model, tmp_path):
    before = files_of(whole)
    for options, message in (
        ({"reduce": "tome"}, "strategy.*None there, 'tome' now"),
        ({"embedding_dtype": "float16"}, "embedding_dtype: 'float32' there, 'float16' now"),
        ({"batch_size": 3}, "batch_size: 2 there, 3 now"),
        ({"preprocess": "clip"}, "preprocessing.kind: 'timm' there, 'given' now"),
    ):
        with pytest.raises(ConfigError, match=message):
            elip_models.embed(model, pictures, whole, **SMALL | options)
    (tmp_path / "a.png").write_bytes((pictures / "0.png").read_bytes())
    with pytest.raises(ConfigError, match=r"source.found: 9 there, 1 now; source.sha256"):
        elip_models.embed(model, tmp_path, whole, **SMALL)
    assert files_of(whole) == before


@pytest.mark.slow
def test_other_weights_are_refused(whole, pictures, model, tmp_path):
    weights = torch.load(model.partition("vit:")[2], weights_only=True)
    weights["cls_token"] += 1
    torch.save(weights, tmp_path / "other.pt")
    with pytest.raises(ConfigError, match=r"model.name: .* there, .*other.pt' now; model.weights"):
        elip_models.embed(f"timm:test_vit:{tmp_path}/other.pt", pictures, whole, **SMALL)


def test_a_folder_with_other_files_is_refused(pictures, model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"output: expected a new or empty folder.*notes.txt"):
        elip_models.embed(model, pictures, tmp_path, **SMALL)
    with pytest.raises(ConfigError, match="output: expected a folder, got the file"):
        elip_models.embed(model, pictures, tmp_path / "notes.txt", **SMALL)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"output: expected a manifest.json of format 1"):
        elip_models.embed(model, pictures, tmp_path, **SMALL)


def test_an_output_in_the_source_is_refused(pictures, model):
    with pytest.raises(ConfigError, match="output: expected a folder outside the source"):
        elip_models.embed(model, pictures, pictures / "sub" / "out", **SMALL)
    assert not (pictures / "sub" / "out").exists()


def test_a_full_disk_is_one_line_and_whole_shards_stay(
    whole, pictures, model, tmp_path, monkeypatch, capsys
):
    write, calls = output.write_file, []

    def full(path, content, **options):
        calls.append(path)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, content, **options)

    monkeypatch.setattr(output, "write_file", full)
    options = ["--batch-size", 2, "--shard-size", 3, "--workers", 0]
    arguments = ["embed", pictures, "--model", model, "--output", tmp_path / "out", *options]
    assert elip(*arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "No space left on device; the files that were written" in said
    assert len(list((tmp_path / "out" / "images").glob("*.parquet"))) == 2
    assert elip(*arguments) == 0
    assert files_of(tmp_path / "out") == files_of(whole)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the process is forked")
def test_a_real_limit_of_the_file_system_is_one_line(pictures, model, tmp_path, capfd):
    def work():
        fill(tmp_path, 2_500)
        main(["embed", str(pictures), "--model", model, "--output", str(tmp_path), "--workers=0"])

    assert in_child(work) == 1  # `main` raises SystemExit
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(said) == 1 and "File too large; the files that were written are whole" in said[0]
    assert not list((tmp_path / "images").glob("*"))


def test_a_folder_that_changes_during_the_run_is_reported(damaged, model, tmp_path):
    said = []

    def change(images, skipped, total):
        (damaged / "0.png").unlink(missing_ok=True)
        (damaged / "new.png").write_bytes(b"")

    options = SMALL | {"progress": change, "report": said.append}
    found = elip_models.embed(model, damaged, tmp_path / "out", **options)
    assert (found.found, found.skipped) == (13, 5)
    assert "changed during the run: 1 images were added" in said[-1] and "1 removed" in said[-1]
