"""Invalid model folders and command lines: one line, exit status 2, nothing is run or written."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.damage import picture
from tests.helpers.tiny_run import elip, tiny_arguments

TINY = ("optim.steps=1", "trackers=[]", "report=[]")
LONG = "x" * 300


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    assert elip(*tiny_arguments(folder)) == 0
    return folder / "model"


@pytest.fixture
def model(saved, tmp_path):
    """Return a model folder that a test may damage."""
    return shutil.copytree(saved, tmp_path / "model")


def weights_changed(change):
    def damage(folder):
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return damage


def with_nan(folder):
    weights = load_file(folder / "model.safetensors")
    weights["image_projection.weight"][0, 0] = torch.nan
    save_file(weights, folder / "model.safetensors")


def config_changed(**fields):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))

    return damage


def config_of(text):
    return lambda folder: (folder / "config.json").write_text(text)


def evil_tokenizer(folder):
    """Set the tokenizer's class to a Python file that writes a mark when it is run."""
    path = folder / "tokenizer_config.json"
    own = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    mark = folder / "mark"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")


DAMAGES = {
    "cut short": (
        weights_changed(lambda b: b[: len(b) // 2]),
        "expected a complete safetensors file",
    ),
    "emptied": (weights_changed(lambda b: b""), "expected a complete safetensors file"),
    "header": (weights_changed(lambda b: b[:9] + b"\xff" + b[10:]), "a complete safetensors file"),
    "NaN": (with_nan, "expected numbers, got NaN in image_projection.weight"),
    "depth": (config_changed(text_depth=10**10), r"text_depth: expected an integer in \[1, 1024\]"),
    "width": (config_changed(vision_width=2**20), "expected weights that fit"),
    "no JSON": (config_of("["), "config.json: expected a JSON object"),
    "no object": (config_of("[1]"), "config.json: expected a JSON object"),
    "deep": (config_of("[" * 100_000), "config.json: expected a JSON object"),
    "tokenizer": (evil_tokenizer, "contains custom code"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_model_folder_is_one_line(model, name, monkeypatch, capsys):
    damage, said = DAMAGES[name]
    damage(model)
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # whoever asks is answered
    assert elip("eval", "retrieval", "--model", model, "--data", "emoji_scenes:size=5") == 2
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(said, error), error
    assert not (model / "mark").exists()


COMMANDS = {
    "long folder": (["train", "clip_tiny", f"output_dir={LONG}", *TINY], "File name too long"),
    "empty folder": (["train", "clip_tiny", "output_dir=''", *TINY], "output_dir: must match"),
    "file": (["train", "clip_tiny", "output_dir=file", *TINY], "a folder that can be written"),
    "in a file": (["train", "clip_tiny", "output_dir=file/a", *TINY], "that can be written"),
    "seed": (["train", "clip_tiny", "seed=5000000000", *TINY], "seed: must be less than"),
    "workers": (["train", "clip_tiny", "data.num_workers=100000", *TINY], "data.num_workers"),
    "nobody": (
        ["train", "clip_tiny", "data.train=~nouser/x.tar", *TINY],
        "the ~name of a known user",
    ),
    "scenes": (["train", "clip_tiny", f"data.train=emoji_scenes:size={10**20}"], "size: expected"),
    "deep YAML": (["train", "deep.yaml"], "not valid YAML"),
    "bytes": (["train", "bytes.yaml"], "expected a mapping"),
    "deep value": (["train", "clip_tiny", f"optim.lr={'[' * 5000}"], "expected a list in YAML"),
    "deep JSON": (["data", "check", "deep.json"], "got no valid JSON"),
    "to a folder": (
        ["profile", "--model", "clip_tiny", "--flops-only", "--output", "."],
        "--output: expected a file",
    ),
    "rate": (["train", "clip_tiny", "optim.lr=1e300", *TINY], "optim.lr: must be less"),
    "epochs": (["train", "clip_tiny", "optim.epochs=1e30"], "optim.epochs: must be less"),
    "slices": (
        ["train", "clip_tiny", "optim.batch_slices=99999", *TINY],
        "optim.batch_slices: must be",
    ),
    "passes": (
        ["train", "clip_tiny", f"optim.grad_accumulation={2**62}"],
        "optim.grad_accumulation:",
    ),
    "augment": (
        ["train", "clip_tiny", f"data.randaugment=[{2**62}, 5]"],
        "data.randaugment.0: must be less",
    ),
    "memory": (
        ["profile", "--model", "clip_tiny", "--max-batch", "--memory", f"{'9' * 400}GB"],
        "--memory: expected a size such as 16GB",
    ),
    "a device": (
        ["profile", "--model", "clip_tiny", "--flops-only", "--output", "/dev/null"],
        "--output: expected a file",
    ),
    "no such folder": (
        ["eval", "retrieval", "--model", "a", "--data", "b", "--output", "missing/a.json"],
        "--output: expected a file in a folder that exists",
    ),
    "workers of an evaluation": (
        ["eval", "retrieval", "--model", "a", "--data", "b", "--num-workers", "1000"],
        "--num-workers: num_workers: expected at most",
    ),
    "sides": (
        ["data", "check", "emoji_scenes:size=2", "--image-size", "99999"],
        "Invalid value for '--image-size'",
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_an_invalid_command_is_one_line(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("a")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "deep.yaml").write_text("model: " + "[" * 3_000)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe")
    before = sorted(os.listdir())
    arguments, said = COMMANDS[name]
    assert elip(*arguments) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert sorted(os.listdir()) == before


def test_a_full_disk_is_one_line(tmp_path, monkeypatch, capsys):
    def full(*_, **options):
        raise OSError(28, "No space left on device", "step_00000001")

    monkeypatch.setattr("elip_models.pretraining.training.run_checkpoints.Checkpoints.commit", full)
    assert elip(*tiny_arguments(tmp_path)) == 2
    assert "No space left on device" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--strategy", "elip:scorer=" + "9" * 5000], "--strategy: "),
        (["--image", "a.png", "--caption", "\udcff"], "--caption: expected valid text"),
    ],
)
def test_hostile_options_of_a_picture_are_one_line(tmp_path, monkeypatch, capsys, options, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(picture())
    data = [] if "--image" in options else ["--data", "emoji_scenes:size=3"]
    assert elip("visualize", "--model", "clip_tiny", "--no-pretrained", *data, *options) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "kept.png").exists()


def test_too_little_memory_is_one_line(monkeypatch, capsys):
    def small(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("elip_models.commands.train.load_recipe", small)
    assert elip("train", "clip_tiny") == 2
    assert "the memory is too small" in capsys.readouterr().err


@pytest.mark.slow
def test_a_name_that_is_no_text_is_printed(tmp_path):
    command = [sys.executable, "-m", "elip_models.cli", "data", "check", b"\xff.json"]
    environment = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert run.returncode == 2 and b"expected an existing file" in run.stderr, run.stderr
